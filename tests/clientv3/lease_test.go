package clientv3

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// grant makes a lease that is revoked after the test.
func (s *session) grant(t *testing.T, ttl int64) clientv3.LeaseID {
	t.Helper()
	response, err := s.Grant(s.ctx, ttl)
	if err != nil {
		t.Fatalf("grant: %v", err)
	}
	t.Cleanup(func() { s.Revoke(s.ctx, response.ID) })
	return response.ID
}

// attached are the keys of a lease, in order. The server answers them in any.
func (s *session) attached(t *testing.T, client *clientv3.Client, id clientv3.LeaseID) string {
	t.Helper()
	response, err := client.TimeToLive(s.ctx, id, clientv3.WithAttachedKeys())
	if err != nil {
		t.Fatalf("time to live: %v", err)
	}
	var names []string
	for _, key := range response.Keys {
		names = append(names, strings.TrimPrefix(string(key), s.prefix))
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

func TestLeaseGrant(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		leases := pb.NewLeaseClient(s.ActiveConnection())
		before := s.revision(t)
		grant := func(id, ttl int64) (*pb.LeaseGrantResponse, error) {
			response, err := leases.LeaseGrant(s.ctx, &pb.LeaseGrantRequest{ID: id, TTL: ttl})
			if err == nil {
				t.Cleanup(func() { s.Revoke(s.ctx, clientv3.LeaseID(response.ID)) })
			}
			return response, err
		}
		seen := map[int64]bool{}
		for range 20 {
			response, err := grant(0, 600)
			if err != nil {
				t.Fatal(err)
			}
			if response.ID <= 0 || seen[response.ID] {
				t.Errorf("id %d is not a new positive number", response.ID)
			}
			seen[response.ID] = true
			equal(t, "ttl", response.TTL, 600)
			equal(t, "revision of a grant", response.Header.Revision, before)
			equal(t, "error in the answer", response.Error, "")
		}
		id := time.Now().UnixNano()
		response, err := grant(id, 600)
		if err != nil || response.ID != id {
			t.Fatalf("an id of our own: %v %v", response, err)
		}
		_, err = grant(id, 600)
		wantError(t, err, rpctypes.ErrGRPCLeaseExist)
		_, err = grant(0, 9_000_000_001)
		wantError(t, err, rpctypes.ErrGRPCLeaseTTLTooLarge)
		if response, err = grant(0, 9_000_000_000); err != nil || response.TTL != 9_000_000_000 {
			t.Errorf("the longest ttl: %v %v", response, err)
		}
		// The minimum follows from the election timeout: 1.5 times 1 s, rounded up.
		for _, ttl := range []int64{1, 0, -1} {
			if response, err = grant(0, ttl); err != nil || response.TTL != 2 {
				t.Errorf("ttl %d: %v %v, want it raised to 2", ttl, response, err)
			}
		}
		equal(t, "revision after all", s.revision(t), before)
	})
}

func TestLeaseTimeToLiveAndKeepAlive(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		id := s.grant(t, 100)
		for _, name := range []string{"b", "a", "c"} {
			s.put(t, name, "", clientv3.WithLease(id))
		}
		equal(t, "lease of a key", s.get(t, "a").Kvs[0].Lease, int64(id))
		for i, client := range s.all {
			what := fmt.Sprintf("through node %d: ", i+1)
			plain, err := client.TimeToLive(s.ctx, id)
			if err != nil {
				t.Fatal(err)
			}
			if plain.ID != id || plain.GrantedTTL != 100 || plain.TTL > 100 || plain.TTL < 80 || len(plain.Keys) != 0 {
				t.Errorf("%stime to live: %v", what, plain)
			}
			equal(t, what+"keys", s.attached(t, client, id), "a b c")
			kept, err := client.KeepAliveOnce(s.ctx, id)
			if err != nil {
				t.Fatal(err)
			}
			if kept.ID != id || kept.TTL != 100 || kept.Revision == 0 {
				t.Errorf("%skeepalive: %v", what, kept)
			}
		}
	})
}

func TestLeaseMissing(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		const missing = 0x7eadbeef
		before := s.revision(t)
		response, err := s.TimeToLive(s.ctx, missing, clientv3.WithAttachedKeys())
		if err != nil || response.TTL != -1 || response.ID != missing || response.GrantedTTL != 0 || len(response.Keys) != 0 || response.ResponseHeader.GetRevision() != before {
			t.Errorf("time to live: %v %v, want a TTL of -1", response, err)
		}
		_, err = s.Revoke(s.ctx, missing)
		wantError(t, err, rpctypes.ErrGRPCLeaseNotFound)
		_, err = s.Put(s.ctx, s.key("k"), "", clientv3.WithLease(missing))
		wantError(t, err, rpctypes.ErrGRPCLeaseNotFound)
		_, err = s.KeepAliveOnce(s.ctx, missing)
		wantError(t, err, rpctypes.ErrGRPCLeaseNotFound)
		// That was the client's doing: the server answers, with a TTL of 0, and the stream goes on.
		stream, err := pb.NewLeaseClient(s.ActiveConnection()).LeaseKeepAlive(s.ctx)
		if err != nil {
			t.Fatal(err)
		}
		id := s.grant(t, 100)
		for _, c := range []struct{ id, ttl int64 }{{missing, 0}, {int64(id), 100}, {missing, 0}} {
			if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: c.id}); err != nil {
				t.Fatal(err)
			}
			response, err := stream.Recv()
			if err != nil || response.ID != c.id || response.TTL != c.ttl || response.Header.GetRevision() != before {
				t.Errorf("keepalive of %x: %v %v, want TTL %d", c.id, response, err, c.ttl)
			}
		}
	})
}

func TestLeaseRevoke(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		id := s.grant(t, 600)
		for _, name := range []string{"b", "d", "a", "c"} {
			s.put(t, name, "", clientv3.WithLease(id))
		}
		before := s.put(t, "kept", "")
		w := s.watch(t)
		w.create(s.prefixWatch())
		response, err := s.Revoke(s.ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "revision of the revoke", response.Header.Revision, before+1)
		deletes := w.next()
		equal(t, "one response, in the order of keys", describe(deletes.Events, s.prefix), "delete a, delete b, delete c, delete d")
		for _, event := range deletes.Events {
			equal(t, "revision of the delete", event.Kv.ModRevision, before+1)
		}
		equal(t, "left", s.names(s.get(t, "", clientv3.WithPrefix()).Kvs), "kept")
		_, err = s.Revoke(s.ctx, id)
		wantError(t, err, rpctypes.ErrGRPCLeaseNotFound)

		// Without keys there is nothing to write down.
		empty := s.grant(t, 600)
		if _, err := s.Revoke(s.ctx, empty); err != nil {
			t.Fatal(err)
		}
		equal(t, "revision after a revoke without keys", s.revision(t), before+1)
	})
}

func TestLeaseAttachAndDetach(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		first, second := s.grant(t, 600), s.grant(t, 600)
		for _, name := range []string{"to second", "to none", "deleted", "reborn", "stays", "ignored"} {
			s.put(t, name, "", clientv3.WithLease(first))
		}
		s.put(t, "to second", "", clientv3.WithLease(second))
		s.put(t, "to none", "")
		s.delete(t, "deleted")
		s.delete(t, "reborn")
		s.put(t, "reborn", "")
		s.put(t, "ignored", "x", clientv3.WithIgnoreLease())
		s.put(t, "stays", "x", clientv3.WithLease(first))
		equal(t, "keys of the first", s.attached(t, s.Client, first), "ignored stays")
		equal(t, "keys of the second", s.attached(t, s.Client, second), "to second")
		equal(t, "lease of a detached key", s.get(t, "to none").Kvs[0].Lease, 0)
		if _, err := s.Revoke(s.ctx, first); err != nil {
			t.Fatal(err)
		}
		equal(t, "left after revoking the first", s.names(s.get(t, "", clientv3.WithPrefix()).Kvs), "reborn to none to second")

		// Within a txn, too; and a delete there detaches.
		third := s.grant(t, 600)
		s.commit(t, s.Txn(s.ctx).Then(clientv3.OpPut(s.key("in a txn"), "", clientv3.WithLease(third)), clientv3.OpPut(s.key("to second"), "", clientv3.WithLease(third))))
		equal(t, "keys of the third", s.attached(t, s.Client, third), "in a txn to second")
		equal(t, "keys of the second", s.attached(t, s.Client, second), "")
		s.commit(t, s.Txn(s.ctx).Then(clientv3.OpDelete(s.key("in a txn"))))
		equal(t, "keys of the third after a delete", s.attached(t, s.Client, third), "to second")
	})
}

func TestLeaseList(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		var granted []clientv3.LeaseID
		for range 5 {
			granted = append(granted, s.grant(t, 600))
		}
		if _, err := s.Revoke(s.ctx, granted[0]); err != nil {
			t.Fatal(err)
		}
		// Each node answers from its own state, which may be behind that of the node that granted.
		for i, client := range s.all {
			eventually(t, fmt.Sprintf("the list of node %d", i+1), func() error {
				response, err := client.Leases(s.ctx)
				if err != nil {
					t.Fatal(err)
				}
				listed := map[clientv3.LeaseID]int{}
				for _, lease := range response.Leases {
					listed[lease.ID]++
				}
				for n, id := range granted {
					want := 1
					if n == 0 {
						want = 0
					}
					if listed[id] != want {
						return fmt.Errorf("lease %d is listed %d times, want %d", n, listed[id], want)
					}
				}
				return nil
			})
		}
	})
}

// All endpoints at once, because waiting is all there is to it.
func TestLeaseExpiry(t *testing.T) {
	throughOneEndpoint(t, func(t *testing.T, s *session) {
		const ttl, keys = 3, 4
		type running struct {
			id      clientv3.LeaseID
			granted time.Time
			watch   *watchStream
			prefix  string
		}
		var leases []running
		for i, client := range s.all {
			prefix := s.key(fmt.Sprintf("lease%d/", i))
			granted := time.Now()
			lease, err := client.Grant(s.ctx, ttl)
			if err != nil {
				t.Fatal(err)
			}
			written := int64(0)
			for n := range keys {
				put, err := client.Put(s.ctx, fmt.Sprintf("%s%d", prefix, n), "", clientv3.WithLease(lease.ID))
				if err != nil {
					t.Fatal(err)
				}
				written = put.Header.Revision
			}
			other := newSession(t, (i+1)%len(s.all))
			w := other.watch(t)
			// Not "from now": another node's now may be before these puts.
			w.create(&pb.WatchCreateRequest{Key: []byte(prefix), RangeEnd: prefixEnd(prefix), StartRevision: written + 1})
			leases = append(leases, running{lease.ID, granted, w, prefix})
		}
		// One that is kept alive all the while stays.
		kept := s.grant(t, ttl)
		s.put(t, "kept", "", clientv3.WithLease(kept))
		alive, err := s.KeepAlive(s.ctx, kept)
		if err != nil {
			t.Fatal(err)
		}
		for i, lease := range leases {
			response := lease.watch.next()
			age := time.Since(lease.granted)
			// A server may be late, but never early.
			if age < ttl*time.Second {
				t.Errorf("lease %d expired after %s", i, age)
			}
			if age > ttl*time.Second+10*time.Second {
				t.Errorf("lease %d expired only after %s", i, age)
			}
			equal(t, "one response, in the order of keys", describe(response.Events, lease.prefix), "delete 0, delete 1, delete 2, delete 3")
			for _, event := range response.Events {
				equal(t, "type", event.Type, mvccpb.Event_DELETE)
				equal(t, "revision", event.Kv.ModRevision, response.Events[0].Kv.ModRevision)
			}
			gone, err := s.TimeToLive(s.ctx, lease.id)
			if err != nil || gone.TTL != -1 {
				t.Errorf("time to live of an expired lease: %v %v", gone, err)
			}
		}
		renewals := 0
		for deadline := time.After((ttl + 2) * time.Second); renewals < 4; renewals++ {
			select {
			case response, open := <-alive:
				if !open || response.TTL != ttl {
					t.Fatalf("keepalive: %v", response)
				}
			case <-deadline:
				t.Fatalf("%d renewals only", renewals)
			}
		}
		equal(t, "the key of the lease that was kept alive", len(s.get(t, "kept").Kvs), 1)
	})
}
