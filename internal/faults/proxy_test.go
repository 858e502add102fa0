package faults

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// frame is one message of a protocol, on its way through a proxy.
type frame struct {
	fromClient bool
	// kind is the first word or byte of the frame: PUB, HPUB, MSG and so on of NATS, the type byte of PostgreSQL.
	kind string
	// text is the subject of a NATS message, or the SQL of a PostgreSQL message: the statement that it parses or binds, a
	// simple query, or the tag of the command that it completes.
	text  string
	reply string // reply subject of a NATS message
	body  []byte // payload of a NATS message with its headers, or of a PostgreSQL message
	conn  *link
}

// link is one client's connection and what hooks remember about it.
type link struct {
	client, server net.Conn
	statements     map[string]string // SQL by the name of its prepared statement

	mu      sync.Mutex
	touched string // SQL since the last begin
}

// wrote reports whether the current transaction, or the last one, has sent SQL that contains a text.
func (l *link) wrote(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.touched, text)
}

func (l *link) close() {
	_ = l.client.Close() // both may be closed already
	_ = l.server.Close()
}

// hook sees each frame before it is forwarded. It returns whether to drop the frame, and what to do after it was
// forwarded; nil does nothing.
type hook func(f *frame) (drop bool, after func())

// proxy is between clients and one server.
type proxy struct {
	t        testing.TB
	upstream string
	listener net.Listener
	read     func(in *bufio.Reader, f *frame, first bool) (raw []byte, err error)
	serving  sync.WaitGroup

	mu    sync.Mutex
	links map[*link]bool
	hook  hook
	delay time.Duration // before each frame is forwarded
	mute  map[bool]bool // directions whose frames are dropped, by frame.fromClient
	ended bool
}

// natsProxy returns a proxy for a nats-server.
func natsProxy(t testing.TB, upstream string) *proxy {
	return newProxy(t, upstream, readNATS)
}

// postgresProxy returns a proxy for a PostgreSQL server.
func postgresProxy(t testing.TB, upstream string) *proxy {
	return newProxy(t, upstream, readPostgres)
}

func newProxy(t testing.TB, upstream string, read func(*bufio.Reader, *frame, bool) ([]byte, error)) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, upstream: upstream, listener: listener, read: read, links: map[*link]bool{}, mute: map[bool]bool{}}
	p.serving.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

func (p *proxy) address() string { return p.listener.Addr().String() }

func (p *proxy) close() {
	p.mu.Lock()
	p.ended = true
	p.mu.Unlock()
	_ = p.listener.Close()
	p.cut()
	p.serving.Wait()
}

// setHook shows each frame to h from now on; nil ends that.
func (p *proxy) setHook(h hook) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hook = h
}

// setDelay delays each frame.
func (p *proxy) setDelay(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = d
}

// silence drops what one side sends for a time, then cuts the connections, because bytes are missing.
func (p *proxy) silence(fromClient bool, d time.Duration) {
	set := func(on bool) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.mute[fromClient] = on
	}
	set(true)
	time.Sleep(d) // the length of the fault
	p.cut()
	set(false)
}

// cut closes all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.close()
	}
}

func (p *proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		p.serving.Go(func() { p.serve(client) })
	}
}

func (p *proxy) serve(client net.Conn) {
	server, err := net.DialTimeout("tcp", p.upstream, 5*time.Second)
	if err != nil {
		_ = client.Close()
		return
	}
	l := &link{client: client, server: server, statements: map[string]string{}}
	defer l.close()
	p.mu.Lock()
	if p.ended {
		p.mu.Unlock()
		return
	}
	p.links[l] = true
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.links, l)
		p.mu.Unlock()
	}()
	var both sync.WaitGroup
	both.Go(func() { p.relay(l, true); l.close() })
	both.Go(func() { p.relay(l, false); l.close() })
	both.Wait()
}

// relay forwards what one side of a link sends, frame by frame.
func (p *proxy) relay(l *link, fromClient bool) {
	from, to := l.server, l.client
	if fromClient {
		from, to = l.client, l.server
	}
	in := bufio.NewReaderSize(from, 64<<10)
	for first := true; ; first = false {
		f := &frame{fromClient: fromClient, conn: l}
		raw, err := p.read(in, f, first)
		if err != nil {
			return // the side has closed its connection
		}
		p.mu.Lock()
		h, delay, mute := p.hook, p.delay, p.mute[fromClient]
		p.mu.Unlock()
		var after func()
		if h != nil {
			var drop bool
			drop, after = h(f)
			mute = mute || drop
		}
		if delay > 0 {
			time.Sleep(delay) // the length of the fault
		}
		if !mute {
			if _, err := to.Write(raw); err != nil {
				return
			}
		}
		if after != nil {
			after()
		}
	}
}

// readNATS reads one frame of the NATS protocol: a line, and a payload if the line announces one.
func readNATS(in *bufio.Reader, f *frame, _ bool) ([]byte, error) {
	line, err := in.ReadBytes('\n')
	if err != nil {
		return nil, err
	}
	words := strings.Fields(string(line))
	if len(words) == 0 {
		return line, nil
	}
	f.kind = strings.ToUpper(words[0])
	// PUB subject [reply] size; MSG subject sid [reply] size. HPUB and HMSG have the size of the headers before the size.
	words = words[1:]
	fixed, replyAt := 2, 1
	switch f.kind {
	case "PUB":
	case "HPUB":
		fixed = 3
	case "MSG":
		fixed, replyAt = 3, 2
	case "HMSG":
		fixed, replyAt = 4, 2
	default:
		return line, nil
	}
	if len(words) < fixed {
		return nil, fmt.Errorf("not a NATS frame: %q", line)
	}
	size, err := strconv.Atoi(words[len(words)-1])
	if err != nil {
		return nil, fmt.Errorf("not a NATS frame: %q", line)
	}
	f.text = words[0]
	if len(words) > fixed {
		f.reply = words[replyAt]
	}
	raw := append(line, make([]byte, size+2)...)
	if _, err := io.ReadFull(in, raw[len(line):]); err != nil {
		return nil, err
	}
	f.body = raw[len(line) : len(raw)-2]
	return raw, nil
}

// readPostgres reads one frame of the PostgreSQL protocol. A client's first frame has no type.
func readPostgres(in *bufio.Reader, f *frame, first bool) ([]byte, error) {
	head := 5
	if first && f.fromClient {
		head = 4
	}
	raw := make([]byte, head)
	if _, err := io.ReadFull(in, raw); err != nil {
		return nil, err
	}
	size := int(binary.BigEndian.Uint32(raw[head-4:])) - 4
	if size < 0 || size > 1<<30 {
		return nil, fmt.Errorf("a frame of %d bytes", size)
	}
	raw = append(raw, make([]byte, size)...)
	if _, err := io.ReadFull(in, raw[head:]); err != nil {
		return nil, err
	}
	if head == 4 {
		f.kind = "startup"
		return raw, nil
	}
	f.kind, f.body = string(raw[:1]), raw[5:]
	texts := bytes.SplitN(raw[5:], []byte{0}, 3)
	l := f.conn
	switch {
	case f.fromClient && f.kind == "Q":
		f.text = string(texts[0])
	case f.fromClient && f.kind == "P" && len(texts) == 3: // name, SQL
		f.text = string(texts[1])
		l.statements[string(texts[0])] = f.text
	case f.fromClient && f.kind == "B" && len(texts) == 3: // portal, name
		f.text = l.statements[string(texts[1])]
	case !f.fromClient && f.kind == "C":
		f.text = string(texts[0])
	}
	if f.fromClient && f.text != "" {
		l.mu.Lock()
		defer l.mu.Unlock()
		if strings.HasPrefix(f.text, "begin") {
			l.touched = ""
		}
		l.touched += f.text + "\n"
	}
	return raw, nil
}
