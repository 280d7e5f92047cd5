package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kubernetes/third_party/forked/golang/expansion"
)

const (
	firstBackoff = time.Second // as at a kubelet it doubles, but not to five minutes
	mostBackoff  = 8 * time.Second
	waitForParts = 500 * time.Millisecond
)

// life is what makes a pod of an isolating node more than its processes: a network and a file system of its own, init
// containers, restarts, probes, hooks. What this node does not know makes the pod fail with a sentence, so that no test
// passes because something was left out.
type life struct {
	node    *node
	object  *core.Pod // its spec; never its status
	pod     *pod
	root    string
	ctx     context.Context // ends with the pod
	end     context.CancelFunc
	changed chan struct{} // something of the status is new

	mu       sync.Mutex
	sandbox  *sandbox
	volumes  volumes
	waiting  string // why no container runs
	initial  bool   // init containers are through
	stopping bool
	states   map[string]*state
	since    map[core.PodConditionType]core.PodCondition
	over     sync.WaitGroup // supervisors of containers
}

// state is one container, through all of its restarts.
type state struct {
	restarts int32
	last     *core.ContainerStateTerminated
	waiting  string
	started  bool // the startup probe has passed, or there is none
	ready    bool
}

func (n *node) begin(ctx context.Context, object *core.Pod) {
	p := &pod{uid: object.UID, containers: map[string]*container{}}
	l := &life{
		node: n, object: object.DeepCopy(), pod: p, changed: make(chan struct{}, 1), states: map[string]*state{},
		root:  filepath.Join(n.root, object.Namespace, object.Name+"-"+string(object.UID)),
		since: map[core.PodConditionType]core.PodCondition{}, waiting: "ContainerCreating",
	}
	l.ctx, l.end = context.WithCancel(ctx)
	p.life = l
	for _, spec := range append(append([]core.Container{}, object.Spec.InitContainers...), object.Spec.Containers...) {
		l.states[spec.Name] = &state{waiting: "ContainerCreating"}
	}
	n.mu.Lock()
	n.pods[object.Namespace+"/"+object.Name] = p
	n.mu.Unlock()
	l.over.Add(1)
	go l.reportAll()
	go func() {
		defer l.over.Done()
		if err := l.run(); err != nil && l.ctx.Err() == nil {
			log.Printf("%s/%s: %v", object.Namespace, object.Name, err)
			l.note(func() { l.waiting = "Failed: " + err.Error() })
		}
	}()
}

// note changes something that the status shows.
func (l *life) note(change func()) {
	l.mu.Lock()
	change()
	l.mu.Unlock()
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

func (l *life) run() error {
	for _, spec := range append(append([]core.Container{}, l.object.Spec.InitContainers...), l.object.Spec.Containers...) {
		if err := understood(spec); err != nil {
			return fmt.Errorf("container %s: %w", spec.Name, err)
		}
	}
	ports, err := portsOf(l.object.Annotations[hostPorts])
	if err != nil {
		return err
	}
	box, err := newSandbox(append(ports, l.node.apiPort))
	if err != nil {
		return err
	}
	l.note(func() { l.sandbox = box })
	for {
		made, again, err := l.node.makeVolumes(l.ctx, l.object, filepath.Join(l.root, "volumes"))
		if err == nil {
			l.note(func() { l.volumes, l.waiting = made, "" })
			go again.run(l.ctx, func(err error) { log.Printf("%s: volumes: %v", l.object.Name, err) })
			break
		}
		log.Printf("%s/%s waits: %v", l.object.Namespace, l.object.Name, err)
		l.note(func() { l.waiting = "FailedMount: " + err.Error() })
		if !l.wait(waitForParts) {
			return l.ctx.Err()
		}
	}
	for _, spec := range l.object.Spec.InitContainers {
		if !l.supervise(spec, true) {
			return l.ctx.Err()
		}
	}
	l.note(func() { l.initial = true })
	for _, spec := range l.object.Spec.Containers {
		l.over.Add(1)
		go func() {
			defer l.over.Done()
			l.supervise(spec, false)
		}()
	}
	return nil
}

// understood refuses what would be left out.
func understood(spec core.Container) error {
	if spec.RestartPolicy != nil || len(spec.VolumeDevices) > 0 {
		return fmt.Errorf("this node knows no sidecars and no block devices")
	}
	for _, probe := range []*core.Probe{spec.StartupProbe, spec.LivenessProbe, spec.ReadinessProbe} {
		if probe != nil && probe.HTTPGet == nil && probe.Exec == nil {
			return fmt.Errorf("this node knows HTTP and exec probes alone")
		}
	}
	for _, volume := range spec.VolumeMounts {
		if volume.SubPath != "" || volume.SubPathExpr != "" {
			return fmt.Errorf("this node knows no subPath")
		}
	}
	return nil
}

// wait returns false when the pod ends first.
func (l *life) wait(time_ time.Duration) bool {
	timer := time.NewTimer(time_)
	defer timer.Stop()
	select {
	case <-l.ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// supervise starts a container, and again whenever it has ended and the pod's policy says so. It returns when no
// process will be started any more: true for an init container that has done its work.
func (l *life) supervise(spec core.Container, initial bool) bool {
	s := l.states[spec.Name]
	backoff := firstBackoff
	for {
		c, err := l.launch(spec)
		code := int32(128)
		if err != nil {
			log.Printf("%s/%s: container %s: %v", l.object.Namespace, l.object.Name, spec.Name, err)
			l.note(func() { s.waiting = "RunContainerError: " + err.Error() })
			if l.isStopping() {
				return false
			}
		} else {
			probing, stop := context.WithCancel(l.ctx)
			if !initial {
				go l.probe(probing, c, s)
			}
			<-c.done
			stop()
			code = int32(c.exit)
			reason := "Completed"
			if code != 0 {
				reason = "Error"
			}
			l.note(func() {
				s.last = &core.ContainerStateTerminated{
					ExitCode: code, Reason: reason, StartedAt: c.started, FinishedAt: c.ended,
				}
				s.started, s.ready, s.waiting = false, false, ""
			})
		}
		if l.isStopping() {
			return false
		}
		if code == 0 && (initial || l.object.Spec.RestartPolicy != core.RestartPolicyAlways) {
			return true
		}
		if l.object.Spec.RestartPolicy == core.RestartPolicyNever {
			return false
		}
		l.note(func() { s.waiting = "CrashLoopBackOff" })
		if !l.wait(backoff) || l.isStopping() {
			return false
		}
		backoff = min(2*backoff, mostBackoff)
		l.note(func() { s.restarts++ })
	}
}

func (l *life) isStopping() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stopping
}

func (l *life) launch(spec core.Container) (*container, error) {
	env, err := l.environment(spec)
	if err != nil {
		return nil, err
	}
	argv, program, err := l.command(spec, env)
	if err != nil {
		return nil, err
	}
	c := &container{
		name: spec.Name, pod: l.object.Name, spec: spec, done: make(chan struct{}), started: meta.Now(),
		dir: filepath.Join(l.root, "containers", spec.Name), fixedEnv: env, life: l,
	}
	c.log.changed = make(chan struct{})
	into := l.entry(spec)
	into.Root, into.Program, into.Argv = c.dir, program, argv
	for _, volume := range spec.VolumeMounts {
		source, there := l.volumes[volume.Name]
		if !there {
			return nil, fmt.Errorf("no volume %s", volume.Name)
		}
		into.Mounts = append(into.Mounts, mount{source, volume.MountPath, volume.ReadOnly})
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopping {
		return nil, fmt.Errorf("the pod ends")
	}
	if err := c.start(into); err != nil {
		return nil, err
	}
	l.pod.put(c)
	s := l.states[spec.Name]
	s.waiting, s.started, s.ready = "", spec.StartupProbe == nil, spec.StartupProbe == nil && spec.ReadinessProbe == nil
	select {
	case l.changed <- struct{}{}:
	default:
	}
	return c, nil
}

// entry is where every process of a container goes.
func (l *life) entry(spec core.Container) *entry {
	into := &entry{
		Netns: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), l.sandbox.namespace.Fd()), Dir: "/", Groups: []int{},
	}
	if spec.WorkingDir != "" {
		into.Dir = spec.WorkingDir
	}
	if s := l.object.Spec.SecurityContext; s != nil {
		into.User, into.Group = number(s.RunAsUser, into.User), number(s.RunAsGroup, into.Group)
		if s.FSGroup != nil {
			into.Groups = append(into.Groups, int(*s.FSGroup))
		}
	}
	if s := spec.SecurityContext; s != nil {
		into.User, into.Group = number(s.RunAsUser, into.User), number(s.RunAsGroup, into.Group)
		into.ReadOnly = s.ReadOnlyRootFilesystem != nil && *s.ReadOnlyRootFilesystem
		into.NoMore = s.AllowPrivilegeEscalation != nil && !*s.AllowPrivilegeEscalation
	}
	return into
}

func number(value *int64, otherwise int) int {
	if value == nil {
		return otherwise
	}
	return int(*value)
}

// command is the container's, before the image's own; and which program of this machine stands for the image.
func (l *life) command(spec core.Container, env []string) (argv []string, program string, err error) {
	mapped := expansion.MappingFuncFor(values(env))
	image := l.node.images[repository(spec.Image)]
	if len(spec.Command) > 0 {
		for _, word := range spec.Command {
			argv = append(argv, expansion.Expand(word, mapped))
		}
	} else if argv = append(argv, image...); len(argv) == 0 && len(spec.Args) == 0 {
		return nil, "", fmt.Errorf("the image %s is not here, and there is no command", spec.Image)
	}
	for _, word := range spec.Args {
		argv = append(argv, expansion.Expand(word, mapped))
	}
	if len(image) > 0 {
		program = image[0]
	}
	return argv, program, nil
}

// repository is an image's name without tag and digest.
func repository(image string) string {
	image, _, _ = strings.Cut(image, "@")
	if at := strings.LastIndexByte(image, ':'); at > strings.LastIndexByte(image, '/') {
		image = image[:at]
	}
	return image
}

func values(env []string) map[string]string {
	found := map[string]string{}
	for _, variable := range env {
		name, value, _ := strings.Cut(variable, "=")
		found[name] = value
	}
	return found
}

func (l *life) environment(spec core.Container) ([]string, error) {
	env := []string{
		"PATH=" + os.Getenv("PATH"), "HOME=/", "HOSTNAME=" + l.object.Name,
		"KUBERNETES_SERVICE_HOST=127.0.0.1", "KUBERNETES_SERVICE_PORT=" + strconv.Itoa(l.node.apiPort),
	}
	if len(spec.EnvFrom) > 0 {
		return nil, fmt.Errorf("this node knows no envFrom")
	}
	for _, variable := range spec.Env {
		value := expansion.Expand(variable.Value, expansion.MappingFuncFor(values(env)))
		if from := variable.ValueFrom; from != nil {
			var err error
			if value, err = l.valueFrom(from); err != nil {
				return nil, fmt.Errorf("environment %s: %w", variable.Name, err)
			}
		}
		env = append(env, variable.Name+"="+value)
	}
	return env, nil
}

func (l *life) valueFrom(from *core.EnvVarSource) (string, error) {
	found := map[string]file{}
	one := &files{node: l.node, pod: l.object}
	switch {
	case from.FieldRef != nil:
		return fieldOf(l.object, from.FieldRef.FieldPath)
	case from.ConfigMapKeyRef != nil:
		ref := from.ConfigMapKeyRef
		item := []core.KeyToPath{{Key: ref.Key, Path: "value"}}
		err := one.configMap(l.ctx, found, ref.Name, item, ref.Optional, 0)
		return string(found["value"].data), err
	case from.SecretKeyRef != nil:
		ref := from.SecretKeyRef
		item := []core.KeyToPath{{Key: ref.Key, Path: "value"}}
		err := one.secret(l.ctx, found, ref.Name, item, ref.Optional, 0)
		return string(found["value"].data), err
	}
	return "", fmt.Errorf("this node knows no such source")
}

// finish is what a kubelet does for a pod that is to be deleted: hooks, SIGTERM, and SIGKILL when the time is over.
func (l *life) finish(grace time.Duration) {
	l.note(func() { l.stopping = true })
	late := time.AfterFunc(grace, func() { l.pod.signal(syscall.SIGKILL) })
	defer late.Stop()
	hooks, cancel := context.WithTimeout(l.ctx, grace)
	var all sync.WaitGroup
	for _, c := range l.pod.all() {
		all.Go(func() {
			l.preStop(hooks, c)
			c.process.signal(syscall.SIGTERM)
		})
	}
	all.Wait()
	cancel()
	for _, c := range l.pod.all() {
		<-c.done
	}
	l.end()
	l.over.Wait()
	l.mu.Lock()
	box := l.sandbox
	l.mu.Unlock()
	if box != nil {
		box.close()
	}
	_ = os.RemoveAll(l.root)
}

// reportAll writes the pod's status whenever it is another one, until the pod has ended.
func (l *life) reportAll() {
	for {
		l.write()
		select {
		case <-l.ctx.Done():
			return
		case <-l.changed:
		}
	}
}

func (l *life) write() {
	status := l.status()
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": l.object.UID}, "status": status})
	if err == nil {
		err = l.node.patchStatus(l.ctx, l.object, patch)
	}
	if err != nil && l.ctx.Err() == nil {
		log.Printf("reporting %s/%s: %v", l.object.Namespace, l.object.Name, err)
	}
}

func (l *life) status() core.PodStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	ready, running, ended, failed := true, 0, 0, false
	describe := func(spec core.Container) core.ContainerStatus {
		s, c := l.states[spec.Name], l.pod.get(spec.Name)
		status := core.ContainerStatus{
			Name: spec.Name, Image: spec.Image, ImageID: spec.Image, RestartCount: s.restarts, Ready: s.ready,
		}
		started := s.started
		status.Started = &started
		switch {
		case s.waiting != "" || c == nil:
			reason, message, _ := strings.Cut(s.waiting+l.waiting, ": ")
			status.State.Waiting = &core.ContainerStateWaiting{Reason: reason, Message: message}
			status.LastTerminationState.Terminated = s.last
		case c.over():
			status.State.Terminated = s.last
		default:
			status.State.Running = &core.ContainerStateRunning{StartedAt: c.started}
			status.LastTerminationState.Terminated = s.last
		}
		return status
	}
	var initial, main []core.ContainerStatus
	for _, spec := range l.object.Spec.InitContainers {
		initial = append(initial, describe(spec))
	}
	for _, spec := range l.object.Spec.Containers {
		one := describe(spec)
		main = append(main, one)
		ready = ready && one.Ready
		if one.State.Running != nil {
			running++
		}
		if one.State.Terminated != nil {
			ended++
			failed = failed || one.State.Terminated.ExitCode != 0
		}
	}
	phase := core.PodPending
	switch {
	case strings.HasPrefix(l.waiting, "Failed"):
		phase = core.PodFailed
	case l.initial && ended == len(main) && l.object.Spec.RestartPolicy != core.RestartPolicyAlways:
		phase = core.PodSucceeded
		if failed {
			phase = core.PodFailed
		}
	case l.initial && running+ended > 0 || l.restarted():
		phase = core.PodRunning
	}
	conditions := []core.PodCondition{}
	for _, kind := range []core.PodConditionType{core.PodScheduled, core.PodInitialized, core.ContainersReady, core.PodReady} {
		value := ready
		if kind == core.PodScheduled {
			value = true
		} else if kind == core.PodInitialized {
			value = l.initial
		}
		conditions = append(conditions, l.condition(kind, value))
	}
	message := "" // a patch takes none away again: the last word of a pod that failed
	if phase == core.PodFailed {
		message = l.waiting
	}
	return core.PodStatus{
		Phase: phase, Message: message, HostIP: "127.0.0.1", HostIPs: []core.HostIP{{IP: "127.0.0.1"}},
		PodIP: "127.0.0.1", PodIPs: []core.PodIP{{IP: "127.0.0.1"}}, Conditions: conditions,
		StartTime: &l.object.CreationTimestamp, InitContainerStatuses: initial, ContainerStatuses: main,
	}
}

func (l *life) restarted() bool {
	for _, spec := range l.object.Spec.Containers {
		if l.states[spec.Name].restarts > 0 {
			return true
		}
	}
	return false
}

// condition keeps the time at which a condition became what it is: controllers count from it.
func (l *life) condition(kind core.PodConditionType, value bool) core.PodCondition {
	status := core.ConditionFalse
	if value {
		status = core.ConditionTrue
	}
	if known, there := l.since[kind]; there && known.Status == status {
		return known
	}
	now := core.PodCondition{Type: kind, Status: status, LastTransitionTime: meta.Now()}
	l.since[kind] = now
	return now
}
