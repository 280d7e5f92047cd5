// Command client is what stands for the API server in front of Konnectivity's proxy-server: it listens on a local TCP
// port, and each connection becomes one TLS connection with a client certificate and one HTTP CONNECT to the target.
package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
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
	// What one read of a socket may bring, and one write of the local one take.
	bufferSize = 64 << 10
	// The largest TLS record.
	recordSize = 16 << 10
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
	remote, err := c.connect()
	if err != nil {
		log.Printf("%s: %v", c.target, err)
		return
	}
	defer remote.Close()
	down := make(chan struct{})
	go func() {
		defer close(down)
		if remote.copyTo(local) != nil {
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

// tunnel is an open CONNECT.
type tunnel struct {
	*tls.Conn
	source *source
	first  *bufio.Reader // has what came behind the answer's head
}

// connect opens a tunnel.
func (c *client) connect() (*tunnel, error) {
	plain, err := net.DialTimeout("tcp", c.proxy, setupTimeout)
	if err != nil {
		return nil, err
	}
	t := &tunnel{source: &source{Conn: plain, kept: bufio.NewReaderSize(plain, bufferSize)}}
	t.Conn = tls.Client(t.source, c.config)
	t.SetDeadline(time.Now().Add(setupTimeout))
	t.first = bufio.NewReader(t.Conn)
	if err = request(t, t.first, c.target); err != nil {
		plain.Close()
		return nil, err
	}
	t.SetDeadline(time.Time{})
	return t, nil
}

// copyTo writes what comes through the tunnel, until its end. Konnectivity sends records of 4 KiB: those that have come
// together are written together.
func (t *tunnel) copyTo(local io.Writer) error {
	buffer := make([]byte, bufferSize)
	n, err := t.first.Read(buffer[:t.first.Buffered()])
	for err == nil {
		if n == 0 {
			n, err = t.Read(buffer)
		}
		t.source.dry = true
		for err == nil && len(buffer)-n >= recordSize {
			var more int
			more, err = t.Read(buffer[n:])
			n += more
		}
		t.source.dry = false
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = nil
		}
		if _, failed := local.Write(buffer[:n]); failed != nil {
			return failed
		}
		n = 0
	}
	if err == io.EOF {
		return nil
	}
	return err
}

// source reads a socket in large pieces. While dry is set it does not wait: it gives what it has and then a timeout,
// which does not end a TLS connection.
type source struct {
	net.Conn
	kept *bufio.Reader
	dry  bool
}

func (s *source) Read(p []byte) (int, error) {
	if s.dry && s.kept.Buffered() == 0 {
		return 0, os.ErrDeadlineExceeded
	}
	return s.kept.Read(p)
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
