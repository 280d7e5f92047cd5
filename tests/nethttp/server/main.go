// An HTTPS server of Go's net/http that answers each request with what it parsed, and the same parsers beside it.
//
// It says its port in the first line of its output. Each line of its input is a command, each further line of its
// output the answer to one:
//
//	seen        the requests that came over the network since the last such command, once no connection is busy
//	requests    what the server reads when these bytes come on a connection, which then ends
//	response    what a client reads when these bytes answer its request with this method
//
// Texts of a peer are told byte for byte, as latin-1. It ends with its input.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"strconv"
	"sync"
	"time"
)

type request struct {
	Connection int64               `json:"connection"`
	Method     string              `json:"method"`
	Target     string              `json:"target"`
	Proto      string              `json:"proto"`
	Host       string              `json:"host"`
	Headers    map[string][]string `json:"headers"`
	Trailers   map[string][]string `json:"trailers"`
	Length     int64               `json:"length"`
	Encodings  []string            `json:"encodings"`
	Body       string              `json:"body"`
	Error      string              `json:"error"`
}

type response struct {
	Status   int                 `json:"status"`
	Interim  []int               `json:"interim"`
	Headers  map[string][]string `json:"headers"`
	Trailers map[string][]string `json:"trailers"`
	Length   int64               `json:"length"`
	Close    bool                `json:"close"`
	Body     string              `json:"body"`
	Error    string              `json:"error"`
}

type command struct {
	Do     string `json:"do"`
	Text   string `json:"text"`
	Method string `json:"method"`
}

// latin1 maps each byte to the code point of its number, so that JSON keeps it.
func latin1(text string) string {
	out := make([]rune, len(text))
	for i := 0; i < len(text); i++ {
		out[i] = rune(text[i])
	}
	return string(out)
}

func raw(text string) []byte {
	out := make([]byte, 0, len(text))
	for _, one := range text {
		out = append(out, byte(one))
	}
	return out
}

func told(header http.Header) map[string][]string {
	out := make(map[string][]string, len(header))
	for name, values := range header {
		for _, value := range values {
			out[latin1(name)] = append(out[latin1(name)], latin1(value))
		}
	}
	return out
}

// read takes a request's body and tells all of it.
func read(r *http.Request) request {
	body, err := io.ReadAll(r.Body)
	found := request{
		Method: latin1(r.Method), Target: latin1(r.RequestURI), Proto: r.Proto, Host: latin1(r.Host),
		Headers: told(r.Header), Trailers: told(r.Trailer), Length: r.ContentLength, Encodings: r.TransferEncoding,
		Body: latin1(string(body)),
	}
	if err != nil {
		found.Error = err.Error()
	}
	return found
}

type numberKey struct{}

// recorder keeps the requests of one server.
type recorder struct {
	mutex sync.Mutex
	seen  []request
	busy  map[net.Conn]bool
}

// changed learns of connections that are busy; one that has just been made is.
func (rec *recorder) changed(conn net.Conn, state http.ConnState) {
	rec.mutex.Lock()
	defer rec.mutex.Unlock()
	if state == http.StateNew || state == http.StateActive {
		rec.busy[conn] = true
	} else {
		delete(rec.busy, conn)
	}
}

// quiet waits until each connection is idle or over: until then a request may be read of which nothing is known.
func (rec *recorder) quiet() {
	for until := time.Now().Add(5 * time.Second); time.Now().Before(until); time.Sleep(100 * time.Microsecond) {
		rec.mutex.Lock()
		busy := len(rec.busy)
		rec.mutex.Unlock()
		if busy == 0 {
			return
		}
	}
}

func (rec *recorder) add(one request) {
	rec.mutex.Lock()
	defer rec.mutex.Unlock()
	rec.seen = append(rec.seen, one)
}

func (rec *recorder) take() []request {
	rec.mutex.Lock()
	defer rec.mutex.Unlock()
	found := rec.seen
	rec.seen = nil
	return found
}

// ServeHTTP answers with what was read; the query's `answer` says in which shape.
func (rec *recorder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	shape := query.Get("answer")
	if shape == "early" {
		w.Header().Set("Connection", "close")
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		fmt.Fprint(w, "early")
		rec.add(request{Method: r.Method, Target: latin1(r.RequestURI), Headers: told(r.Header), Error: "not read"})
		return
	}
	found := read(r)
	found.Connection, _ = r.Context().Value(numberKey{}).(int64)
	rec.add(found)
	told, err := json.Marshal(found)
	if err != nil {
		panic(err)
	}
	w.Header().Set("Content-Type", "application/json")
	switch shape {
	case "hints":
		w.Header().Set("Link", "</style.css>")
		w.WriteHeader(http.StatusEarlyHints)
	case "empty":
		w.WriteHeader(http.StatusNoContent)
		return
	case "unchanged":
		w.Header().Set("Etag", `"x"`)
		w.WriteHeader(http.StatusNotModified)
		return
	case "trailers":
		w.Header().Set("Trailer", "X-Sum")
		defer w.Header().Set("X-Sum", "1")
		fallthrough
	case "chunked":
		for _, one := range told {
			w.Write([]byte{one})
			if one == ',' {
				w.(http.Flusher).Flush()
			}
		}
		return
	case "abort":
		w.Header().Set("Content-Length", strconv.Itoa(len(told)))
		w.Write(told[:len(told)/2])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	case "abort chunk":
		w.Write(told)
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(told)))
	w.Write(told)
}

// tape is a connection on which bytes come and then the end; what is written is dropped.
type tape struct {
	from    io.Reader
	started chan struct{}
	once    sync.Once
	closed  chan struct{}
	closing sync.Once
}

func newTape(data []byte) *tape {
	return &tape{from: bytes.NewReader(data), started: make(chan struct{}), closed: make(chan struct{})}
}

func (t *tape) Read(into []byte) (int, error) {
	select {
	case <-t.started:
		return t.from.Read(into)
	case <-t.closed:
		return 0, net.ErrClosed
	}
}

func (t *tape) Write(data []byte) (int, error) {
	t.once.Do(func() { close(t.started) })
	return len(data), nil
}

func (t *tape) Close() error {
	t.closing.Do(func() { close(t.closed) })
	return nil
}

func (t *tape) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (t *tape) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (t *tape) SetDeadline(time.Time) error      { return nil }
func (t *tape) SetReadDeadline(time.Time) error  { return nil }
func (t *tape) SetWriteDeadline(time.Time) error { return nil }

// once is a listener with one connection.
type once struct {
	conn *tape
	used bool
}

func (o *once) Accept() (net.Conn, error) {
	if o.used {
		<-o.conn.closed
		return nil, net.ErrClosed
	}
	o.used = true
	return o.conn, nil
}

func (o *once) Close() error   { return nil }
func (o *once) Addr() net.Addr { return &net.TCPAddr{} }

func requests(data []byte) []request {
	rec := &recorder{}
	conn := newTape(data)
	conn.once.Do(func() { close(conn.started) })
	server := &http.Server{Handler: rec, ErrorLog: log.New(io.Discard, "", 0)}
	server.Serve(&once{conn: conn})
	return rec.take()
}

func answer(data []byte, method string) response {
	conn := newTape(data)
	transport := &http.Transport{
		DialContext:        func(context.Context, string, string) (net.Conn, error) { return conn, nil },
		DisableCompression: true,
	}
	defer transport.CloseIdleConnections()
	defer conn.Close()
	found := response{}
	trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
		found.Interim = append(found.Interim, code)
		return nil
	}}
	asked, err := http.NewRequestWithContext(
		httptrace.WithClientTrace(context.Background(), trace), method, "http://k/", nil)
	if err != nil {
		panic(err)
	}
	got, err := transport.RoundTrip(asked)
	if err != nil {
		found.Error = err.Error()
		return found
	}
	found.Status, found.Headers = got.StatusCode, told(got.Header)
	if got.StatusCode == http.StatusSwitchingProtocols {
		return found
	}
	body, err := io.ReadAll(got.Body)
	got.Body.Close()
	found.Trailers, found.Length, found.Close = told(got.Trailer), got.ContentLength, got.Close
	found.Body = latin1(string(body))
	if err != nil {
		found.Error = err.Error()
	}
	return found
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "error:", err)
	os.Exit(1)
}

func main() {
	certificate := flag.String("certificate", "", "PEM file")
	key := flag.String("key", "", "PEM file")
	flag.Parse()
	log.SetOutput(io.Discard) // what net/http's client says of hostile answers
	rec := &recorder{busy: map[net.Conn]bool{}}
	var count int64
	server := &http.Server{
		Handler:   rec,
		ConnState: rec.changed,
		ErrorLog:  log.New(io.Discard, "", 0),
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			count++ // called by the one accepting goroutine
			return context.WithValue(ctx, numberKey{}, count)
		},
	}
	server.Protocols = new(http.Protocols)
	server.Protocols.SetHTTP1(true)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fail(err)
	}
	go func() { fail(server.ServeTLS(listener, *certificate, *key)) }()
	out := json.NewEncoder(os.Stdout)
	out.Encode(map[string]int{"port": listener.Addr().(*net.TCPAddr).Port})
	in := bufio.NewReader(os.Stdin)
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return
		}
		var asked command
		if err := json.Unmarshal(line, &asked); err != nil {
			fail(err)
		}
		switch asked.Do {
		case "seen":
			rec.quiet()
			err = out.Encode(rec.take())
		case "requests":
			err = out.Encode(requests(raw(asked.Text)))
		case "response":
			err = out.Encode(answer(raw(asked.Text), asked.Method))
		default:
			fail(fmt.Errorf("unknown command %q", asked.Do))
		}
		if err != nil {
			fail(err)
		}
	}
}
