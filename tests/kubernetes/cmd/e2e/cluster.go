package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// clusterSize is the smallest number of nodes of which one can be lost.
const clusterSize = 3

// node is one server with its fixed place on disk and on the network; process changes when it is restarted.
type node struct {
	name      string
	clientURL string
	argv      []string
	process   *process
}

// cluster is the storage under kube-apiserver.
type cluster struct {
	supervisor *supervisor
	nodes      []*node
}

// newCluster lays out the nodes without starting them.
func newCluster(s *supervisor, server []string, workDir string) (*cluster, error) {
	ports, err := freePorts(2 * clusterSize)
	if err != nil {
		return nil, err
	}
	var peers []string
	for i := range clusterSize {
		peers = append(peers, fmt.Sprintf("node%d=http://127.0.0.1:%d", i+1, ports[clusterSize+i]))
	}
	c := &cluster{supervisor: s}
	for i := range clusterSize {
		name := fmt.Sprintf("node%d", i+1)
		clientURL := fmt.Sprintf("http://127.0.0.1:%d", ports[i])
		peerURL := fmt.Sprintf("http://127.0.0.1:%d", ports[clusterSize+i])
		argv := append(append([]string{}, server...),
			"--name", name,
			"--data-dir", filepath.Join(workDir, name),
			"--listen-client-urls", clientURL,
			"--advertise-client-urls", clientURL,
			"--listen-peer-urls", peerURL,
			"--initial-advertise-peer-urls", peerURL,
			"--initial-cluster", strings.Join(peers, ","),
			// A restart uses the same command line, as a static pod does: the state on disk must win over these.
			"--initial-cluster-state", "new",
		)
		c.nodes = append(c.nodes, &node{name: name, clientURL: clientURL, argv: argv})
	}
	return c, nil
}

// freePorts picks from below the range out of which the kernel serves outgoing connections. Nodes are killed and
// restarted on the same port while hundreds of connections are being made: one of those must not get it in between.
func freePorts(count int) ([]int, error) {
	var ports []int
	taken := map[int]bool{}
	for range 1000 {
		if len(ports) == count {
			return ports, nil
		}
		port := 20000 + rand.IntN(12000)
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil || taken[port] {
			if err == nil {
				listener.Close()
			}
			continue
		}
		listener.Close()
		taken[port] = true
		ports = append(ports, port)
	}
	return nil, errors.New("no free ports between 20000 and 32000")
}

func (c *cluster) endpoints() []string {
	var endpoints []string
	for _, n := range c.nodes {
		endpoints = append(endpoints, n.clientURL)
	}
	return endpoints
}

// start runs the given nodes and waits until each of them serves linearizable reads.
func (c *cluster) start(ctx context.Context, nodes ...*node) error {
	for _, n := range nodes {
		p, err := c.supervisor.start(n.name, n.argv, nil)
		if err != nil {
			return err
		}
		n.process = p
	}
	for _, n := range nodes {
		if err := n.waitServing(ctx, 60*time.Second); err != nil {
			return err
		}
	}
	return nil
}

func (n *node) waitServing(ctx context.Context, patience time.Duration) error {
	return eventually(ctx, patience, fmt.Sprintf("%s to serve", n.name), func(ctx context.Context) error {
		if !n.process.running() {
			return permanent(fmt.Errorf("%s exited: %v", n.name, n.process.result))
		}
		status, err := n.status(ctx)
		if err != nil {
			return err
		}
		if status.Leader == 0 {
			return errors.New("no leader yet")
		}
		return n.withClient(func(client *clientv3.Client) error {
			_, err := client.Get(ctx, "e2e-is-this-thing-on")
			return err
		})
	})
}

// withClient makes a client for this node alone. It is a new one each time because a client that has seen its server die
// waits longer and longer before it dials again, and these tests want to know when the server is back.
func (n *node) withClient(use func(*clientv3.Client) error) error {
	client, err := clientv3.New(clientv3.Config{
		Endpoints:   []string{n.clientURL},
		DialTimeout: 2 * time.Second,
		// The client would print each failed attempt of a wait.
		Logger: zap.NewNop(),
	})
	if err != nil {
		return err
	}
	defer client.Close()
	return use(client)
}

func (n *node) status(ctx context.Context) (*clientv3.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	var status *clientv3.StatusResponse
	err := n.withClient(func(client *clientv3.Client) (err error) {
		status, err = client.Status(ctx, n.clientURL)
		return err
	})
	return status, err
}

// leader is the node that calls itself the leader.
func (c *cluster) leader(ctx context.Context) (*node, error) {
	var leader *node
	err := eventually(ctx, 20*time.Second, "a leader", func(ctx context.Context) error {
		for _, n := range c.nodes {
			if !n.process.running() {
				continue
			}
			status, err := n.status(ctx)
			if err != nil {
				return err
			}
			if status.Leader == status.Header.MemberId {
				leader = n
				return nil
			}
		}
		return errors.New("no node is the leader")
	})
	return leader, err
}

// waitCaughtUp waits until n has applied everything that the other running nodes had applied when this was called.
func (c *cluster) waitCaughtUp(ctx context.Context, n *node, patience time.Duration) (revision int64, err error) {
	var targetIndex uint64
	var targetRevision int64
	for _, other := range c.nodes {
		if other == n || !other.process.running() {
			continue
		}
		status, err := other.status(ctx)
		if err != nil {
			return 0, fmt.Errorf("status of %s: %w", other.name, err)
		}
		targetIndex = max(targetIndex, status.RaftAppliedIndex)
		targetRevision = max(targetRevision, status.Header.Revision)
	}
	err = eventually(ctx, patience, n.name+" to catch up", func(ctx context.Context) error {
		status, err := n.status(ctx)
		if err != nil {
			return err
		}
		if status.RaftAppliedIndex < targetIndex || status.Header.Revision < targetRevision {
			return fmt.Errorf("applied index %d of %d, revision %d of %d",
				status.RaftAppliedIndex, targetIndex, status.Header.Revision, targetRevision)
		}
		return nil
	})
	return targetRevision, err
}

// storedKey is what a node holds under a key.
type storedKey struct {
	createRevision, modRevision, version int64
	valueHash                            [sha256.Size]byte
}

// stored reads everything under the prefixes from this node's own state (a serializable read asks nobody else).
func (n *node) stored(ctx context.Context, prefixes []string) (map[string]storedKey, error) {
	keys := map[string]storedKey{}
	err := n.withClient(func(client *clientv3.Client) error {
		for _, prefix := range prefixes {
			response, err := client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithSerializable())
			if err != nil {
				return fmt.Errorf("reading %s from %s: %w", prefix, n.name, err)
			}
			if response.More || response.Count != int64(len(response.Kvs)) {
				return fmt.Errorf("reading %s from %s: %d keys, count %d, more %v", prefix, n.name, len(response.Kvs), response.Count, response.More)
			}
			for _, kv := range response.Kvs {
				keys[string(kv.Key)] = storedKey{kv.CreateRevision, kv.ModRevision, kv.Version, sha256.Sum256(kv.Value)}
			}
		}
		return nil
	})
	return keys, err
}
