package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"strings"
	"sync"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
)

// services stand for kube-proxy and a load balancer: each Service with a node port is reached at that port of this
// machine's loopback, and each connection goes to one of its ready pods, in turn. Without one it is closed at once.
type services struct {
	node *node

	mu     sync.Mutex
	fronts map[string]*front // by namespace/name:port
}

// front is one node port.
type front struct {
	listener net.Listener
	service  *core.Service
	port     core.ServicePort
	turn     int
}

func (n *node) watchServices(ctx context.Context) error {
	s := &services{node: n, fronts: map[string]*front{}}
	informer := informers.NewSharedInformerFactory(n.client, 0).Core().V1().Services().Informer()
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(object any) { s.take(ctx, object.(*core.Service), false) },
		UpdateFunc: func(_, object any) { s.take(ctx, object.(*core.Service), false) },
		DeleteFunc: func(object any) {
			if last, ok := object.(cache.DeletedFinalStateUnknown); ok {
				object = last.Obj
			}
			s.take(ctx, object.(*core.Service), true)
		},
	})
	if err == nil {
		go informer.Run(ctx.Done())
	}
	return err
}

// take opens and closes the node ports of one Service, and gives a balancer its address.
func (s *services) take(ctx context.Context, service *core.Service, gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := service.Namespace + "/" + service.Name
	wanted := map[string]bool{}
	for _, port := range service.Spec.Ports {
		if gone || port.NodePort == 0 || port.Protocol != core.ProtocolTCP {
			continue
		}
		key := fmt.Sprintf("%s:%d", name, port.NodePort)
		wanted[key] = true
		if known := s.fronts[key]; known != nil {
			known.service, known.port = service, port
			continue
		}
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port.NodePort))
		if err != nil {
			log.Printf("service %s: %v", name, err)
			continue
		}
		s.fronts[key] = &front{listener: listener, service: service, port: port}
		go s.serve(ctx, s.fronts[key])
	}
	for key, known := range s.fronts {
		if strings.HasPrefix(key, name+":") && !wanted[key] {
			known.listener.Close()
			delete(s.fronts, key)
		}
	}
	if !gone && service.Spec.Type == core.ServiceTypeLoadBalancer && len(service.Status.LoadBalancer.Ingress) == 0 {
		status := map[string]any{"loadBalancer": map[string]any{"ingress": []map[string]string{{"ip": "127.0.0.1"}}}}
		patch, _ := json.Marshal(map[string]any{"status": status})
		if _, err := s.node.client.CoreV1().Services(service.Namespace).Patch(
			ctx, service.Name, types.MergePatchType, patch, meta.PatchOptions{}, "status"); err != nil {
			log.Printf("service %s: %v", name, err)
		}
	}
}

func (s *services) serve(ctx context.Context, f *front) {
	for {
		conn, err := f.listener.Accept()
		if err != nil {
			return
		}
		go func() {
			l, port := s.choose(f)
			if l == nil {
				conn.Close()
				return
			}
			there, err := l.sandbox.dial(ctx, port)
			if err != nil {
				conn.Close()
				return
			}
			connect(conn.(*net.TCPConn), there.(*net.TCPConn))
		}()
	}
}

// choose returns the next ready pod of a Service, and the port there.
func (s *services) choose(f *front) (*life, int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	selector := labels.SelectorFromSet(f.service.Spec.Selector)
	var found []*life
	s.node.mu.Lock()
	for _, p := range s.node.pods {
		l := p.life
		if l != nil && l.object.Namespace == f.service.Namespace && selector.Matches(labels.Set(l.object.Labels)) && l.isReady() {
			found = append(found, l)
		}
	}
	s.node.mu.Unlock()
	if len(found) == 0 {
		return nil, 0
	}
	f.turn++
	l := found[f.turn%len(found)]
	port := f.port.TargetPort.IntValue()
	for _, c := range l.object.Spec.Containers {
		for _, named := range c.Ports {
			if named.Name == f.port.TargetPort.StrVal && named.Name != "" {
				port = int(named.ContainerPort)
			}
		}
	}
	return l, port
}

func (l *life) isReady() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.object.Spec.Containers {
		if !l.states[c.Name].ready {
			return false
		}
	}
	return !l.stopping
}
