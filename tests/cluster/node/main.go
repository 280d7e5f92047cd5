// Node is a kubelet for tests: pods bound to it run as local processes.
//
// It registers a Node object, watches pods, and serves the kubelet's HTTPS endpoints with the streaming code that real
// container runtimes use, so that exec, attach, logs, port-forward and cp meet the genuine SPDY and WebSocket servers.
// There is no image, no isolation and no restart: a container is its command, with a directory of its own as working
// directory, and a container without a command sleeps. Port N of every pod is port N of 127.0.0.1.
//
// With -isolate, pods are more than that (see life): a loopback and a file system of their own, volumes, the security
// context's user, init containers, probes, hooks and restarts. That needs root. A node that is alone also leads from
// outside to Services (see services).
//
// A program that holds the client certificate that the API server uses can run any command here, hence loopback only.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

const (
	// A stream may be silent as long as a person is: the kubelet's own default.
	idleTimeout     = 4 * time.Hour
	creationTimeout = 30 * time.Second
)

func main() {
	// PR_SET_PDEATHSIG follows the thread that forked, not the process. The main thread lives as long as the process,
	// so it does all the forking (see spawn).
	runtime.LockOSThread()
	if len(os.Args) == 3 && os.Args[1] == "enter" {
		enter(os.Args[2])
	}
	log.SetFlags(log.LstdFlags | log.Lmicroseconds)
	var (
		kubeconfig = flag.String("kubeconfig", "", "kubeconfig of a user who may write nodes and pods")
		name       = flag.String("name", "node-1", "name of the Node object")
		root       = flag.String("root", "", "directory under which containers get their working directories")
		certFile   = flag.String("tls-cert-file", "", "serving certificate for 127.0.0.1")
		keyFile    = flag.String("tls-private-key-file", "", "its key")
		clientCA   = flag.String("client-ca-file", "", "CA of the API server's kubelet client certificate")
		bind       = flag.Bool("bind", true, "be the scheduler: take pods that name no node")
		isolate    = flag.Bool("isolate", false, "give pods a network and a file system of their own, volumes, probes, restarts")
		images     = flag.String("images", "{}", "JSON: for a repository of images, the command of this machine that stands for it")
		apiPort    = flag.Int("api-port", 0, "port of the API server on 127.0.0.1, for isolated pods")
	)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	go func() {
		<-ctx.Done()
		killAll()
		os.Exit(0)
	}()

	n := &node{
		name: *name, root: *root, bind: *bind, isolate: *isolate, apiPort: *apiPort, pods: map[string]*pod{},
		images: map[string][]string{},
	}
	if err := json.Unmarshal([]byte(*images), &n.images); err != nil {
		log.Fatalf("node: -images: %v", err)
	}
	go func() {
		if err := n.run(ctx, *kubeconfig, *certFile, *keyFile, *clientCA); err != nil {
			killAll()
			log.Fatalf("node: %v", err)
		}
	}()
	for work := range forks {
		work()
	}
}

// run serves until the context ends; "ready PORT" on standard output says that requests and pods are being taken.
func (n *node) run(ctx context.Context, kubeconfig, certFile, keyFile, clientCA string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	config.QPS = -1 // no client-side queue: a test that adds fifty pods should not wait for it
	if n.client, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	kubelet := rest.CopyConfig(config)
	kubelet.Impersonate = rest.ImpersonationConfig{UserName: "system:node:" + n.name, Groups: []string{"system:nodes"}}
	if n.kubelet, err = kubernetes.NewForConfig(kubelet); err != nil {
		return err
	}
	certificate, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return err
	}
	pem, err := os.ReadFile(clientCA)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return fmt.Errorf("no certificate in %s", clientCA)
	}
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	listener := watchedListener{tls.NewListener(plain, &tls.Config{
		Certificates: []tls.Certificate{certificate},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    pool,
		NextProtos:   []string{"http/1.1"},
	})}
	server := &http.Server{
		Handler: n.routes(),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			ctx, c.(*watchedConn).gone = context.WithCancel(ctx)
			return ctx
		},
	}
	port := plain.Addr().(*net.TCPAddr).Port
	if err := n.register(ctx, int32(port)); err != nil {
		return fmt.Errorf("registering the node: %w", err)
	}
	if err := n.watch(ctx); err != nil {
		return fmt.Errorf("watching pods: %w", err)
	}
	if n.isolate && n.bind { // of several nodes none has all pods
		if err := n.watchServices(ctx); err != nil {
			return fmt.Errorf("watching services: %w", err)
		}
	}
	fmt.Printf("ready %d\n", port)
	return server.Serve(listener)
}

// routes are the kubelet's paths, with and without the pod's UID.
func (n *node) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	for _, uid := range []string{"", "{uid}/"} {
		mux.HandleFunc("/exec/{namespace}/{pod}/"+uid+"{container}", n.serveExec)
		mux.HandleFunc("/attach/{namespace}/{pod}/"+uid+"{container}", n.serveAttach)
	}
	mux.HandleFunc("/portForward/{namespace}/{pod}", n.servePortForward)
	mux.HandleFunc("/portForward/{namespace}/{pod}/{uid}", n.servePortForward)
	mux.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", n.serveLogs)
	return mux
}

func (n *node) serveExec(w http.ResponseWriter, r *http.Request) {
	c, options := n.streamRequest(w, r)
	if c == nil {
		return
	}
	remotecommand.ServeExec(w, r, c, r.PathValue("pod"), "", c.name, r.URL.Query()["command"], options,
		idleTimeout, creationTimeout, remotecommand.SupportedStreamingProtocols)
}

func (n *node) serveAttach(w http.ResponseWriter, r *http.Request) {
	c, options := n.streamRequest(w, r)
	if c == nil {
		return
	}
	remotecommand.ServeAttach(w, r, c, r.PathValue("pod"), "", c.name, options,
		idleTimeout, creationTimeout, remotecommand.SupportedStreamingProtocols)
}

func (n *node) servePortForward(w http.ResponseWriter, r *http.Request) {
	p := n.find(r.PathValue("namespace"), r.PathValue("pod"))
	if p == nil {
		http.Error(w, "pod does not exist", http.StatusNotFound)
		return
	}
	options, err := portforward.NewV4Options(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	portforward.ServePortForward(w, r, loopback{r.Context(), p}, r.PathValue("pod"), "", options,
		idleTimeout, creationTimeout, portforward.SupportedProtocols)
}

// serveLogs knows follow, tailLines and limitBytes; other options are ignored.
func (n *node) serveLogs(w http.ResponseWriter, r *http.Request) {
	c := n.container(w, r)
	if c == nil {
		return
	}
	query := r.URL.Query()
	number := func(key string) int64 {
		value, err := strconv.ParseInt(query.Get(key), 10, 64)
		if err != nil {
			return -1
		}
		return value
	}
	w.Header().Set("Content-Type", "text/plain")
	w.WriteHeader(http.StatusOK)
	flush := w.(http.Flusher).Flush
	flush() // a follower of a silent container sees its 200 now, not with the first line
	limit, at := number("limitBytes"), c.log.tail(number("tailLines"))
	for {
		chunk, next, changed := c.log.read(at)
		if at = next; limit >= 0 && int64(len(chunk)) > limit {
			chunk = chunk[:limit]
		}
		if _, err := w.Write(chunk); err != nil {
			return
		}
		flush()
		if limit >= 0 {
			if limit -= int64(len(chunk)); limit == 0 {
				return
			}
		}
		if len(chunk) > 0 {
			continue
		}
		if changed == nil || query.Get("follow") != "true" {
			return
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

func (n *node) streamRequest(w http.ResponseWriter, r *http.Request) (*container, *remotecommand.Options) {
	options, err := remotecommand.NewOptions(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return nil, nil
	}
	return n.container(w, r), options
}

func (n *node) container(w http.ResponseWriter, r *http.Request) *container {
	p := n.find(r.PathValue("namespace"), r.PathValue("pod"))
	if p == nil {
		http.Error(w, "pod does not exist", http.StatusNotFound)
		return nil
	}
	c := p.get(r.PathValue("container"))
	if c == nil {
		http.Error(w, fmt.Sprintf("container not found (%q)", r.PathValue("container")), http.StatusNotFound)
	}
	return c
}

// loopback forwards ports to 127.0.0.1. The library hands a context that never ends, so the request's is kept.
type loopback struct {
	request context.Context
	pod     *pod
}

func (l loopback) PortForward(_ context.Context, _, _ string, port int32, stream io.ReadWriteCloser) error {
	conn, err := l.dial(int(port))
	if err != nil {
		return err
	}
	defer context.AfterFunc(l.request, func() { conn.Close() })()
	defer conn.Close()
	go func() {
		_, _ = io.Copy(conn, stream)
		_ = conn.(*net.TCPConn).CloseWrite() // the client's end of file is not the end of the answer
	}()
	_, err = io.Copy(stream, conn)
	return err
}

func (l loopback) dial(port int) (net.Conn, error) {
	if l.pod.life != nil {
		return l.pod.life.sandbox.dial(l.request, port)
	}
	return (&net.Dialer{}).DialContext(l.request, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
}

// watchedListener hands out connections that cancel their requests' context when the peer is gone: net/http does that
// only until a connection is hijacked, and a process without input would otherwise outlive its stream.
type watchedListener struct{ net.Listener }

type watchedConn struct {
	net.Conn
	gone context.CancelFunc
}

func (l watchedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &watchedConn{Conn: conn, gone: func() {}}, nil
}

func (c *watchedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	// A timeout is net/http interrupting its own background read while it hijacks.
	if timeout, ok := err.(net.Error); err != nil && !(ok && timeout.Timeout()) {
		c.gone()
	}
	return n, err
}

// Close says goodbye and then reads on until the peer has closed as well, however slowly it reads. Closed before that,
// with something of the client's unread or yet to come (the end of its input, a ping), the kernel would answer by a reset,
// and what is still in its send buffer would be lost: the last line of every hundredth command, or the end of a copy.
func (c *watchedConn) Close() error {
	c.gone()
	conn := c.Conn.(*tls.Conn)
	err := conn.CloseWrite()
	_ = conn.NetConn().(*net.TCPConn).CloseWrite() // also where the goodbye found no room in the send buffer
	go func() {
		_ = c.SetReadDeadline(time.Now().Add(idleTimeout))
		_, _ = io.Copy(io.Discard, c.Conn)
		c.Conn.Close()
	}()
	return err
}
