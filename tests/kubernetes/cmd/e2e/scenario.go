package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// logTailLines of each process are shown when a step failed.
const logTailLines = 25

// harness is what the steps work with.
type harness struct {
	options
	supervisor *supervisor
	cluster    *cluster
	apiServer  *apiServer

	failures int
	begin    time.Time
	// eventsCreated is when the last Event of the scenario was made; they must be gone some time after.
	eventsCreated time.Time
}

// step is one named part of the scenario. What it returns beside the error is shown behind its name.
type step struct {
	name    string
	timeout time.Duration
	run     func(context.Context) (detail string, err error)
	// needed says that nothing after it makes sense when it failed.
	needed bool
}

func runScenario(ctx context.Context, opts options, apiServerBinary string) (status int) {
	h := &harness{options: opts, begin: time.Now()}
	logDir := filepath.Join(opts.workDir, "logs")
	if err := os.MkdirAll(logDir, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 2
	}
	fmt.Printf("server:         %s\nkube-apiserver: %s\nwork directory: %s\n", strings.Join(opts.server, " "), apiServerBinary, opts.workDir)

	h.supervisor = newSupervisor(logDir)
	defer func() { status = h.finish(ctx, status) }()

	var err error
	if h.cluster, err = newCluster(h.supervisor, opts.server, opts.workDir); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 2
	}
	h.apiServer, err = newAPIServer(h.supervisor, apiServerBinary, h.cluster.endpoints(), opts.workDir, opts.cacheCheckPeriod)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 2
	}

	minute := time.Minute
	steps := []step{
		{"start three nodes", 2 * minute, h.startNodes, true},
		{"start kube-apiserver and wait for /readyz", 3 * minute, h.startAPIServer, true},

		{"create namespaces", minute, h.createNamespaces, true},
		{"create Events with a time to live", minute, h.createEvents, false},
		{fmt.Sprintf("create %d ConfigMaps", opts.objects), 2 * minute, h.createConfigMaps, true},
		{"list in pages of 50 while one is added", minute, h.listInPages, false},
		{"watch while writing", minute, h.watchWhileWriting, false},
		{"custom resources", 2 * minute, h.customResources, false},
		{"server-side apply", minute, h.serverSideApply, false},
		{"strategic merge patch and merge patch", minute, h.patches, false},
		{"six nodes: register, update status, list as kubectl does", minute, h.kubernetesNodes, false},
		{"optimistic concurrency", minute, h.optimisticConcurrency, false},
		{"large objects", minute, h.largeObjects, false},
		{"renew Leases", minute, h.renewLeases, false},
		{"delete a collection", minute, h.deleteCollection, false},
		{"Events expire", 3 * minute, h.eventsExpire, false},
		{"the API and every node's storage agree", minute, h.compareEverywhere, false},

		{"kill -9 of the leader under load", 3 * minute, h.killLeaderUnderLoad, false},
		{"the killed node comes back and catches up", 2 * minute, h.restartKilledNode, true},
		{"SIGTERM to all nodes, start again", 3 * minute, h.restartAllGracefully, true},
		{"kill -9 of all nodes at once under load, start again", 3 * minute, h.killAllUnderLoad, true},
		{"the API and every node's storage agree at the end", minute, h.compareEverywhere, false},
		{"kube-apiserver's own checks of its cache", minute, h.cacheChecks, false},
	}
	for _, s := range steps {
		passed := h.run(ctx, s)
		for _, crash := range h.apiServer.takeCrashes() {
			fmt.Printf("FAIL           %s\n", crash)
			h.failures++
			if passed {
				h.supervisor.printLogTails(logTailLines)
			}
		}
		if ctx.Err() != nil {
			fmt.Printf("FAIL           stopped: %v\n", context.Cause(ctx))
			h.failures++
			break
		}
		if !passed && s.needed {
			fmt.Println("               (the rest needs this step and is left out)")
			break
		}
	}
	if h.failures > 0 {
		return 1
	}
	return 0
}

func (h *harness) run(ctx context.Context, s step) (passed bool) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.timeout, fmt.Errorf("the step took longer than %s", s.timeout))
	defer cancel()
	begin := time.Now()
	detail, err := s.run(ctx)
	verdict := "PASS"
	if err != nil {
		verdict = "FAIL"
		h.failures++
		if ctx.Err() != nil {
			err = errors.Join(err, context.Cause(ctx))
		}
	}
	fmt.Printf("%s %9.3fs %s", verdict, time.Since(begin).Seconds(), s.name)
	if detail != "" {
		fmt.Printf(": %s", detail)
	}
	fmt.Println()
	if err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			fmt.Printf("               %s\n", line)
		}
		// Now, because by the end of the run the logs are full of something else.
		h.supervisor.printLogTails(logTailLines)
	}
	return err == nil
}

// finish stops everything, says what happened and cleans up. It runs whatever went wrong before.
func (h *harness) finish(ctx context.Context, status int) int {
	if h.apiServer != nil {
		h.apiServer.close()
	}
	if err := h.supervisor.close(); err != nil {
		fmt.Printf("FAIL           clean-up: %v\n", err)
		status = max(status, 1)
	}
	if status != 0 {
		fmt.Printf("FAILED after %s (%d failures); everything is kept in %s\n", time.Since(h.begin).Round(time.Second), h.failures, h.workDir)
		return status
	}
	fmt.Printf("all steps passed in %s\n", time.Since(h.begin).Round(time.Second))
	if h.keep {
		fmt.Printf("kept: %s\n", h.workDir)
	} else if err := os.RemoveAll(h.workDir); err != nil {
		fmt.Println("e2e:", err)
	}
	return status
}

func (h *harness) startNodes(ctx context.Context) (string, error) {
	if err := h.cluster.start(ctx, h.cluster.nodes...); err != nil {
		return "", err
	}
	leader, err := h.cluster.leader(ctx)
	if err != nil {
		return "", err
	}
	status, err := leader.status(ctx)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s leads, version %s", leader.name, status.Version), nil
}

func (h *harness) startAPIServer(ctx context.Context) (string, error) {
	if err := h.apiServer.start(ctx); err != nil {
		return "", err
	}
	version, err := h.apiServer.kube.Discovery().ServerVersion()
	if err != nil {
		return "", err
	}
	return version.GitVersion, nil
}

// cacheChecks reads kube-apiserver's own verdict about its watch cache. It would have panicked on a difference; an "error"
// means that it could not compare, which is legitimate while the nodes are away.
func (h *harness) cacheChecks(ctx context.Context) (string, error) {
	const metric = "apiserver_storage_consistency_checks_total"
	passed, err := h.apiServer.metric(ctx, metric, `status="success"`)
	if err != nil {
		return "", err
	}
	failed, err := h.apiServer.metric(ctx, metric, `status="failure"`)
	if err != nil {
		return "", err
	}
	detail := fmt.Sprintf("%.0f passed, %.0f failed", passed, failed)
	if passed == 0 && h.cacheCheckPeriod == 0 {
		detail += " (the first one comes after 5 minutes; see --check-cache-every)"
	}
	if failed > 0 {
		return detail, errors.New("the watch cache differed from the storage")
	}
	if passed == 0 && h.cacheCheckPeriod > 0 {
		return detail, fmt.Errorf("no check ran although one was asked for every %s", h.cacheCheckPeriod)
	}
	return detail, nil
}
