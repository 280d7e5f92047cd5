package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// hostPorts names the annotation with the ports of this machine's loopback that an isolated pod reaches at its own
// loopback, besides the API server's. That is all of the network that there is.
const hostPorts = "node.test/host-ports"

// sandbox is the network of an isolated pod: a namespace with a loopback of its own.
type sandbox struct {
	namespace *os.File
	listeners []net.Listener
}

func newSandbox(ports []int) (*sandbox, error) {
	s := &sandbox{}
	err := onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		var err error
		if s.namespace, err = os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())); err != nil {
			return err
		}
		return loopbackUp()
	})
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	for _, port := range ports {
		if err := s.lead(port); err != nil {
			s.close()
			return nil, err
		}
	}
	return s, nil
}

// lead passes what arrives at a port of the pod's loopback on to the same port of this machine's.
func (s *sandbox) lead(port int) error {
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	var listener net.Listener
	err := s.do(func() (err error) {
		listener, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		return err
	}
	s.listeners = append(s.listeners, listener)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				there, err := net.Dial("tcp", address)
				if err != nil {
					conn.Close()
					return
				}
				connect(conn.(*net.TCPConn), there.(*net.TCPConn))
			}()
		}
	}()
	return nil
}

// connect passes everything on between two connections, and ends with both.
func connect(one, other *net.TCPConn) {
	defer one.Close()
	defer other.Close()
	var both sync.WaitGroup
	both.Go(func() { passOn(other, one) })
	both.Go(func() { passOn(one, other) })
	both.Wait()
}

// passOn copies one direction; an end is an end and a reset a reset, at the other side too.
func passOn(to, from *net.TCPConn) {
	if _, err := io.Copy(to, from); err != nil {
		for _, conn := range []*net.TCPConn{to, from} {
			_ = conn.SetLinger(0)
			conn.Close()
		}
		return
	}
	_ = to.CloseWrite()
}

// dial connects to a port of the pod.
func (s *sandbox) dial(ctx context.Context, port int) (conn net.Conn, err error) {
	err = s.do(func() error {
		// An address and no name: the socket is made by this thread and no other.
		conn, err = (&net.Dialer{Timeout: 10 * time.Second}).DialContext(
			ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		return err
	})
	return conn, err
}

// do runs work on a thread that is in the namespace.
func (s *sandbox) do(work func() error) error {
	return onOwnThread(func() error {
		if err := unix.Setns(int(s.namespace.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return work()
	})
}

func (s *sandbox) close() {
	for _, listener := range s.listeners {
		listener.Close()
	}
	s.namespace.Close()
}

// onOwnThread runs work on a thread that ends with it, whatever it did to its namespaces.
func onOwnThread(work func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		result <- work()
	}()
	return <-result
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request)
}

func portsOf(annotation string) ([]int, error) {
	var ports []int
	for _, word := range strings.FieldsFunc(annotation, func(r rune) bool { return r == ',' || r == ' ' }) {
		port, err := strconv.Atoi(word)
		if err != nil {
			return nil, fmt.Errorf("annotation %s: %w", hostPorts, err)
		}
		ports = append(ports, port)
	}
	return ports, nil
}
