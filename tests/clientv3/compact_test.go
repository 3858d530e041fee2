package clientv3

import (
	"fmt"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func (s *session) compact(t *testing.T, revision int64, options ...clientv3.CompactOption) {
	t.Helper()
	if _, err := s.Compact(s.ctx, revision, options...); err != nil {
		t.Fatalf("compact at %d: %v", revision, err)
	}
}

func TestCompact(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		start := s.revision(t)
		s.put(t, "a", "a1") // start+1
		s.put(t, "b", "b1") // start+2
		s.put(t, "a", "a2") // start+3
		s.delete(t, "b")    // start+4
		s.put(t, "a", "a3") // start+5
		now := s.put(t, "c", "c1")

		at := start + 3
		response, err := s.Compact(s.ctx, at)
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "revision of the answer", response.Header.Revision, now)
		equal(t, "revision afterwards", s.revision(t), now)

		for i, client := range s.all {
			what := fmt.Sprintf("through node %d, ", i+1)
			// Other nodes learn of it a moment later; a linearizable read waits for that.
			if _, err := client.Get(s.ctx, s.key("a")); err != nil {
				t.Fatal(err)
			}
			for _, revision := range []int64{1, start + 1, at - 1} {
				_, err := client.Get(s.ctx, s.prefix, clientv3.WithPrefix(), clientv3.WithRev(revision))
				wantError(t, err, rpctypes.ErrGRPCCompacted)
				_, err = client.Get(s.ctx, s.prefix, clientv3.WithPrefix(), clientv3.WithRev(revision), clientv3.WithCountOnly(), clientv3.WithSerializable())
				wantError(t, err, rpctypes.ErrGRPCCompacted)
			}
			for revision, want := range map[int64]string{at: "a2 b1", at + 1: "a2", at + 2: "a3", now: "a3 c1", 0: "a3 c1"} {
				got, err := client.Get(s.ctx, s.prefix, clientv3.WithPrefix(), clientv3.WithRev(revision))
				if err != nil {
					t.Fatalf("%sat start+%d: %v", what, revision-start, err)
				}
				equal(t, fmt.Sprintf("%sat start+%d", what, revision-start), values(got.Kvs), want)
				equal(t, fmt.Sprintf("%scount at start+%d", what, revision-start), got.Count, int64(len(got.Kvs)))
			}
		}
		kept := s.get(t, "a", clientv3.WithRev(at)).Kvs[0]
		if kept.Version != 2 || kept.CreateRevision != start+1 || kept.ModRevision != at {
			t.Errorf("what is kept of a: %v", kept)
		}

		for _, revision := range []int64{at, at - 1, 1, 0, -1} {
			_, err := s.Compact(s.ctx, revision)
			wantError(t, err, rpctypes.ErrGRPCCompacted)
		}
		_, err = s.Compact(s.ctx, now+1)
		wantError(t, err, rpctypes.ErrGRPCFutureRev)
		s.compact(t, now)
		equal(t, "after compacting everything", values(s.get(t, "", clientv3.WithPrefix()).Kvs), "a3 c1")
		equal(t, "at the compacted revision", values(s.get(t, "", clientv3.WithPrefix(), clientv3.WithRev(now)).Kvs), "a3 c1")
	})
}

func TestCompactPhysical(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		for i := range 200 {
			s.put(t, fmt.Sprint(i%10), strings.Repeat("x", 1000))
		}
		s.compact(t, s.revision(t), clientv3.WithCompactPhysical())
		equal(t, "keys", s.get(t, "", clientv3.WithPrefix(), clientv3.WithCountOnly()).Count, 10)
	})
}

func TestCompactKeepsWhatIsLive(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		created := s.put(t, "untouched", "x")
		s.put(t, "gone", "x")
		s.delete(t, "gone")
		s.put(t, "reborn", "1")
		s.delete(t, "reborn")
		reborn := s.put(t, "reborn", "2")
		s.compact(t, s.put(t, "changed", "x"), clientv3.WithCompactPhysical())
		equal(t, "keys", s.names(s.get(t, "", clientv3.WithPrefix()).Kvs), "changed reborn untouched")
		if kv := s.get(t, "untouched").Kvs[0]; kv.CreateRevision != created || kv.ModRevision != created || kv.Version != 1 {
			t.Errorf("untouched: %v", kv)
		}
		if kv := s.get(t, "reborn").Kvs[0]; kv.CreateRevision != reborn || kv.Version != 1 {
			t.Errorf("reborn: %v", kv)
		}
		// Versions and create revisions go on from there.
		next := s.put(t, "untouched", "y")
		if kv := s.get(t, "untouched").Kvs[0]; kv.CreateRevision != created || kv.ModRevision != next || kv.Version != 2 {
			t.Errorf("untouched, put again: %v", kv)
		}
		if revision := s.put(t, "gone", "y"); s.get(t, "gone").Kvs[0].CreateRevision != revision {
			t.Errorf("gone, put again: %v", s.get(t, "gone").Kvs[0])
		}
	})
}

func TestCompactAndWatch(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		s.put(t, "k", "1")
		s.put(t, "k", "2")
		deleted := s.delete(t, "k")
		s.put(t, "k", "3")
		running := s.watch(t)
		running.create(s.prefixWatch())

		// At the delete itself: the tombstone stands at the compacted revision and must stay visible to a watch from it.
		s.compact(t, deleted, clientv3.WithCompactPhysical())
		w := s.watch(t)
		request := s.prefixWatch()
		request.StartRevision, request.PrevKv = deleted, true
		w.create(request)
		events := w.events(2)
		equal(t, "events from the compacted revision on", describe(events, s.prefix), "delete k, put k=3")
		if events[0].PrevKv != nil {
			t.Errorf("the previous value is at a compacted revision, but there is %v", events[0].PrevKv)
		}

		for _, start := range []int64{deleted - 1, 1} {
			compacted := s.watch(t)
			request := s.prefixWatch()
			request.StartRevision = start
			created := compacted.create(request)
			canceled := compacted.next()
			if !canceled.Canceled || canceled.Created || len(canceled.Events) != 0 || canceled.WatchId != created.WatchId {
				t.Fatalf("want canceled, got %v", canceled)
			}
			equal(t, "compact revision", canceled.CompactRevision, deleted)
		}
		// As the client tells it.
		response := <-s.Watch(s.ctx, s.key("k"), clientv3.WithRev(deleted-1))
		if !response.Canceled || response.CompactRevision != deleted {
			t.Errorf("the client's response: %+v", response)
		}
		wantError(t, response.Err(), rpctypes.ErrGRPCCompacted)

		// A watch that is up to date does not care.
		s.compact(t, s.put(t, "k", "4"))
		equal(t, "running watch", describe(running.events(1), s.prefix), "put k=4")

		// The previous value of what was written at the compacted revision is gone, that of what comes later is not.
		at := s.put(t, "k", "5")
		s.put(t, "k", "6")
		s.compact(t, at)
		past := s.watch(t)
		request = s.prefixWatch()
		request.StartRevision, request.PrevKv = at, true
		past.create(request)
		events = past.events(2)
		if events[0].PrevKv != nil || string(events[1].PrevKv.GetValue()) != "5" {
			t.Errorf("previous values %v and %v, want none and 5", events[0].PrevKv, events[1].PrevKv)
		}
	})
}

func TestCompactAndTxn(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		s.put(t, "k", "1")
		before := s.put(t, "k", "2")
		s.compact(t, before)
		_, err := s.Txn(s.ctx).Then(clientv3.OpPut(s.key("k"), "3"), clientv3.OpGet(s.key("k"), clientv3.WithRev(before-1))).Commit()
		wantError(t, err, rpctypes.ErrGRPCCompacted)
		_, err = s.Txn(s.ctx).Then(clientv3.OpGet(s.key("k"), clientv3.WithRev(before-1))).Commit()
		wantError(t, err, rpctypes.ErrGRPCCompacted)
		equal(t, "revision", s.revision(t), before)
		equal(t, "value", values(s.get(t, "k").Kvs), "2")
		response := s.commit(t, s.Txn(s.ctx).Then(clientv3.OpPut(s.key("k"), "3"), clientv3.OpGet(s.key("k"), clientv3.WithRev(before))))
		equal(t, "a range at the compacted revision", values(response.Responses[1].GetResponseRange().Kvs), "2")
	})
}

// What kube-apiserver's compactor does: agree on who compacts by the version of a key, which others watch.
func TestCompactLikeKubernetes(t *testing.T) {
	throughOneEndpoint(t, func(t *testing.T, s *session) {
		key := s.key("compact_rev_key")
		w := s.watch(t)
		w.create(&pb.WatchCreateRequest{Key: []byte(key)})
		versions := make([]int64, len(s.all))
		for round := range 6 {
			turn := round % len(s.all)
			for i := range s.all {
				client := s.all[(turn+i)%len(s.all)]
				known := versions[(turn+i)%len(s.all)]
				response, err := client.Txn(s.ctx).
					If(clientv3.Compare(clientv3.Version(key), "=", known)).
					Then(clientv3.OpPut(key, fmt.Sprint(round))).
					Else(clientv3.OpGet(key)).Commit()
				if err != nil {
					t.Fatal(err)
				}
				equal(t, "the first one in a round wins", response.Succeeded, i == 0)
				if response.Succeeded {
					versions[(turn+i)%len(s.all)] = known + 1
					if _, err := client.Compact(s.ctx, response.Header.Revision-1); err != nil {
						t.Fatal(err)
					}
				} else {
					versions[(turn+i)%len(s.all)] = response.Responses[0].GetResponseRange().Kvs[0].Version
				}
			}
		}
		for round, event := range w.events(6) {
			equal(t, "value", string(event.Kv.Value), fmt.Sprint(round))
			equal(t, "version", event.Kv.Version, int64(round+1))
		}
	})
}
