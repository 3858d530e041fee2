// Command e2e runs a stock kube-apiserver on three nodes of an etcd-compatible server, puts it to work, and takes the
// nodes away from under it.
//
// It needs nothing but the command of the server:
//
//	go run ./cmd/e2e --server "/path/to/raft-sqlite serve"
//	go run ./cmd/e2e --server /path/to/etcd
//
// etcd's own flags (--name, --data-dir, --listen-client-urls, ...) are appended to that command, so a real etcd passes
// through exactly the same scenario: it is the reference when a step fails.
//
// kube-apiserver is built from its published module unless it is there already; --build-only does that and nothing else,
// and needs about ten minutes on two cores.
//
// What is checked is what a cluster's owner would lose sleep over: no acknowledged write is lost, a watch sees every
// change once and in order, lists are complete, and the data is the same after every kind of restart. The comparison is
// made twice, through kube-apiserver (mostly its watch cache) and in the storage of each node, because either alone could
// hide a fault of the other.
//
// The exit status is 0 if every step passed, 1 if one failed, 2 if the scenario could not be started.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// options are the command line.
type options struct {
	server           []string
	kubeAPIServer    string
	workDir          string
	objects          int
	keep             bool
	cacheCheckPeriod time.Duration
	timeout          time.Duration
}

func main() {
	os.Exit(mainWithStatus())
}

// mainWithStatus exists so that deferred clean-up runs before the process exits.
func mainWithStatus() int {
	var opts options
	var server string
	var buildOnly bool
	flag.StringVar(&server, "server", "", "command of the etcd-compatible server, arguments separated by spaces; etcd's flags are appended (required)")
	flag.StringVar(&opts.kubeAPIServer, "kube-apiserver", "", "kube-apiserver to run (default: $KUBEBUILDER_ASSETS/kube-apiserver, else the cached build, else it is built)")
	flag.StringVar(&opts.workDir, "work-dir", "", "directory for data, keys and logs (default: a temporary one)")
	flag.IntVar(&opts.objects, "objects", 500, "number of ConfigMaps to create, at least 100")
	flag.BoolVar(&opts.keep, "keep", false, "keep the work directory after a run that passed")
	flag.DurationVar(&opts.cacheCheckPeriod, "check-cache-every", 0, "run a kube-apiserver built with this period of its cache consistency check, such as 20s (default: the stock binary, whose period of 5 minutes is longer than this run)")
	flag.DurationVar(&opts.timeout, "timeout", 15*time.Minute, "bound of the whole run, without building kube-apiserver")
	flag.BoolVar(&buildOnly, "build-only", false, "build kube-apiserver into the cache if it is not there, print its path and exit")
	flag.Parse()
	opts.server = strings.Fields(server)

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	apiServerBinary, err := resolveKubeAPIServer(ctx, opts)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 2
	}
	if buildOnly {
		fmt.Println(apiServerBinary)
		return 0
	}
	if len(opts.server) == 0 || opts.objects < 100 || flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "e2e: --server is required, --objects is at least 100, and there are no other arguments")
		flag.Usage()
		return 2
	}
	if opts.workDir == "" {
		opts.workDir, err = os.MkdirTemp("", "raft-sqlite-e2e-")
	} else {
		err = os.MkdirAll(opts.workDir, 0o755)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 2
	}

	ctx, cancel := context.WithTimeout(ctx, opts.timeout)
	defer cancel()
	return runScenario(ctx, opts, apiServerBinary)
}
