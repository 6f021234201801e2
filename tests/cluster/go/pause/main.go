// Command pause is the first process of a pod's sandbox: it holds the pod's namespaces open until it is told to stop.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	// An ignored SIGCHLD makes the kernel reap the orphans that a shared process namespace leaves to PID 1.
	signal.Ignore(syscall.SIGCHLD)
	// PID 1 has no default action for these: without a handler every pod deletion would wait out its grace period.
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	<-stop
}
