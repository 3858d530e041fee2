package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// calmWrites are acknowledged before a fault, so that it hits a system at work, ...
	calmWrites = 300
	// ... and recoveredWrites after it, which shows that the system is at work again.
	recoveredWrites = 500
	// recoveryPatience is for an election, for kube-apiserver to dial again, and for slow machines.
	recoveryPatience = 60 * time.Second
)

// killLeaderUnderLoad leaves the leader dead; restartKilledNode brings it back.
func (h *harness) killLeaderUnderLoad(ctx context.Context) (string, error) {
	before, err := h.dump(ctx)
	if err != nil {
		return "", err
	}
	l, err := h.startLoad(ctx, namespaceLoad1)
	if err != nil {
		return "", err
	}
	if err := l.waitForMoreWrites(ctx, calmWrites, recoveryPatience); err != nil {
		return "", err
	}
	leader, err := h.cluster.leader(ctx)
	if err != nil {
		return "", err
	}
	leader.process.kill()
	killed := time.Now()
	successor, err := h.cluster.leader(ctx)
	if err != nil {
		return "", err
	}
	elected := time.Since(killed)
	if err := l.waitForMoreWrites(ctx, recoveredWrites, recoveryPatience); err != nil {
		return "", err
	}
	detail, err := l.halt(ctx, h.cluster, successor)
	if err != nil {
		return "", err
	}
	after, err := h.dump(ctx)
	if err != nil {
		return "", err
	}
	if err := compareDumps(before, withoutNamespace(after, namespaceLoad1)); err != nil {
		return "", err
	}
	if err := h.compareNodes(ctx, after); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s killed, %s found to lead after %.1f s; %s", leader.name, successor.name, elected.Seconds(), detail), nil
}

// withoutNamespace leaves out what a load wrote.
func withoutNamespace(objects map[string]dumpedObject, namespace string) map[string]dumpedObject {
	rest := map[string]dumpedObject{}
	for key, object := range objects {
		if !strings.Contains(key, "/"+namespace+"/") {
			rest[key] = object
		}
	}
	return rest
}

func (h *harness) restartKilledNode(ctx context.Context) (string, error) {
	var killed *node
	for _, n := range h.cluster.nodes {
		if !n.process.running() {
			killed = n
		}
	}
	if killed == nil {
		return "", errors.New("no node was killed")
	}
	begin := time.Now()
	if err := h.cluster.start(ctx, killed); err != nil {
		return "", err
	}
	serving := time.Since(begin)
	revision, err := h.cluster.waitCaughtUp(ctx, killed, recoveryPatience)
	if err != nil {
		return "", err
	}
	caughtUp := time.Since(begin)
	// A read that asks nobody else must show what was written while the node was dead.
	err = killed.withClient(func(client *clientv3.Client) error {
		response, err := client.Get(ctx, "/registry/configmaps/"+namespaceLoad1+"/", clientv3.WithPrefix(), clientv3.WithSerializable(), clientv3.WithCountOnly())
		if err != nil {
			return err
		}
		if response.Header.Revision < revision || response.Count == 0 {
			return fmt.Errorf("a serializable read answers revision %d with %d keys, want revision %d or later", response.Header.Revision, response.Count, revision)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	objects, err := h.dumpEventually(ctx, recoveryPatience)
	if err != nil {
		return "", err
	}
	if err := h.compareNodes(ctx, objects); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s serves after %.1f s and has caught up after %.1f s", killed.name, serving.Seconds(), caughtUp.Seconds()), nil
}

func (h *harness) restartAllGracefully(ctx context.Context) (string, error) {
	before, err := h.dump(ctx)
	if err != nil {
		return "", err
	}
	begin := time.Now()
	err = inParallel(clusterSize, clusterSize, func(i int) error {
		return h.cluster.nodes[i].process.terminate(30 * time.Second)
	})
	if err != nil {
		return "", err
	}
	stopped := time.Since(begin)
	begin = time.Now()
	if err := h.cluster.start(ctx, h.cluster.nodes...); err != nil {
		return "", err
	}
	serving := time.Since(begin)
	after, err := h.compareAfterRestart(ctx, before, "")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("stopped in %.1f s, serving after %.1f s, %d objects as before", stopped.Seconds(), serving.Seconds(), len(after)), nil
}

func (h *harness) killAllUnderLoad(ctx context.Context) (string, error) {
	before, err := h.dump(ctx)
	if err != nil {
		return "", err
	}
	l, err := h.startLoad(ctx, namespaceLoad2)
	if err != nil {
		return "", err
	}
	if err := l.waitForMoreWrites(ctx, calmWrites, recoveryPatience); err != nil {
		return "", err
	}
	// At once: nobody may learn from anybody that the others are gone.
	if err := inParallel(clusterSize, clusterSize, func(i int) error {
		h.cluster.nodes[i].process.kill()
		return nil
	}); err != nil {
		return "", err
	}
	begin := time.Now()
	if err := h.cluster.start(ctx, h.cluster.nodes...); err != nil {
		return "", err
	}
	serving := time.Since(begin)
	if err := l.waitForMoreWrites(ctx, recoveredWrites, recoveryPatience); err != nil {
		return "", err
	}
	detail, err := l.halt(ctx, h.cluster, h.cluster.nodes[0])
	if err != nil {
		return "", err
	}
	if _, err := h.compareAfterRestart(ctx, before, namespaceLoad2); err != nil {
		return "", err
	}
	return fmt.Sprintf("serving after %.1f s; %s", serving.Seconds(), detail), nil
}

// compareAfterRestart wants everything as it was, except in the namespace that a load writes to, in the API and on every
// node, and kube-apiserver ready.
func (h *harness) compareAfterRestart(ctx context.Context, before map[string]dumpedObject, exceptNamespace string) (map[string]dumpedObject, error) {
	if err := h.apiServer.waitReady(ctx, recoveryPatience); err != nil {
		return nil, err
	}
	after, err := h.dumpEventually(ctx, recoveryPatience)
	if err != nil {
		return nil, err
	}
	compared := after
	if exceptNamespace != "" {
		compared = withoutNamespace(after, exceptNamespace)
	}
	if err := compareDumps(before, compared); err != nil {
		return nil, err
	}
	return after, h.compareNodes(ctx, after)
}
