package clientv3

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestWatchFromNow(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		before := s.put(t, "k", "not seen")
		w := s.watch(t)
		created := w.create(&pb.WatchCreateRequest{Key: []byte(s.key("k"))})
		equal(t, "first watch id", created.WatchId, 0)
		equal(t, "revision of created", created.Header.Revision, before)
		if created.Header.ClusterId == 0 || created.Header.MemberId == 0 || created.Header.RaftTerm == 0 {
			t.Errorf("header of created: %v", created.Header)
		}
		s.put(t, "k", "1")
		s.put(t, "other", "x")
		s.put(t, "k/below", "x")
		s.delete(t, "k")
		s.delete(t, "k") // nothing there any more: no event
		s.put(t, "k", "2")
		events := w.events(3)
		equal(t, "events", describe(events, s.prefix), "put k=1, delete k, put k=2")
		put, deleted, again := events[0], events[1], events[2]
		if put.Kv.ModRevision != before+1 || put.Kv.CreateRevision != before || put.Kv.Version != 2 || put.PrevKv != nil {
			t.Errorf("put: %v", put)
		}
		if deleted.Kv.ModRevision != before+4 || deleted.Kv.CreateRevision != 0 || deleted.Kv.Version != 0 || deleted.Kv.Lease != 0 || len(deleted.Kv.Value) != 0 || deleted.PrevKv != nil {
			t.Errorf("a delete holds key and mod revision and nothing else, but this is %v", deleted)
		}
		if again.Kv.ModRevision != before+5 || again.Kv.CreateRevision != before+5 || again.Kv.Version != 1 {
			t.Errorf("put again: %v", again)
		}
	})
}

func TestWatchFromOldAndFutureRevisions(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		start := s.revision(t) + 1
		const count = 30
		for i := range count {
			if i%3 == 2 {
				s.delete(t, fmt.Sprintf("k%d", i-1))
			} else {
				s.put(t, fmt.Sprintf("k%d", i), fmt.Sprint(i))
			}
		}
		for _, from := range []int64{start, start + 7, start + count - 1} {
			w := s.watch(t)
			request := s.prefixWatch()
			request.StartRevision = from
			w.create(request)
			for i, event := range w.events(int(s.revision(t) + 1 - from)) {
				equal(t, fmt.Sprintf("from start+%d: revision of event %d", from-start, i), event.Kv.ModRevision, from+int64(i))
			}
			// Past and present join without a gap.
			next := s.put(t, "live", "")
			equal(t, "revision of the first live event", w.events(1)[0].Kv.ModRevision, next)
			s.delete(t, "live")
			w.events(1)
		}
		now := s.revision(t)
		w := s.watch(t)
		request := s.prefixWatch()
		request.StartRevision = now + 3
		equal(t, "created of a watch of the future", w.create(request).Header.Revision, now)
		for i := range 4 {
			s.put(t, "future", fmt.Sprint(i))
		}
		equal(t, "events of a watch of the future", describe(w.events(2), s.prefix), "put future=2, put future=3")
	})
}

func TestWatchRanges(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		w := s.watch(t)
		byID := map[int64]string{}
		for what, request := range map[string]*pb.WatchCreateRequest{
			"one key":  {Key: []byte(s.key("b"))},
			"prefix":   {Key: []byte(s.key("b")), RangeEnd: prefixEnd(s.key("b"))},
			"range":    {Key: []byte(s.key("a")), RangeEnd: []byte(s.key("bb"))},
			"to end":   {Key: []byte(s.key("bb")), RangeEnd: []byte{0}},
			"all keys": {Key: nil, RangeEnd: []byte{0}}, // an empty key is \0
		} {
			byID[w.create(request).WatchId] = what
		}
		equal(t, "watches", len(byID), 5)
		for _, name := range []string{"a", "b", "ba", "bb", "c"} {
			s.put(t, name, "")
		}
		want := map[string]string{
			"one key": "b", "prefix": "b ba bb", "range": "a b ba", "to end": "bb c", "all keys": "a b ba bb c",
		}
		got := map[string]string{}
		for i := 0; i < 1+3+3+2+5; {
			response := w.next()
			for _, event := range response.Events {
				what := byID[response.WatchId]
				got[what] = strings.TrimSpace(got[what] + " " + strings.TrimPrefix(string(event.Kv.Key), s.prefix))
				i++
			}
		}
		for what := range want {
			equal(t, what, got[what], want[what])
		}
	})
}

func TestWatchFilters(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		start := s.revision(t) + 1
		w := s.watch(t)
		live := map[int64]string{}
		noPut, noDelete := s.prefixWatch(), s.prefixWatch()
		noPut.Filters = []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT}
		noDelete.Filters = []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NODELETE}
		live[w.create(noPut).WatchId] = "no put"
		live[w.create(noDelete).WatchId] = "no delete"
		s.put(t, "a", "1")
		s.delete(t, "a")
		s.put(t, "b", "2")
		s.commit(t, s.Txn(s.ctx).Then(clientv3.OpDelete(s.key("b")), clientv3.OpPut(s.key("c"), "3")))
		collect := func(w *watchStream, byID map[int64]string) map[string]string {
			got := map[string]string{}
			for range 5 {
				response := w.next()
				if len(response.Events) != 1 {
					t.Errorf("%d events in one live response: %s", len(response.Events), describe(response.Events, s.prefix))
				}
				what := byID[response.WatchId]
				got[what] = strings.TrimPrefix(got[what]+", "+describe(response.Events, s.prefix), ", ")
			}
			return got
		}
		want := map[string]string{"no put": "delete a, delete b", "no delete": "put a=1, put b=2, put c=3"}
		got := collect(w, live)
		for what := range want {
			equal(t, what, got[what], want[what])
		}
		// The same out of the history.
		for _, request := range []*pb.WatchCreateRequest{noPut, noDelete} {
			old := s.watch(t)
			request.StartRevision = start
			old.create(request)
			what := "no put"
			if request == noDelete {
				what = "no delete"
			}
			equal(t, what+", from the past", describe(old.events(strings.Count(want[what], ",")+1), s.prefix), want[what])
		}
	})
}

func TestWatchPreviousValue(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		start := s.revision(t) + 1
		request := s.prefixWatch()
		request.PrevKv = true
		live := s.watch(t)
		live.create(request)
		first := s.put(t, "k", "1")
		s.put(t, "k", "2")
		s.delete(t, "k")
		s.put(t, "k", "3")
		past := s.watch(t)
		request.StartRevision = start
		past.create(request)
		for what, w := range map[string]*watchStream{"live": live, "from the past": past} {
			events := w.events(4)
			equal(t, what, describe(events, s.prefix), "put k=1, put k=2, delete k, put k=3")
			if events[0].PrevKv != nil || events[3].PrevKv != nil {
				t.Errorf("%s: a creation has a previous value: %v %v", what, events[0], events[3])
			}
			if p := events[1].PrevKv; p == nil || string(p.Value) != "1" || p.ModRevision != first || p.CreateRevision != first || p.Version != 1 {
				t.Errorf("%s: previous value of the change: %v", what, p)
			}
			if p := events[2].PrevKv; p == nil || string(p.Value) != "2" || p.ModRevision != first+1 || p.CreateRevision != first || p.Version != 2 {
				t.Errorf("%s: previous value of the delete: %v", what, p)
			}
		}
	})
}

func TestWatchTxnIsOneResponse(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		s.put(t, "old1", "")
		s.put(t, "old2", "")
		w := s.watch(t)
		w.create(s.prefixWatch())
		response := s.commit(t, s.Txn(s.ctx).Then(
			clientv3.OpPut(s.key("z"), "1"),
			clientv3.OpDelete(s.key("old"), clientv3.WithPrefix()),
			clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpPut(s.key("m"), "2")}, nil),
			clientv3.OpPut(s.key("a"), "3"),
		))
		// In the order of the operations, not of the keys.
		const want = "put z=1, delete old1, delete old2, put m=2, put a=3"
		live := w.next()
		equal(t, "one response", describe(live.Events, s.prefix), want)
		equal(t, "its revision", live.Header.Revision, response.Header.Revision)
		for _, event := range live.Events {
			equal(t, "revision of the event", event.Kv.ModRevision, response.Header.Revision)
		}
		s.put(t, "later", "")
		past := s.watch(t)
		request := s.prefixWatch()
		request.StartRevision = response.Header.Revision
		past.create(request)
		equal(t, "from the past", describe(past.events(6), s.prefix), want+", put later=")
	})
}

func TestWatchFragments(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		// One revision with more than a message may hold: the previous values of a delete are not bounded by a request.
		const keys, size, limit = 6, 1 << 20, 3 << 19
		for i := range keys {
			s.put(t, fmt.Sprint(i), strings.Repeat(fmt.Sprint(i), size))
		}
		whole, pieces := s.prefixWatch(), s.prefixWatch()
		whole.PrevKv, pieces.PrevKv, pieces.Fragment = true, true, true
		w1, w2 := s.watch(t), s.watch(t)
		w1.create(whole)
		w2.create(pieces)
		revision := s.delete(t, "", clientv3.WithPrefix())

		check := func(what string, event *mvccpb.Event, i int) {
			t.Helper()
			if event.Type != mvccpb.Event_DELETE || event.Kv.ModRevision != revision || string(event.PrevKv.GetValue()) != strings.Repeat(fmt.Sprint(i), size) {
				t.Errorf("%s: event %d is not the delete of key %d", what, i, i)
			}
		}
		unsplit := w1.next()
		if unsplit.Fragment || len(unsplit.Events) != keys {
			t.Fatalf("without fragment: %d events, fragment %v; want %d in one response", len(unsplit.Events), unsplit.Fragment, keys)
		}
		for i, event := range unsplit.Events {
			check("whole", event, i)
		}
		responses := 0
		for i := 0; i < keys; responses++ {
			response := w2.next()
			if len(response.Events) > 1 && len(response.Events)*size > limit {
				t.Errorf("a fragment of %d MiB", len(response.Events))
			}
			for _, event := range response.Events {
				check("fragments", event, i)
				i++
			}
			equal(t, "fragment, which says that more come", response.Fragment, i < keys)
			equal(t, "revision of a fragment", response.Header.Revision, revision)
		}
		if responses < 2 {
			t.Errorf("%d response, want several", responses)
		}
		// The client puts them together again.
		for i := range keys {
			s.put(t, fmt.Sprint(i), strings.Repeat(fmt.Sprint(i), size))
		}
		client := s.Watch(s.ctx, s.prefix, clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithFragment(), clientv3.WithRev(s.revision(t)+1))
		s.delete(t, "", clientv3.WithPrefix())
		equal(t, "events in the client's response", len((<-client).Events), keys)
	})
}

func TestWatchProgress(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		w := s.watch(t)
		w.create(s.prefixWatch())
		other := s.prefixWatch()
		other.Key, other.RangeEnd = []byte(s.key("only this")), nil
		w.create(other)

		for round := range 20 {
			written := int64(0)
			for i := range 10 {
				written = s.put(t, fmt.Sprint(i), fmt.Sprint(round))
			}
			// The put was answered by this very node, so its progress cannot be behind; but a request that finds a watch
			// that is not synced is dropped, which is why Kubernetes repeats it.
			asked := time.Now()
			w.requestProgress()
			seen := 0
			for {
				var response *pb.WatchResponse
				select {
				case response = <-w.responses:
				case <-time.After(100 * time.Millisecond):
					if time.Since(asked) > patience {
						t.Fatalf("no progress within %s", patience)
					}
					w.requestProgress()
					continue
				}
				if response == nil {
					t.Fatal("the stream has ended")
				}
				if len(response.Events) > 0 {
					seen += len(response.Events)
					continue
				}
				if response.WatchId != -1 || response.Created || response.Canceled {
					t.Fatalf("want progress, got %v", response)
				}
				if response.Header.Revision < written {
					continue // an answer to a question of the last round
				}
				break
			}
			// Kubernetes takes progress at revision R for the promise that everything up to R has been sent.
			if seen != 10 {
				t.Fatalf("round %d: progress came after %d of 10 events", round, seen)
			}
		}
	})
}

// Progress must never run ahead of events, whoever writes: an event that comes after a progress notification has a higher
// revision.
func TestWatchProgressUnderLoad(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		w := s.watch(t)
		const watchers, writers, writes = 10, 4, 50
		for range watchers {
			w.create(s.prefixWatch())
		}
		var group sync.WaitGroup
		for i := range writers {
			group.Go(func() {
				for n := range writes {
					if _, err := s.all[i%len(s.all)].Put(s.ctx, s.key(fmt.Sprint(i)), fmt.Sprint(n)); err != nil {
						t.Errorf("put: %v", err)
					}
				}
			})
		}
		stop := make(chan struct{})
		var asking sync.WaitGroup
		asking.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(5 * time.Millisecond):
					w.requestProgress()
				}
			}
		})
		defer func() { close(stop); asking.Wait(); group.Wait() }()
		promised, notifications := int64(0), 0
		last := map[int64]int64{}
		for events := 0; events < watchers*writers*writes || notifications == 0; {
			response := w.next()
			if len(response.Events) == 0 {
				equal(t, "watch id of progress", response.WatchId, -1)
				if response.Header.Revision < promised {
					t.Errorf("progress went back from %d to %d", promised, response.Header.Revision)
				}
				promised = response.Header.Revision
				notifications++
				continue
			}
			for _, event := range response.Events {
				if event.Kv.ModRevision <= promised {
					t.Fatalf("an event of revision %d after progress at %d", event.Kv.ModRevision, promised)
				}
				if event.Kv.ModRevision <= last[response.WatchId] {
					t.Fatalf("watch %d: an event of revision %d after one of %d", response.WatchId, event.Kv.ModRevision, last[response.WatchId])
				}
				last[response.WatchId] = event.Kv.ModRevision
				events++
			}
		}
	})
}

func TestWatchCancel(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		w := s.watch(t)
		first := w.create(s.prefixWatch()).WatchId
		second := w.create(s.prefixWatch()).WatchId
		w.cancel(first)
		canceled := w.next()
		if !canceled.Canceled || canceled.Created || canceled.WatchId != first || canceled.CompactRevision != 0 || canceled.CancelReason != "" {
			t.Errorf("canceled: %v", canceled)
		}
		// An unknown watch is not worth an answer.
		w.cancel(4711)
		s.put(t, "k", "")
		response := w.next()
		if response.WatchId != second || len(response.Events) != 1 {
			t.Errorf("want the event for the other watch, got %v", response)
		}
		// Nothing more came for the canceled watch: the next that comes is this.
		w.cancel(second)
		if response := w.next(); !response.Canceled || response.WatchId != second {
			t.Errorf("want the second watch canceled, got %v", response)
		}

		// The client's way: its context ends, its channel is closed.
		ctx, cancel := context.WithCancel(s.ctx)
		channel := s.Watch(ctx, s.key("k"), clientv3.WithCreatedNotify())
		if response := <-channel; !response.Created {
			t.Errorf("want created, got %v", response)
		}
		cancel()
		select {
		case response, open := <-channel:
			if open && response.Err() == nil {
				t.Errorf("after cancel: %v", response)
			}
		case <-time.After(patience):
			t.Error("the channel is not closed")
		}
	})
}

func TestWatchIDs(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		w := s.watch(t)
		with := func(id int64) *pb.WatchCreateRequest {
			request := s.prefixWatch()
			request.WatchId = id
			return request
		}
		equal(t, "first", w.create(with(0)).WatchId, 0)
		equal(t, "second", w.create(with(0)).WatchId, 1)
		equal(t, "asked for", w.create(with(3)).WatchId, 3)
		equal(t, "third", w.create(with(0)).WatchId, 2)
		equal(t, "the server skips what is taken", w.create(with(0)).WatchId, 4)

		w.request(with(3))
		duplicate := w.next()
		if !duplicate.Created || !duplicate.Canceled || duplicate.WatchId != -1 || duplicate.CancelReason != "mvcc: duplicate watch ID provided on the WatchStream" {
			t.Errorf("an id that is taken: %v", duplicate)
		}
		w.cancel(3)
		if response := w.next(); !response.Canceled || response.WatchId != 3 {
			t.Errorf("cancel: %v", response)
		}
		equal(t, "an id that is free again", w.create(with(3)).WatchId, 3)
	})
}

func TestWatchRefused(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		w := s.watch(t)
		for what, c := range map[string]struct {
			request *pb.WatchCreateRequest
			reason  string
		}{
			"empty range":            {&pb.WatchCreateRequest{Key: []byte(s.key("b")), RangeEnd: []byte(s.key("b"))}, "mvcc: watcher range is empty"},
			"range that ends before": {&pb.WatchCreateRequest{Key: []byte(s.key("b")), RangeEnd: []byte(s.key("a"))}, "mvcc: watcher range is empty"},
			"negative revision":      {&pb.WatchCreateRequest{Key: []byte(s.key("b")), StartRevision: -1}, rpctypes.ErrCompacted.Error()},
		} {
			w.request(c.request)
			response := w.next()
			if !response.Created || !response.Canceled || response.WatchId != -1 || response.CancelReason != c.reason {
				t.Errorf("%s: %v, want created and canceled with %q", what, response, c.reason)
			}
		}
		// The stream is as good as before.
		equal(t, "id of the next watch", w.create(s.prefixWatch()).WatchId, 0)
		s.put(t, "k", "v")
		equal(t, "its event", describe(w.events(1), s.prefix), "put k=v")
	})
}

func TestWatchManyOnOneStream(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		w := s.watch(t)
		const own, shared = 500, 100
		for i := range own {
			equal(t, "id", w.create(&pb.WatchCreateRequest{Key: []byte(s.key(fmt.Sprintf("own/%04d", i)))}).WatchId, int64(i))
		}
		for range shared {
			w.create(&pb.WatchCreateRequest{Key: []byte(s.key("shared"))})
		}
		for i := 0; i < own; i += 100 {
			var puts []clientv3.Op
			for j := range 100 {
				puts = append(puts, clientv3.OpPut(s.key(fmt.Sprintf("own/%04d", i+j)), ""))
			}
			s.commit(t, s.Txn(s.ctx).Then(puts...))
		}
		s.put(t, "shared", "")
		seen := map[int64]string{}
		for range own + shared {
			response := w.next()
			if len(response.Events) != 1 {
				t.Fatalf("%v, want one event", response)
			}
			if before, twice := seen[response.WatchId]; twice {
				t.Fatalf("watch %d got two events, %s first", response.WatchId, before)
			}
			seen[response.WatchId] = describe(response.Events, s.prefix)
		}
		for i := range own {
			equal(t, fmt.Sprintf("watch %d", i), seen[int64(i)], fmt.Sprintf("put own/%04d=", i))
		}
		for i := range shared {
			equal(t, fmt.Sprintf("watch %d", own+i), seen[int64(own+i)], "put shared=")
		}
	})
}

// What is written through one node is seen through each other, once and in the same order.
func TestWatchAcrossNodes(t *testing.T) {
	throughOneEndpoint(t, func(t *testing.T, s *session) {
		const writers, writes = 6, 60
		start := s.revision(t) + 1
		channels := make([]clientv3.WatchChan, len(s.all))
		for i, client := range s.all {
			channels[i] = client.Watch(clientv3.WithRequireLeader(s.ctx), s.prefix, clientv3.WithPrefix(), clientv3.WithRev(start))
		}
		var group sync.WaitGroup
		for i := range writers {
			group.Go(func() {
				for n := range writes {
					client := s.all[(i+n)%len(s.all)]
					key := s.key(fmt.Sprint(i))
					var err error
					if n%10 == 9 {
						_, err = client.Delete(s.ctx, key)
					} else {
						_, err = client.Put(s.ctx, key, fmt.Sprint(n))
					}
					if err != nil {
						t.Errorf("write: %v", err)
					}
				}
			})
		}
		sequences := make([][]string, len(channels))
		for i, channel := range channels {
			last := int64(0)
			for len(sequences[i]) < writers*writes {
				response, open := <-channel
				if !open || response.Err() != nil {
					t.Fatalf("watch %d ended after %d events: %v", i, len(sequences[i]), response.Err())
				}
				for _, event := range response.Events {
					if event.Kv.ModRevision <= last {
						t.Fatalf("watch %d: revision %d after %d", i, event.Kv.ModRevision, last)
					}
					last = event.Kv.ModRevision
					sequences[i] = append(sequences[i], fmt.Sprintf("%d %s %s=%s", last, event.Type, event.Kv.Key, event.Kv.Value))
				}
			}
		}
		group.Wait()
		for i := range sequences {
			if len(sequences[i]) != writers*writes {
				t.Errorf("watch %d saw %d events, want %d", i, len(sequences[i]), writers*writes)
			}
			for n := range sequences[0] {
				if sequences[i][n] != sequences[0][n] {
					t.Fatalf("event %d is %s through node %d and %s through node 1", n, sequences[i][n], i+1, sequences[0][n])
				}
			}
		}
		// Without other writers each revision is there: none was left out.
		for n := range sequences[0] {
			if want := fmt.Sprintf("%d ", start+int64(n)); !strings.HasPrefix(sequences[0][n], want) {
				t.Fatalf("event %d is %s, want revision %s", n, sequences[0][n], want)
			}
		}
	})
}

// A client that does not read for a while gets everything once it does.
func TestWatchSlowReader(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		// Not w.watch: its goroutine would read at once. Without a reader the stream's flow control fills up.
		stream, err := pb.NewWatchClient(s.ActiveConnection()).Watch(s.ctx)
		if err != nil {
			t.Fatal(err)
		}
		err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: s.prefixWatch()}})
		if err != nil {
			t.Fatal(err)
		}
		if created, err := stream.Recv(); err != nil || !created.Created {
			t.Fatalf("want created, got %v %v", created, err)
		}
		// Well above the 64 KiB for which flow control is lenient.
		const rounds, perRound = 40, 50
		value := strings.Repeat("x", 1000)
		first := s.revision(t) + 1
		for range rounds {
			var puts []clientv3.Op
			for i := range perRound {
				puts = append(puts, clientv3.OpPut(s.key(fmt.Sprint(i)), value))
			}
			s.commit(t, s.Txn(s.ctx).Then(puts...))
		}
		counts := map[int64]int{}
		for total := 0; total < rounds*perRound; {
			response, err := stream.Recv()
			if err != nil {
				t.Fatalf("after %d events: %v", total, err)
			}
			for _, event := range response.Events {
				counts[event.Kv.ModRevision]++
				total++
			}
		}
		for i := range rounds {
			equal(t, fmt.Sprintf("events of revision first+%d", i), counts[first+int64(i)], perRound)
		}
	})
}
