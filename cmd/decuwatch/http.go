package main

import (
	"context"
	"net"
	"net/http"
	"time"

	"golang.org/x/net/netutil"
)

// Bounds of every HTTP server.
const (
	httpHeader      = 16 << 10        // bytes of a request's headers
	httpBody        = 1 << 20         // bytes of a request's body; handlers set closer bounds
	httpRead        = 5 * time.Second // of a whole request
	httpWrite       = 2 * time.Minute // of an answer, a profile included
	httpIdle        = time.Minute     // between two requests on a connection
	httpConnections = 64              // at once on one listener; others wait to be accepted, and take no descriptor
)

// bounded returns l with at most httpConnections connections at a time.
func bounded(l net.Listener) net.Listener { return netutil.LimitListener(l, httpConnections) }

// serveHTTP serves handler on l until ctx ends; requests under way are given five seconds.
func serveHTTP(ctx context.Context, l net.Listener, handler http.Handler) error {
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
