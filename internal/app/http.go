package app

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"golang.org/x/net/netutil"
)

// Bounds of every HTTP server.
const (
	httpHeader      = 16 << 10        // bytes of a request's headers
	httpBody        = 1 << 20         // bytes of a request's body; handlers set smaller bounds
	httpRead        = 5 * time.Second // of a whole request
	httpWrite       = 2 * time.Minute // of an answer, a profile included
	httpIdle        = httpRead        // between two requests: idle clients do not keep the health checks out
	httpConnections = 64              // of one listener; more wait to be accepted, and take no descriptor
)

// Listen binds the address that a setting names, and accepts at most httpConnections connections at a time.
func Listen(setting, address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", setting, err)
	}
	return netutil.LimitListener(l, httpConnections), nil
}

// ServeHTTP serves handler on l until ctx ends. Requests in flight then have five seconds.
func ServeHTTP(ctx context.Context, l net.Listener, handler http.Handler) error {
	server := &http.Server{
		Handler: http.MaxBytesHandler(handler, httpBody), MaxHeaderBytes: httpHeader,
		ReadHeaderTimeout: httpRead, ReadTimeout: httpRead, WriteTimeout: httpWrite, IdleTimeout: httpIdle,
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(l) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := server.Shutdown(stop); err != nil {
		return server.Close()
	}
	return nil
}
