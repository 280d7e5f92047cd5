package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

// forks is worked off by the main thread.
var forks = make(chan func())

var (
	aliveMu sync.Mutex
	alive   = map[int]bool{} // leaders of process groups that have not been reaped
)

// process is a command in a session of its own. On a terminal, tty is its other end and serves as input and output.
type process struct {
	cmd    *exec.Cmd
	tty    *os.File
	stdin  *os.File
	stdout *os.File
	stderr *os.File
}

// spawn starts a command that dies with this program. Without input, standard input is /dev/null.
func spawn(argv, env []string, dir string, tty, input bool) (*process, error) {
	if len(argv) == 0 {
		return nil, fmt.Errorf("no command")
	}
	p := &process{cmd: exec.Command(argv[0], argv[1:]...)}
	p.cmd.Env, p.cmd.Dir = env, dir
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	var child []*os.File // the child's ends, closed here once it has them
	defer func() {
		for _, file := range child {
			file.Close()
		}
	}()
	if tty {
		ours, theirs, err := pty.Open()
		if err != nil {
			return nil, err
		}
		child = append(child, theirs)
		p.tty, p.stdin, p.stdout = ours, ours, ours
		p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = theirs, theirs, theirs
		p.cmd.SysProcAttr.Setctty = true
	} else {
		out, outW, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		errR, errW, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		child = append(child, outW, errW)
		p.stdout, p.cmd.Stdout, p.stderr, p.cmd.Stderr = out, outW, errR, errW
		if input {
			inR, inW, err := os.Pipe()
			if err != nil {
				return nil, err
			}
			child = append(child, inR)
			p.stdin, p.cmd.Stdin = inW, inR
		}
	}
	result := make(chan error)
	forks <- func() {
		aliveMu.Lock()
		defer aliveMu.Unlock()
		err := p.cmd.Start()
		if err == nil {
			alive[p.cmd.Process.Pid] = true
		}
		result <- err
	}
	if err := <-result; err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// signal reaches the whole group, as long as its leader has not been reaped and the number is therefore still ours.
func (p *process) signal(s syscall.Signal) {
	aliveMu.Lock()
	defer aliveMu.Unlock()
	if pid := p.cmd.Process.Pid; alive[pid] {
		_ = syscall.Kill(-pid, s)
	}
}

// wait returns the exit code, 128 + n for signal n, once the leader has ended; the rest of its group is killed then.
func (p *process) wait() int {
	pid := p.cmd.Process.Pid
	for unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	p.signal(syscall.SIGKILL)
	aliveMu.Lock()
	delete(alive, pid)
	aliveMu.Unlock()
	_ = p.cmd.Wait()
	status := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

func (p *process) close() {
	for _, file := range []*os.File{p.stdin, p.stdout, p.stderr} {
		if file != nil {
			file.Close()
		}
	}
}

func (p *process) resize(sizes <-chan remotecommand.TerminalSize) {
	for size := range sizes {
		if p.tty != nil && size.Height > 0 && size.Width > 0 {
			_ = pty.Setsize(p.tty, &pty.Winsize{Rows: size.Height, Cols: size.Width})
		}
	}
}

func killAll() {
	aliveMu.Lock() // never released: nothing is started or signalled after this
	for pid := range alive {
		_ = syscall.Kill(-pid, syscall.SIGKILL)
	}
}

// ExecInContainer runs one command for as long as its stream lasts. Output is passed on to the last byte, however slow
// the reader is.
func (c *container) ExecInContainer(ctx context.Context, _, _, _ string, argv []string, in io.Reader,
	out, errOut io.WriteCloser, tty bool, sizes <-chan remotecommand.TerminalSize, _ time.Duration) error {
	if c.life != nil {
		into := c.life.entry(c.spec)
		into.Target, into.Argv = c.process.cmd.Process.Pid, argv
		argv = into.argv()
	}
	p, err := spawn(argv, c.env(tty), c.dir, tty, in != nil)
	if err != nil {
		return err
	}
	defer p.close()
	defer context.AfterFunc(ctx, func() { p.signal(syscall.SIGKILL) })()
	if sizes != nil {
		go p.resize(sizes)
	}
	if in != nil {
		go func() {
			_, _ = io.Copy(p.stdin, in)
			if p.tty == nil {
				p.stdin.Close()
			}
		}()
	}
	var outputs sync.WaitGroup
	copyOut := func(to io.Writer, from *os.File) {
		if from == nil {
			return
		}
		if to == nil {
			to = io.Discard
		}
		outputs.Go(func() {
			// The end of a terminal is EIO. A reader that is gone ends the process, by SIGPIPE or at the next read.
			_, _ = io.Copy(to, from)
			from.Close()
		})
	}
	copyOut(out, p.stdout)
	copyOut(errOut, p.stderr)
	code := p.wait()
	outputs.Wait()
	if code != 0 {
		return utilexec.CodeExitError{Err: fmt.Errorf("exit code %d", code), Code: code}
	}
	return nil
}

// AttachContainer joins the container's main process: output from now on, and input if the container takes any.
func (c *container) AttachContainer(ctx context.Context, _, _, _ string, in io.Reader, out, errOut io.WriteCloser,
	_ bool, sizes <-chan remotecommand.TerminalSize) error {
	defer c.stdout.add(out)()
	defer c.stderr.add(errOut)()
	if sizes != nil {
		go c.process.resize(sizes)
	}
	if in != nil && c.process.stdin != nil {
		go func() {
			_, _ = io.Copy(c.process.stdin, in)
			if c.spec.StdinOnce && c.process.tty == nil {
				c.process.stdin.Close()
			}
		}()
	}
	select {
	case <-c.done:
	case <-ctx.Done():
	}
	return nil
}

// fan copies output to everyone attached, at the pace of the slowest. Someone who is gone is forgotten.
type fan struct {
	mu sync.Mutex
	to map[io.Writer]bool
}

func (f *fan) add(w io.Writer) (remove func()) {
	if w == nil {
		return func() {}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.to == nil {
		f.to = map[io.Writer]bool{}
	}
	f.to[w] = true
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.to, w)
	}
}

func (f *fan) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for w := range f.to {
		if _, err := w.Write(b); err != nil {
			delete(f.to, w)
		}
	}
	return len(b), nil
}
