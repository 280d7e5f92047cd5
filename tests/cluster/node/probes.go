package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"syscall"
	"time"

	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// probe runs a container's probes as a kubelet does: the startup probe alone until it has passed, then the other two.
// A startup or liveness probe that fails too often ends the container; it is supervised and starts again.
func (l *life) probe(ctx context.Context, c *container, s *state) {
	if probe := c.spec.StartupProbe; probe != nil {
		if !l.until(ctx, c, probe, func(passed bool, failures int32) bool { return passed || failures >= most(probe) }) {
			return
		}
		if ctx.Err() == nil && l.ask(ctx, c, probe) != nil {
			l.unwell(c, "startup")
			return
		}
		l.note(func() { s.started, s.ready = true, c.spec.ReadinessProbe == nil })
	}
	if probe := c.spec.LivenessProbe; probe != nil {
		go func() {
			failed := func(passed bool, failures int32) bool { return failures >= most(probe) }
			if l.until(ctx, c, probe, failed) {
				l.unwell(c, "liveness")
			}
		}()
	}
	if probe := c.spec.ReadinessProbe; probe != nil {
		l.until(ctx, c, probe, func(passed bool, failures int32) bool {
			if passed || failures >= most(probe) {
				l.mu.Lock()
				same := s.ready == passed
				l.mu.Unlock()
				if !same {
					l.note(func() { s.ready = passed })
				}
			}
			return false
		})
	}
}

func (l *life) unwell(c *container, which string) {
	log.Printf("%s/%s: container %s failed its %s probe", l.object.Namespace, l.object.Name, c.name, which)
	c.process.signal(syscall.SIGTERM)
	grace := int64(30)
	if l.object.Spec.TerminationGracePeriodSeconds != nil {
		grace = *l.object.Spec.TerminationGracePeriodSeconds
	}
	select {
	case <-c.done:
	case <-time.After(time.Duration(grace) * time.Second):
		c.process.signal(syscall.SIGKILL)
	}
}

// until probes again and again; it returns true when `enough` says so, false when the container or the pod has ended.
func (l *life) until(ctx context.Context, c *container, probe *core.Probe, enough func(passed bool, failures int32) bool) bool {
	if probe.InitialDelaySeconds > 0 && !pause(ctx, time.Duration(probe.InitialDelaySeconds)*time.Second) {
		return false
	}
	period := time.Duration(max(probe.PeriodSeconds, 1)) * time.Second
	failures := int32(0)
	for {
		err := l.ask(ctx, c, probe)
		if ctx.Err() != nil {
			return false
		}
		if failures++; err == nil {
			failures = 0
		}
		if enough(err == nil, failures) {
			return true
		}
		if !pause(ctx, period) {
			return false
		}
	}
}

func pause(ctx context.Context, duration time.Duration) bool {
	timer := time.NewTimer(duration)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

func most(probe *core.Probe) int32 { return max(probe.FailureThreshold, 1) }

func (l *life) ask(ctx context.Context, c *container, probe *core.Probe) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(max(probe.TimeoutSeconds, 1))*time.Second)
	defer cancel()
	if probe.Exec != nil {
		return c.ExecInContainer(ctx, "", "", "", probe.Exec.Command, nil, discard{}, discard{}, false, nil, 0)
	}
	return l.get(ctx, c, probe.HTTPGet)
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }
func (discard) Close() error                { return nil }

func (l *life) get(ctx context.Context, c *container, action *core.HTTPGetAction) error {
	port := action.Port.IntValue()
	if action.Port.Type == intstr.String {
		for _, named := range c.spec.Ports {
			if named.Name == action.Port.StrVal {
				port = int(named.ContainerPort)
			}
		}
	}
	transport := &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, // a kubelet checks no certificate either
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return l.sandbox.dial(ctx, port)
		},
	}
	scheme := "http"
	if action.Scheme == core.URISchemeHTTPS {
		scheme = "https"
	}
	url := fmt.Sprintf("%s://%s%s", scheme, net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), action.Path)
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	for _, header := range action.HTTPHeaders {
		request.Header.Set(header.Name, header.Value)
	}
	answer, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	_, _ = io.CopyN(io.Discard, answer.Body, 10<<10)
	if answer.StatusCode < 200 || answer.StatusCode >= 400 {
		return fmt.Errorf("status %d", answer.StatusCode)
	}
	return nil
}

// preStop runs a container's hook; what becomes of it is logged and changes nothing.
func (l *life) preStop(ctx context.Context, c *container) {
	if c.spec.Lifecycle == nil || c.spec.Lifecycle.PreStop == nil || c.over() {
		return
	}
	var err error
	switch hook := c.spec.Lifecycle.PreStop; {
	case hook.Exec != nil:
		err = c.ExecInContainer(ctx, "", "", "", hook.Exec.Command, nil, discard{}, discard{}, false, nil, 0)
	case hook.HTTPGet != nil:
		err = l.get(ctx, c, hook.HTTPGet)
	case hook.Sleep != nil:
		pause(ctx, time.Duration(hook.Sleep.Seconds)*time.Second)
	}
	if err != nil {
		log.Printf("%s: preStop of %s: %v", l.object.Name, c.name, err)
	}
}
