package main

import (
	"encoding/json"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sys/unix"
)

// entry says into what a process of an isolated container goes. The program starts itself as `node enter JSON`, goes
// there, and becomes the process; between fork and exec there is no other way for Go to do more than one thing.
type entry struct {
	Netns    string  `json:"netns"`            // path of the pod's network namespace
	Target   int     `json:"target,omitempty"` // a process of the container to join; 0 makes the container's file system
	Root     string  `json:"root,omitempty"`   // an empty directory for it
	Mounts   []mount `json:"mounts,omitempty"`
	ReadOnly bool    `json:"readOnly,omitempty"` // the root file system
	Program  string  `json:"program,omitempty"`  // what the image has, by its path here: its user must get there
	User     int     `json:"user"`
	Group    int     `json:"group"`
	Groups   []int   `json:"groups,omitempty"`
	NoMore   bool    `json:"noMore,omitempty"` // no_new_privs
	Dir      string  `json:"dir"`
	Argv     []string
}

// mount is one volume in a container. An empty source is a file system in memory.
type mount struct {
	Source   string `json:"source,omitempty"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// argv is how this program is started to become the process.
func (e *entry) argv() []string {
	text, _ := json.Marshal(e) // strings and numbers
	return []string{"/proc/self/exe", "enter", string(text)}
}

// enter does not return.
func enter(text string) {
	runtime.LockOSThread()
	log.SetFlags(0)
	var e entry
	err := json.Unmarshal([]byte(text), &e)
	if err == nil {
		err = e.become()
	}
	log.Fatalf("node: entering the container: %v", err)
}

func (e *entry) become() error {
	netns, err := unix.Open(e.Netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	if e.Target != 0 {
		err = e.join()
	} else {
		err = e.build()
	}
	if err != nil {
		return err
	}
	if err := unix.Setns(netns, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	if err := os.Chdir(e.Dir); err != nil {
		return err
	}
	program, err := exec.LookPath(e.Argv[0])
	if err != nil {
		return err
	}
	if e.NoMore {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return err
		}
	}
	if err := syscall.Setgroups(e.Groups); err != nil {
		return err
	}
	if err := syscall.Setgid(e.Group); err != nil {
		return err
	}
	if err := syscall.Setuid(e.User); err != nil {
		return err
	}
	// Another user's process has lost it.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return err
	}
	return syscall.Exec(program, e.Argv, os.Environ())
}

// join enters the file system of a process that is in the container already.
func (e *entry) join() error {
	root, err := unix.Open(fmt.Sprintf("/proc/%d/root", e.Target), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	space, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", e.Target), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	// A thread that shares its working directory with others may not change its mount namespace (setns(2)).
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	if err := unix.Setns(space, unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Fchdir(root); err != nil {
		return err
	}
	return unix.Chroot(".")
}

// build makes the container's file system: this machine's own as the lower layer, so that its programs are the image,
// with a layer in memory above it, and the volumes.
func (e *entry) build() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", e.Root, "tmpfs", 0, "mode=0755"); err != nil {
		return err
	}
	root := filepath.Join(e.Root, "root")
	for _, name := range []string{"upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(e.Root, name), 0o755); err != nil {
			return err
		}
	}
	layers := fmt.Sprintf("lowerdir=/,upperdir=%s/upper,workdir=%s/work", e.Root, e.Root)
	if err := unix.Mount("overlay", root, "overlay", 0, layers); err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	if err := e.admit(root); err != nil {
		return err
	}
	if err := unix.Mount("proc", filepath.Join(root, "proc"), "proc", 0, ""); err != nil {
		return fmt.Errorf("proc: %w", err)
	}
	if err := unix.Mount("/dev", filepath.Join(root, "dev"), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("dev: %w", err)
	}
	for _, m := range e.Mounts {
		if err := m.make(root); err != nil {
			return fmt.Errorf("volume at %s: %w", m.Target, err)
		}
	}
	if e.ReadOnly {
		if err := unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
			return err
		}
	}
	return unix.Chroot(root)
}

// admit lets every user get to the image's program, whatever the directories above it allow on this machine.
func (e *entry) admit(root string) error {
	if e.Program == "" {
		return nil
	}
	paths := []string{e.Program}
	if real, err := filepath.EvalSymlinks(e.Program); err == nil {
		paths = append(paths, real)
	}
	for _, path := range paths {
		for at := filepath.Dir(path); at != "/"; at = filepath.Dir(at) {
			info, err := os.Stat(filepath.Join(root, at))
			if err != nil { // on a file system of its own, which an overlay does not show
				continue
			}
			if err := os.Chmod(filepath.Join(root, at), info.Mode().Perm()|0o011); err != nil {
				return err
			}
		}
	}
	return otherFileSystems(root, paths)
}

// otherFileSystems binds those into the root on which one of the paths is.
func otherFileSystems(root string, paths []string) error {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		point := strings.Fields(line)[4]
		for _, path := range paths {
			if point != "/" && strings.HasPrefix(path, point+"/") {
				if err := unix.Mount(point, filepath.Join(root, point), "", unix.MS_BIND, ""); err != nil {
					return fmt.Errorf("%s: %w", point, err)
				}
				break
			}
		}
	}
	return nil
}

func (m mount) make(root string) error {
	// /var/run is a link to /run, which would lead out of the root.
	target, err := securejoin.SecureJoin(root, m.Target)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if m.Source == "" {
		return unix.Mount("tmpfs", target, "tmpfs", 0, "mode=1777")
	}
	if err := unix.Mount(m.Source, target, "", unix.MS_BIND, ""); err != nil || !m.ReadOnly {
		return err
	}
	return unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
}
