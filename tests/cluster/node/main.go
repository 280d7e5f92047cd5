package main

import (
	_ "github.com/creack/pty"
	_ "k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

func main() {}
