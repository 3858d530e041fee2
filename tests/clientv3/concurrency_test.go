package clientv3

import (
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// Many hands on one counter through all nodes: no increment is lost and none is made twice.
func TestCounterAcrossNodes(t *testing.T) {
	throughOneEndpoint(t, func(t *testing.T, s *session) {
		const hands, incrementsEach = 12, 40
		created := s.put(t, "counter", "0")
		var group sync.WaitGroup
		for hand := range hands {
			group.Go(func() {
				client := s.all[hand%len(s.all)]
				for done := 0; done < incrementsEach; {
					read, err := client.Get(s.ctx, s.key("counter"))
					if err != nil {
						t.Errorf("get: %v", err)
						return
					}
					kv := read.Kvs[0]
					number, err := strconv.Atoi(string(kv.Value))
					if err != nil {
						t.Errorf("the counter holds %q", kv.Value)
						return
					}
					response, err := client.Txn(s.ctx).
						If(clientv3.Compare(clientv3.ModRevision(s.key("counter")), "=", kv.ModRevision)).
						Then(clientv3.OpPut(s.key("counter"), strconv.Itoa(number+1))).Commit()
					if err != nil {
						t.Errorf("txn: %v", err)
						return
					}
					if response.Succeeded {
						done++
					}
				}
			})
		}
		group.Wait()
		kv := s.get(t, "counter").Kvs[0]
		equal(t, "sum", string(kv.Value), strconv.Itoa(hands*incrementsEach))
		equal(t, "version", kv.Version, hands*incrementsEach+1)
		equal(t, "one revision for each, and none for those that were refused", kv.ModRevision, created+hands*incrementsEach)
	})
}

// A read through any node sees what was acknowledged by any other before the read began.
func TestReadAfterWriteAcrossNodes(t *testing.T) {
	throughOneEndpoint(t, func(t *testing.T, s *session) {
		for i := range 100 {
			value := fmt.Sprint(i)
			written, err := s.all[i%len(s.all)].Put(s.ctx, s.key("k"), value)
			if err != nil {
				t.Fatal(err)
			}
			for n, client := range s.all {
				read, err := client.Get(s.ctx, s.key("k"))
				if err != nil {
					t.Fatal(err)
				}
				if string(read.Kvs[0].Value) != value || read.Header.Revision < written.Header.Revision {
					t.Fatalf("node %d answers %s at revision %d right after %s was written at %d", n+1, read.Kvs[0].Value, read.Header.Revision, value, written.Header.Revision)
				}
				// A txn that only reads is no less strict.
				txn, err := client.Txn(s.ctx).Then(clientv3.OpGet(s.key("k"))).Commit()
				if err != nil {
					t.Fatal(err)
				}
				if got := values(txn.Responses[0].GetResponseRange().Kvs); got != value {
					t.Fatalf("node %d answers %s in a txn right after %s was written", n+1, got, value)
				}
			}
		}
	})
}

// While one key is being written, no reader ever sees it go back, whichever node it asks next.
func TestReadsNeverGoBack(t *testing.T) {
	throughOneEndpoint(t, func(t *testing.T, s *session) {
		s.put(t, "k", "0")
		var stop atomic.Bool
		var readers sync.WaitGroup
		for reader := range 4 {
			readers.Go(func() {
				last, lastRevision := -1, int64(0)
				for n := reader; !stop.Load(); n++ {
					read, err := s.all[n%len(s.all)].Get(s.ctx, s.key("k"))
					if err != nil {
						t.Errorf("get: %v", err)
						return
					}
					number, _ := strconv.Atoi(string(read.Kvs[0].Value))
					if number < last || read.Header.Revision < lastRevision {
						t.Errorf("read %d at revision %d after %d at %d", number, read.Header.Revision, last, lastRevision)
						return
					}
					last, lastRevision = number, read.Header.Revision
				}
			})
		}
		for i := range 300 {
			if _, err := s.all[i%len(s.all)].Put(s.ctx, s.key("k"), strconv.Itoa(i)); err != nil {
				t.Errorf("put: %v", err)
				break
			}
		}
		stop.Store(true)
		readers.Wait()
	})
}

// The client's own mutex uses leases, txns, sorted ranges and watches together.
func TestMutexAcrossNodes(t *testing.T) {
	throughOneEndpoint(t, func(t *testing.T, s *session) {
		const holders, turns = 6, 5
		var inside, total, violations atomic.Int64
		var group sync.WaitGroup
		for i := range holders {
			group.Go(func() {
				session, err := concurrency.NewSession(s.all[i%len(s.all)], concurrency.WithTTL(30), concurrency.WithContext(s.ctx))
				if err != nil {
					t.Errorf("session: %v", err)
					return
				}
				defer session.Close()
				mutex := concurrency.NewMutex(session, s.key("mutex"))
				for range turns {
					if err := mutex.Lock(s.ctx); err != nil {
						t.Errorf("lock: %v", err)
						return
					}
					if inside.Add(1) != 1 {
						violations.Add(1)
					}
					total.Add(1)
					inside.Add(-1)
					if err := mutex.Unlock(s.ctx); err != nil {
						t.Errorf("unlock: %v", err)
						return
					}
				}
			})
		}
		group.Wait()
		equal(t, "two holders at once", violations.Load(), 0)
		equal(t, "turns", total.Load(), holders*turns)
	})
}
