// The front stands before an API server and answers what would make that the limit of a measurement: commands in pods
// whose name begins with `front` (a WebSocket with the output that -output says, and Success), and the list at -list,
// which it has asked for once. All else goes on to the API server as it is.
//
//	front -server URL -root-certs PEM -cert PEM -key PEM -output TEXT -list PATH
//
// It says the port of loopback on which it listens, in a line of its own.
package main

import (
	"crypto/sha1"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	deadline = 30 * time.Second
	portion  = 100 << 10 // what an API server that encodes a list object by object writes at a time here
	guid     = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
	success  = `{"metadata":{},"status":"Success"}`
)

func main() {
	server := flag.String("server", "", "https://host:port of the API server")
	roots := flag.String("root-certs", "", "its CA")
	certificate := flag.String("cert", "", "certificate of the front")
	key := flag.String("key", "", "its key")
	output := flag.String("output", "", "what commands say")
	list := flag.String("list", "", "path of the list")
	flag.Parse()

	behind, err := url.Parse(*server)
	fail(err)
	pem, err := os.ReadFile(*roots)
	fail(err)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableCompression: true, MaxIdleConnsPerHost: 64}
	proxy := httputil.NewSingleHostReverseProxy(behind)
	proxy.Transport = transport
	var once sync.Once
	var listed []byte
	handler := func(answer http.ResponseWriter, request *http.Request) {
		switch path := request.URL.Path; {
		case strings.Contains(path, "/pods/front") && strings.HasSuffix(path, "/exec"):
			execute(answer, request, *output)
		case path == *list && request.URL.RawQuery == "":
			once.Do(func() {
				asked, err := http.NewRequest("GET", *server+path, nil)
				fail(err)
				asked.Header = request.Header.Clone()
				got, err := transport.RoundTrip(asked)
				fail(err)
				listed, err = io.ReadAll(got.Body)
				fail(err)
			})
			answer.Header().Set("Content-Type", "application/json")
			for rest := listed; len(rest) > 0; rest = rest[min(portion, len(rest)):] {
				if _, err := answer.Write(rest[:min(portion, len(rest))]); err != nil {
					return
				}
			}
		default:
			proxy.ServeHTTP(answer, request)
		}
	}
	pair, err := tls.LoadX509KeyPair(*certificate, *key)
	fail(err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	fail(err)
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	settings := &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}}
	fail((&http.Server{Handler: http.HandlerFunc(handler)}).Serve(tls.NewListener(listener, settings)))
}

// execute answers as kube-apiserver does: the switch, the output, the status and the end are writes of their own.
func execute(answer http.ResponseWriter, request *http.Request, output string) {
	connection, buffered, err := http.NewResponseController(answer).Hijack()
	if err != nil {
		return
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(deadline))
	sum := sha1.Sum([]byte(request.Header.Get("Sec-WebSocket-Key") + guid))
	_, err = fmt.Fprintf(connection, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
		"Sec-WebSocket-Accept: %s\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n",
		base64.StdEncoding.EncodeToString(sum[:]))
	for _, frame := range []string{"\x82" + sized("\x01"+output), "\x82" + sized("\x03"+success), "\x88" + sized("\x03\xe8")} {
		if err != nil {
			return
		}
		_, err = connection.Write([]byte(frame))
	}
	io.Copy(io.Discard, buffered) // until the caller has ended it
}

func sized(payload string) string { return string(rune(len(payload))) + payload }

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "front:", err)
		os.Exit(1)
	}
}
