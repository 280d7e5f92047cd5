// Command client is what stands for the API server in front of Konnectivity's proxy-server: it listens on a local TCP
// port, and each connection becomes one TLS connection with a client certificate and one HTTP CONNECT to the target.
package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"time"
)

const (
	// What one read of the local socket may bring: four TLS records.
	bufferSize = 64 << 10
	// For the connection, both handshakes and the target's dial together.
	setupTimeout = 20 * time.Second
)

type client struct {
	proxy  string
	target string
	config *tls.Config
}

func main() {
	var listen, certificate, key, authority, serverName string
	c := &client{}
	flag.StringVar(&listen, "listen", "", "local address")
	flag.StringVar(&c.proxy, "proxy", "", "address of the proxy-server's frontend")
	flag.StringVar(&c.target, "target", "", "address that the agent dials")
	flag.StringVar(&certificate, "cert", "", "client certificate, PEM")
	flag.StringVar(&key, "key", "", "its key, PEM")
	flag.StringVar(&authority, "ca", "", "CA of the proxy-server, PEM")
	flag.StringVar(&serverName, "server-name", "", "name in the proxy-server's certificate")
	flag.Parse()

	pair, err := tls.LoadX509KeyPair(certificate, key)
	if err != nil {
		log.Fatal(err)
	}
	roots := x509.NewCertPool()
	pem, err := os.ReadFile(authority)
	if err != nil || !roots.AppendCertsFromPEM(pem) {
		log.Fatalf("no CA in %s: %v", authority, err)
	}
	c.config = &tls.Config{
		Certificates: []tls.Certificate{pair},
		RootCAs:      roots,
		ServerName:   serverName,
		// A handshake that resumes spares both ends signatures and certificates.
		ClientSessionCache: tls.NewLRUClientSessionCache(0),
		// Full records from the first on: on loopback small ones only cost.
		DynamicRecordSizingDisabled: true,
	}
	listener, err := net.Listen("tcp", listen)
	if err != nil {
		log.Fatal(err)
	}
	for {
		local, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go c.serve(local.(*net.TCPConn))
	}
}

// serve carries one connection until both directions have ended or one has failed.
func (c *client) serve(local *net.TCPConn) {
	defer local.Close()
	remote, answers, err := c.connect()
	if err != nil {
		log.Printf("%s: %v", c.target, err)
		return
	}
	defer remote.Close()
	down := make(chan struct{})
	go func() {
		defer close(down)
		if _, err := io.Copy(local, answers); err != nil {
			local.Close()
			return
		}
		local.CloseWrite()
	}()
	// Without ReadFrom and WriteTo, so that this buffer is used.
	type reader struct{ io.Reader }
	type writer struct{ io.Writer }
	if _, err := io.CopyBuffer(writer{remote}, reader{local}, make([]byte, bufferSize)); err != nil {
		remote.Close()
	} else {
		remote.CloseWrite()
	}
	<-down
}

// connect opens a tunnel; what comes from the target is read from the reader, which may hold the first of it.
func (c *client) connect() (*tls.Conn, *bufio.Reader, error) {
	plain, err := net.DialTimeout("tcp", c.proxy, setupTimeout)
	if err != nil {
		return nil, nil, err
	}
	remote := tls.Client(plain, c.config)
	remote.SetDeadline(time.Now().Add(setupTimeout))
	answers := bufio.NewReader(remote)
	if err = request(remote, answers, c.target); err != nil {
		plain.Close()
		return nil, nil, err
	}
	remote.SetDeadline(time.Time{})
	return remote, answers, nil
}

func request(remote io.Writer, answers *bufio.Reader, target string) error {
	if _, err := fmt.Fprintf(remote, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, target); err != nil {
		return err
	}
	response, err := http.ReadResponse(answers, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("the proxy-server answered %s", response.Status)
	}
	return nil
}
