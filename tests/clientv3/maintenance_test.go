//go:build maintenance

package clientv3

// Calls of the Maintenance service that raft-sqlite answers with Unimplemented so far: run them with -tags maintenance.

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

func TestMoveLeaderAskedOfAFollower(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		status, err := s.Status(s.ctx, s.endpoint)
		if err != nil {
			t.Fatal(err)
		}
		if status.Leader == status.Header.MemberId {
			t.Skip("this is the leader, and the other tests should not meet an election")
		}
		_, err = s.MoveLeader(s.ctx, status.Header.MemberId)
		wantError(t, err, rpctypes.ErrGRPCNotLeader)
	})
}

// All nodes hold the same.
func TestHashKV(t *testing.T) {
	throughOneEndpoint(t, func(t *testing.T, s *session) {
		for i := range 50 {
			s.put(t, fmt.Sprint(i%7), fmt.Sprint(i))
		}
		revision := s.delete(t, "3")
		var first uint32
		for i, endpoint := range endpoints(t) {
			if _, err := s.all[i].Get(s.ctx, s.key("k")); err != nil {
				t.Fatal(err)
			}
			response, err := s.all[i].HashKV(s.ctx, endpoint, revision)
			if err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				first = response.Hash
			}
			equal(t, "hash of "+endpoint, response.Hash, first)
			equal(t, "revision of the hash of "+endpoint, response.HashRevision, revision)
		}
		_, err := s.HashKV(s.ctx, s.endpoint, revision+1000)
		wantError(t, err, rpctypes.ErrGRPCFutureRev)
	})
}

// A snapshot ends with the SHA-256 of what comes before.
func TestSnapshot(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		reader, err := s.Snapshot(s.ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer reader.Close()
		content, err := io.ReadAll(reader)
		if err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		if len(content) <= sha256.Size {
			t.Fatalf("a snapshot of %d bytes", len(content))
		}
		body, sum := content[:len(content)-sha256.Size], content[len(content)-sha256.Size:]
		if want := sha256.Sum256(body); string(sum) != string(want[:]) {
			t.Errorf("the snapshot of %d bytes does not end with its checksum", len(content))
		}
	})
}
