// The receiver asks a Kubernetes API for much and says when what arrived: large lists, many watches at once, and
// commands in a pod, each on a connection of its own, as a kubectl has it.
//
//	receiver list  -server URL -path PATH -seconds N [-gzip] [-protobuf]
//	receiver watch -server URL -namespace NS -name NAME -count N -events N
//	receiver exec  -server URL -path PATH -seconds N -count N -output TEXT
//
// All take -cert, -key and -root-certs, PEM files, as vegeta does. The last line of standard output is JSON. `watch`
// says `open` once every watch is open, and begins to write when it reads a line.
package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"sort"
	"strings"
	"sync"
	"time"
)

const deadline = 30 * time.Second

func main() {
	if len(os.Args) < 2 {
		fail(fmt.Errorf("list, watch or exec?"))
	}
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	server := flags.String("server", "", "https://host:port")
	certificate := flags.String("cert", "", "client certificate")
	key := flags.String("key", "", "its key")
	roots := flags.String("root-certs", "", "CA of the server")
	path := flags.String("path", "", "what to list")
	seconds := flags.Float64("seconds", 2, "how long to list")
	zip := flags.Bool("gzip", false, "offer gzip, as kubectl does")
	proto := flags.Bool("protobuf", false, "ask for protobuf, as controllers do")
	namespace := flags.String("namespace", "default", "of the ConfigMap that is watched")
	name := flags.String("name", "watched", "of that ConfigMap, which exists")
	count := flags.Int("count", 500, "watches, or commands at a time")
	output := flags.String("output", "", "what a command says")
	events := flags.Int("events", 20, "writes, one after the other")
	flags.Parse(os.Args[2:])

	pair, err := tls.LoadX509KeyPair(*certificate, *key)
	fail(err)
	pem, err := os.ReadFile(*roots)
	fail(err)
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		fail(fmt.Errorf("%s: no certificate", *roots))
	}
	settings := &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool}
	client := func() *http.Client {
		// HTTP/1.1 and one connection each, at both: a watch is a connection.
		return &http.Client{Transport: &http.Transport{
			TLSClientConfig:    settings.Clone(),
			DisableCompression: true,
			ForceAttemptHTTP2:  false,
			TLSNextProto:       map[string]func(string, *tls.Conn) http.RoundTripper{},
			ReadBufferSize:     256 << 10,
		}}
	}
	var result any
	switch os.Args[1] {
	case "list":
		result = list(client(), *server+*path, time.Duration(*seconds*float64(time.Second)), *zip, *proto)
	case "watch":
		result = watch(client, *server, *namespace, *name, *count, *events)
	case "exec":
		result = execs(settings, *server, *path, *output, *count, time.Duration(*seconds*float64(time.Second)))
	default:
		fail(fmt.Errorf("list, watch or exec?"))
	}
	fail(json.NewEncoder(os.Stdout).Encode(result))
}

type listed struct {
	Requests    int     `json:"requests"`
	Seconds     float64 `json:"seconds"`
	FirstByte   float64 `json:"first_byte_s"`
	Bytes       int64   `json:"bytes"`
	WireBytes   int64   `json:"wire_bytes"`
	Compressed  bool    `json:"compressed"`
	SHA256      string  `json:"sha256"`
	Consistent  bool    `json:"consistent"`
	BytesPerOne int     `json:"bytes_per_list"`
}

// The list's own version moves whenever anything in the cluster is written; the objects' do not here. In protobuf it is
// field 2 of the list's metadata, and the lengths before it depend on it.
var (
	version         = regexp.MustCompile(`"resourceVersion":"[0-9]+"`)
	protobufVersion = regexp.MustCompile(`(?s)^k8s\x00.{0,100}?\x12[\x01-\x14][0-9]+`)
)

const protobuf = "application/vnd.kubernetes.protobuf"

func list(client *http.Client, url string, most time.Duration, zip, proto bool) listed {
	var buffer []byte
	result := listed{Consistent: true}
	began := time.Now()
	for round := 0; round == 0 || time.Since(began) < most; round++ {
		request, err := http.NewRequest("GET", url, nil)
		fail(err)
		request.Header.Set("Accept", "application/json")
		if proto {
			request.Header.Set("Accept", protobuf)
		}
		if zip {
			request.Header.Set("Accept-Encoding", "gzip")
		}
		start := time.Now()
		answer, err := client.Do(request)
		fail(err)
		first := time.Since(start)
		if answer.StatusCode != 200 {
			fail(fmt.Errorf("answered %s", answer.Status))
		}
		buffer = readInto(buffer[:0], answer.Body)
		took := time.Since(start)
		answer.Body.Close()
		// From here on nothing is timed.
		body := buffer
		compressed := answer.Header.Get("Content-Encoding") == "gzip"
		if compressed {
			reader, err := gzip.NewReader(bytes.NewReader(buffer))
			fail(err)
			body, err = io.ReadAll(reader)
			fail(err)
		}
		if proto != strings.HasPrefix(answer.Header.Get("Content-Type"), protobuf) {
			fail(fmt.Errorf("answered in %s", answer.Header.Get("Content-Type")))
		}
		expression := version
		if proto {
			expression = protobufVersion
		}
		place := expression.FindIndex(body[:min(len(body), 512)])
		if place == nil {
			fail(fmt.Errorf("a list without a version"))
		}
		body = body[place[1]:]
		hash := sha256.Sum256(body)
		sum := hex.EncodeToString(hash[:])
		if round == 0 {
			result.SHA256, result.Compressed, result.BytesPerOne = sum, compressed, len(body)
			began = time.Now() // the first one opened the connection
			continue
		}
		result.Consistent = result.Consistent && sum == result.SHA256
		result.Requests++
		result.Seconds += took.Seconds()
		result.FirstByte += first.Seconds()
		result.Bytes += int64(len(body))
		result.WireBytes += int64(len(buffer))
	}
	return result
}

func readInto(buffer []byte, from io.Reader) []byte {
	for {
		if len(buffer) == cap(buffer) {
			buffer = append(buffer, make([]byte, max(1<<20, cap(buffer)))...)[:len(buffer)]
		}
		count, err := from.Read(buffer[len(buffer):cap(buffer)])
		buffer = buffer[:len(buffer)+count]
		if err == io.EOF {
			return buffer
		}
		fail(err)
	}
}

type watched struct {
	Watches  int     `json:"watches"`
	Events   int     `json:"events"`
	Opened   float64 `json:"open_s"`
	P50      float64 `json:"p50_ms"`
	P99      float64 `json:"p99_ms"`
	AllP50   float64 `json:"all_p50_ms"`
	AllMost  float64 `json:"all_most_ms"`
	WriteP50 float64 `json:"write_p50_ms"`
}

type arrival struct {
	event string
	at    time.Time
}

func watch(client func() *http.Client, server, namespace, name string, count, events int) watched {
	object := fmt.Sprintf("%s/api/v1/namespaces/%s/configmaps/%s", server, namespace, name)
	writer := client()
	current := patch(writer, object, "none")
	url := fmt.Sprintf("%s/api/v1/namespaces/%s/configmaps?watch=1&fieldSelector=metadata.name%%3D%s&resourceVersion=%s",
		server, namespace, name, current)
	arrivals := make(chan arrival, count)
	began := time.Now()
	var opened sync.WaitGroup
	gate := make(chan struct{}, 16) // handshakes at once: opening them all together is another benchmark
	for range count {
		opened.Add(1)
		gate <- struct{}{}
		go func() {
			answer, err := client().Get(url)
			fail(err)
			if answer.StatusCode != 200 {
				fail(fmt.Errorf("a watch was answered %s", answer.Status))
			}
			<-gate
			opened.Done()
			reader := bufio.NewReader(answer.Body)
			for {
				line, err := reader.ReadSlice('\n')
				at := time.Now()
				fail(err)
				var event struct {
					Type   string
					Object struct{ Data map[string]string }
				}
				fail(json.Unmarshal(line, &event))
				if event.Type != "MODIFIED" {
					fail(fmt.Errorf("a watch said %s", event.Type))
				}
				arrivals <- arrival{event.Object.Data["event"], at}
			}
		}()
	}
	opened.Wait()
	result := watched{Watches: count, Events: events, Opened: time.Since(began).Seconds()}
	fmt.Println("open")
	bufio.NewReader(os.Stdin).ReadString('\n')
	var each, all, write []float64
	for number := range events {
		event := fmt.Sprint("event-", number)
		start := time.Now()
		done := make(chan float64, 1)
		go func() {
			patch(writer, object, event)
			done <- milliseconds(time.Since(start))
		}()
		last := 0.0
		late := time.After(deadline)
		for seen := 0; seen < count; seen++ {
			select {
			case one := <-arrivals:
				if one.event != event {
					fail(fmt.Errorf("a watch saw %q while %q was written", one.event, event))
				}
				took := milliseconds(one.at.Sub(start))
				each = append(each, took)
				last = max(last, took)
			case <-late:
				fail(fmt.Errorf("only %d of %d watches saw %s", seen, count, event))
			}
		}
		all = append(all, last)
		write = append(write, <-done)
		time.Sleep(20 * time.Millisecond)
	}
	sort.Float64s(each)
	sort.Float64s(all)
	sort.Float64s(write)
	result.P50, result.P99 = quantile(each, 0.5), quantile(each, 0.99)
	result.AllP50, result.AllMost = quantile(all, 0.5), all[len(all)-1]
	result.WriteP50 = quantile(write, 0.5)
	return result
}

type executed struct {
	Commands int     `json:"commands"`
	PerS     float64 `json:"per_s"`
	P50      float64 `json:"p50_ms"`
	P99      float64 `json:"p99_ms"`
}

// execs runs commands, `count` at a time and each worker the next when it has the end of one. All are checked.
func execs(settings *tls.Config, server, path, output string, count int, most time.Duration) executed {
	address := strings.TrimPrefix(server, "https://")
	settings = settings.Clone()
	settings.NextProtos = []string{"http/1.1"}
	var lock sync.Mutex
	var all []float64
	var workers sync.WaitGroup
	began := time.Now()
	for range count {
		workers.Go(func() {
			for time.Since(began) < most {
				start := time.Now()
				fail(execute(settings, address, path, output))
				took := milliseconds(time.Since(start))
				lock.Lock()
				all = append(all, took)
				lock.Unlock()
			}
		})
	}
	workers.Wait()
	took := time.Since(began).Seconds()
	sort.Float64s(all)
	return executed{len(all), float64(len(all)) / took, quantile(all, 0.5), quantile(all, 0.99)}
}

// execute runs one command over a WebSocket (RFC 6455) of the subprotocol v5.channel.k8s.io.
func execute(settings *tls.Config, address, path, output string) error {
	connection, err := tls.Dial("tcp", address, settings)
	if err != nil {
		return err
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(deadline))
	fmt.Fprintf(connection, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"+
		"Sec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n", path, address)
	reader := bufio.NewReader(connection)
	answer, err := http.ReadResponse(reader, nil)
	if err != nil {
		return err
	}
	if answer.StatusCode != 101 {
		text, _ := io.ReadAll(answer.Body)
		return fmt.Errorf("a command was answered %s: %s", answer.Status, text)
	}
	said := map[byte]string{}
	for {
		head := make([]byte, 2)
		if _, err := io.ReadFull(reader, head); err != nil {
			return err
		}
		size := int(head[1])
		if size == 126 {
			more := make([]byte, 2)
			if _, err := io.ReadFull(reader, more); err != nil {
				return err
			}
			size = int(more[0])<<8 | int(more[1])
		} else if size > 126 {
			return fmt.Errorf("a frame of a length that no command here has")
		}
		payload := make([]byte, size)
		if _, err := io.ReadFull(reader, payload); err != nil {
			return err
		}
		if head[0]&15 == 8 {
			break
		}
		if size > 0 {
			said[payload[0]] += string(payload[1:])
		}
	}
	if said[1] != output || !strings.Contains(said[3], `"status":"Success"`) {
		return fmt.Errorf("a command said %q and %q", said[1], said[3])
	}
	_, err = connection.Write([]byte{0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8})
	return err
}

// patch writes the event's name into the object and returns the object's new version.
func patch(client *http.Client, object, event string) string {
	body := fmt.Sprintf(`{"data":{"event":%q}}`, event)
	request, err := http.NewRequest("PATCH", object, strings.NewReader(body))
	fail(err)
	request.Header.Set("Content-Type", "application/merge-patch+json")
	answer, err := client.Do(request)
	fail(err)
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	fail(err)
	if answer.StatusCode != 200 {
		fail(fmt.Errorf("the write was answered %s: %s", answer.Status, text))
	}
	var written struct {
		Metadata struct{ ResourceVersion string }
	}
	fail(json.Unmarshal(text, &written))
	return written.Metadata.ResourceVersion
}

func milliseconds(duration time.Duration) float64 { return float64(duration.Microseconds()) / 1000 }

func quantile(sorted []float64, share float64) float64 {
	return sorted[min(len(sorted)-1, int(share*float64(len(sorted))))]
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "receiver:", err)
		os.Exit(1)
	}
}
