package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// logLimit bounds a container's log. Older output is forgotten, also for a follower that far behind.
const logLimit = 64 << 20

type node struct {
	name    string
	root    string
	bind    bool
	isolate bool
	images  map[string][]string
	apiPort int
	client  kubernetes.Interface
	kubelet kubernetes.Interface // with the rights of a node alone

	mu   sync.Mutex
	pods map[string]*pod // by namespace/name
}

type pod struct {
	uid  types.UID
	life *life // of an isolating node

	mu         sync.Mutex
	containers map[string]*container
	ending     bool
}

func (p *pod) get(name string) *container {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.containers[name]
}

func (p *pod) put(c *container) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.containers[c.name] = c
}

// once is true the first time: of several that want to end the pod, one does.
func (p *pod) once() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	first := !p.ending
	p.ending = true
	return first
}

func (p *pod) all() []*container {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Collect(maps.Values(p.containers))
}

type container struct {
	name    string
	pod     string
	dir     string
	spec    core.Container
	life    *life // of an isolating node; its containers have their whole environment in fixedEnv
	process *process
	log     logBuffer
	stdout  fan
	stderr  fan
	started meta.Time
	done    chan struct{} // closed after the last byte of output; exit and ended are set then
	exit    int
	ended   meta.Time

	fixedEnv []string
}

func (n *node) find(namespace, name string) *pod {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pods[namespace+"/"+name]
}

// register creates the Node object; there is no lifecycle controller, so it needs no heartbeat.
func (n *node) register(ctx context.Context, port int32) error {
	object, err := n.client.CoreV1().Nodes().Create(ctx, &core.Node{ObjectMeta: meta.ObjectMeta{
		Name: n.name,
		Labels: map[string]string{
			"kubernetes.io/hostname": n.name, "kubernetes.io/os": "linux", "kubernetes.io/arch": goruntime.GOARCH,
		},
	}}, meta.CreateOptions{})
	if err != nil {
		return err
	}
	object.Status.Addresses = []core.NodeAddress{{Type: core.NodeInternalIP, Address: "127.0.0.1"}}
	object.Status.DaemonEndpoints.KubeletEndpoint.Port = port
	object.Status.NodeInfo.KubeletVersion = "v1.36.3"
	object.Status.Allocatable = core.ResourceList{ // a scheduler gives nothing to a node that has nothing
		core.ResourceCPU: resource.MustParse("64"), core.ResourceMemory: resource.MustParse("64Gi"),
		core.ResourcePods: resource.MustParse("110"),
	}
	object.Status.Capacity = object.Status.Allocatable
	object.Status.Conditions = []core.NodeCondition{{
		Type: core.NodeReady, Status: core.ConditionTrue, Reason: "KubeletReady",
		LastHeartbeatTime: meta.Now(), LastTransitionTime: meta.Now(),
	}}
	if object, err = n.client.CoreV1().Nodes().UpdateStatus(ctx, object, meta.UpdateOptions{}); err != nil {
		return err
	}
	// The API server taints a new node as not ready, which the node lifecycle controller would take away again.
	object.Spec.Taints = nil
	_, err = n.client.CoreV1().Nodes().Update(ctx, object, meta.UpdateOptions{})
	return err
}

// watch returns once the pods that exist have been seen.
func (n *node) watch(ctx context.Context) error {
	informer := informers.NewSharedInformerFactory(n.client, 0).Core().V1().Pods().Informer()
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(object any) { n.reconcile(ctx, object.(*core.Pod)) },
		UpdateFunc: func(_, object any) { n.reconcile(ctx, object.(*core.Pod)) },
		DeleteFunc: func(object any) {
			if last, ok := object.(cache.DeletedFinalStateUnknown); ok {
				object = last.Obj
			}
			n.forget(object.(*core.Pod))
		},
	})
	if err != nil {
		return err
	}
	go informer.Run(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		return ctx.Err()
	}
	return nil
}

// reconcile is called by one goroutine, pod after pod; nothing in it waits for a process.
func (n *node) reconcile(ctx context.Context, object *core.Pod) {
	key := object.Namespace + "/" + object.Name
	if object.Spec.NodeName == "" && n.bind && object.DeletionTimestamp == nil {
		binding := &core.Binding{ObjectMeta: meta.ObjectMeta{Name: object.Name, Namespace: object.Namespace, UID: object.UID}}
		binding.Target = core.ObjectReference{Kind: "Node", Name: n.name}
		if err := n.client.CoreV1().Pods(object.Namespace).Bind(ctx, binding, meta.CreateOptions{}); err != nil {
			log.Printf("binding %s: %v", key, err)
		}
		return
	}
	if object.Spec.NodeName != n.name {
		return
	}
	known := n.find(object.Namespace, object.Name)
	if known != nil && known.uid != object.UID { // deleted and created again, seen as one update
		if known.life != nil && known.once() {
			go known.life.finish(0)
		}
		known.signal(syscall.SIGKILL)
		known = nil
	}
	if object.DeletionTimestamp != nil {
		go n.terminate(ctx, object, known)
	} else if known == nil && (object.Status.Phase == core.PodPending || object.Status.Phase == "") {
		if n.isolate {
			n.begin(ctx, object)
		} else {
			n.start(ctx, object)
		}
	}
}

func (n *node) start(ctx context.Context, object *core.Pod) {
	p := &pod{uid: object.UID, containers: map[string]*container{}}
	var failure error
	for _, spec := range object.Spec.Containers {
		c := &container{
			name: spec.Name, pod: object.Name, spec: spec, done: make(chan struct{}), started: meta.Now(),
			dir: filepath.Join(n.root, object.Namespace, object.Name, spec.Name),
		}
		c.log.changed = make(chan struct{})
		if err := c.start(nil); err != nil {
			failure = fmt.Errorf("container %s: %w", c.name, err)
			break
		}
		p.put(c)
	}
	if failure != nil {
		log.Printf("starting %s/%s: %v", object.Namespace, object.Name, failure)
		p.signal(syscall.SIGKILL)
	}
	n.mu.Lock()
	n.pods[object.Namespace+"/"+object.Name] = p
	n.mu.Unlock()
	go func() {
		n.report(ctx, object, p, failure)
		for _, c := range p.all() {
			<-c.done
		}
		if failure == nil {
			n.report(ctx, object, p, nil)
		}
	}()
}

// start starts the container's process; `into` is where a container of an isolating node lives.
func (c *container) start(into *entry) error {
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	argv := append(append([]string{}, c.spec.Command...), c.spec.Args...)
	if into != nil {
		argv = into.argv()
	} else if len(argv) == 0 {
		argv = []string{"sleep", "infinity"}
	}
	var err error
	if c.process, err = spawn(argv, c.env(c.spec.TTY), c.dir, c.spec.TTY, c.spec.Stdin); err != nil {
		return err
	}
	var outputs sync.WaitGroup
	outputs.Go(func() { _, _ = io.Copy(io.MultiWriter(&c.log, &c.stdout), c.process.stdout) })
	if c.process.stderr != nil {
		outputs.Go(func() { _, _ = io.Copy(io.MultiWriter(&c.log, &c.stderr), c.process.stderr) })
	}
	go func() {
		code := c.process.wait()
		outputs.Wait()
		c.process.close()
		c.exit, c.ended = code, meta.Now()
		c.log.end()
		close(c.done)
	}()
	return nil
}

func (c *container) env(tty bool) []string {
	if c.life != nil {
		if tty {
			return append(slices.Clone(c.fixedEnv), "TERM=xterm")
		}
		return c.fixedEnv
	}
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.dir, "HOSTNAME=" + c.pod}
	if tty {
		env = append(env, "TERM=xterm")
	}
	for _, variable := range c.spec.Env {
		if variable.ValueFrom == nil {
			env = append(env, variable.Name+"="+variable.Value)
		}
	}
	return env
}

func (p *pod) signal(s syscall.Signal) {
	for _, c := range p.all() {
		c.process.signal(s)
	}
}

// terminate is what a kubelet does for a pod that is to be deleted: without it, kubectl delete would wait for ever.
func (n *node) terminate(ctx context.Context, object *core.Pod, known *pod) {
	if known != nil && known.life != nil {
		if !known.once() {
			return // it is being ended already
		}
		known.life.finish(time.Duration(*object.DeletionGracePeriodSeconds) * time.Second)
	} else if known != nil {
		known.signal(syscall.SIGTERM)
		grace := time.NewTimer(time.Duration(*object.DeletionGracePeriodSeconds) * time.Second)
		defer grace.Stop()
		for _, c := range known.all() {
			select {
			case <-c.done:
			case <-grace.C:
				known.signal(syscall.SIGKILL)
				<-c.done
			}
		}
	}
	now := int64(0)
	_ = n.client.CoreV1().Pods(object.Namespace).Delete(ctx, object.Name, meta.DeleteOptions{
		GracePeriodSeconds: &now, Preconditions: &meta.Preconditions{UID: &object.UID},
	}) // a second update may have been faster
}

func (n *node) forget(object *core.Pod) {
	n.mu.Lock()
	defer n.mu.Unlock()
	key := object.Namespace + "/" + object.Name
	if known := n.pods[key]; known != nil && known.uid == object.UID {
		if known.life != nil && known.once() { // deleted by force
			go known.life.finish(0)
		}
		known.signal(syscall.SIGKILL)
		delete(n.pods, key)
	}
}

// report writes the pod's status, as a patch: labels that another client changed meanwhile stay changed.
func (n *node) report(ctx context.Context, object *core.Pod, p *pod, failure error) {
	phase, ready := core.PodRunning, core.ConditionTrue
	statuses, running, failed := []core.ContainerStatus{}, 0, failure != nil
	for _, spec := range object.Spec.Containers {
		status := core.ContainerStatus{Name: spec.Name, Image: spec.Image, ImageID: spec.Image}
		c := p.get(spec.Name)
		switch {
		case c == nil:
			status.State.Waiting = &core.ContainerStateWaiting{Reason: "RunContainerError", Message: fmt.Sprint(failure)}
		case c.over():
			reason := "Completed"
			if c.exit != 0 {
				reason, failed = "Error", true
			}
			status.State.Terminated = &core.ContainerStateTerminated{
				ExitCode: int32(c.exit), Reason: reason, StartedAt: c.started, FinishedAt: c.ended,
			}
		default:
			running++
			yes := true
			status.Ready, status.Started = true, &yes
			status.State.Running = &core.ContainerStateRunning{StartedAt: c.started}
		}
		statuses = append(statuses, status)
	}
	if running < len(statuses) {
		ready = core.ConditionFalse
	}
	if failure != nil || running == 0 {
		if phase = core.PodSucceeded; failed {
			phase = core.PodFailed
		}
	}
	status := core.PodStatus{
		Phase: phase, HostIP: "127.0.0.1", HostIPs: []core.HostIP{{IP: "127.0.0.1"}},
		PodIP: "127.0.0.1", PodIPs: []core.PodIP{{IP: "127.0.0.1"}},
		StartTime: &object.CreationTimestamp, ContainerStatuses: statuses,
	}
	kinds := []core.PodConditionType{core.PodScheduled, core.PodInitialized, core.ContainersReady, core.PodReady}
	for _, kind := range kinds {
		value := ready
		if kind == core.PodScheduled || kind == core.PodInitialized {
			value = core.ConditionTrue
		}
		condition := core.PodCondition{Type: kind, Status: value, LastTransitionTime: meta.Now()}
		status.Conditions = append(status.Conditions, condition)
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": object.UID}, "status": status})
	if err == nil {
		err = n.patchStatus(ctx, object, patch)
	}
	if err != nil {
		log.Printf("reporting %s/%s: %v", object.Namespace, object.Name, err)
	}
}

func (n *node) patchStatus(ctx context.Context, object *core.Pod, patch []byte) error {
	_, err := n.client.CoreV1().Pods(object.Namespace).Patch(
		ctx, object.Name, types.MergePatchType, patch, meta.PatchOptions{}, "status")
	return err
}

func (c *container) over() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// logBuffer keeps the end of a container's output. Positions count from its first byte.
type logBuffer struct {
	mu      sync.Mutex
	data    []byte
	dropped int64
	ended   bool
	changed chan struct{} // closed and replaced at every write
}

func (b *logBuffer) Write(chunk []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.data = append(b.data, chunk...)
	if over := len(b.data) - logLimit; over > logLimit/4 { // in large steps, so that not every write copies it all
		b.data = append(make([]byte, 0, logLimit*3/2), b.data[over:]...)
		b.dropped += int64(over)
	}
	close(b.changed)
	b.changed = make(chan struct{})
	return len(chunk), nil
}

func (b *logBuffer) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
	close(b.changed)
}

// read returns a copy of what there is at a position, the position after it, and what to wait for: nil means the end.
func (b *logBuffer) read(at int64) (chunk []byte, next int64, changed <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	at = max(at, b.dropped)
	chunk = b.data[at-b.dropped:]
	chunk = bytes.Clone(chunk[:min(len(chunk), 64<<10)])
	if !b.ended {
		changed = b.changed
	}
	return chunk, at + int64(len(chunk)), changed
}

// tail returns the position of the last lines; a negative number means all.
func (b *logBuffer) tail(lines int64) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	at := len(b.data)
	if lines < 0 {
		return 0
	} else if lines == 0 || at == 0 {
		return b.dropped + int64(at)
	}
	if b.data[at-1] == '\n' {
		at--
	}
	for ; lines > 0 && at >= 0; lines-- {
		at = bytes.LastIndexByte(b.data[:at], '\n')
	}
	return b.dropped + int64(at+1)
}
