package clientv3

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestPutAndGet(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		member, err := s.Status(s.ctx, s.endpoint)
		if err != nil {
			t.Fatal(err)
		}
		before := s.revision(t)
		first, err := s.Put(s.ctx, s.key("a"), "1")
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "revision of the first put", first.Header.Revision, before+1)
		equal(t, "member id in the header", first.Header.MemberId, member.Header.MemberId)
		equal(t, "cluster id in the header", first.Header.ClusterId, member.Header.ClusterId)
		if first.Header.ClusterId == 0 || first.Header.MemberId == 0 || first.Header.RaftTerm == 0 {
			t.Errorf("header %v lacks an id or the term", first.Header)
		}
		if first.PrevKv != nil {
			t.Errorf("a previous value came unasked: %v", first.PrevKv)
		}
		equal(t, "revision of the second put", s.put(t, "a", "2"), before+2)
		equal(t, "revision of another key's put", s.put(t, "b", ""), before+3)

		a := s.get(t, "a")
		equal(t, "revision of a read", a.Header.Revision, before+3)
		if len(a.Kvs) != 1 || a.Count != 1 || a.More {
			t.Fatalf("get: %v", a)
		}
		equal(t, "key", string(a.Kvs[0].Key), s.key("a"))
		equal(t, "value", string(a.Kvs[0].Value), "2")
		equal(t, "create revision", a.Kvs[0].CreateRevision, before+1)
		equal(t, "mod revision", a.Kvs[0].ModRevision, before+2)
		equal(t, "version", a.Kvs[0].Version, 2)
		equal(t, "lease", a.Kvs[0].Lease, 0)

		b := s.get(t, "b")
		if len(b.Kvs) != 1 || len(b.Kvs[0].Value) != 0 || b.Kvs[0].Version != 1 {
			t.Errorf("a key with an empty value: %v", b.Kvs)
		}
		missing := s.get(t, "c")
		if len(missing.Kvs) != 0 || missing.Count != 0 || missing.More {
			t.Errorf("a missing key: %v", missing)
		}
		equal(t, "revision of a read that found nothing", missing.Header.Revision, before+3)
	})
}

func TestPutBinaryKeysAndValues(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		// In the order of bytes, unsigned, shorter first.
		names := []string{"", "\x00", "\x00\x00", "\x00\xff", "\x7f", "\x80", "\xc3\x28", "\xff", "\xff\xff"}
		for i := range names {
			name := names[len(names)-1-i]
			s.put(t, name, name+"\x00value\xff")
		}
		all := s.get(t, "", clientv3.WithPrefix())
		if len(all.Kvs) != len(names) {
			t.Fatalf("%d keys, want %d", len(all.Kvs), len(names))
		}
		for i, kv := range all.Kvs {
			equal(t, fmt.Sprintf("key %d", i), string(kv.Key), s.key(names[i]))
			equal(t, fmt.Sprintf("value %d", i), string(kv.Value), names[i]+"\x00value\xff")
		}
	})
}

func TestPutPreviousValue(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		first, err := s.Put(s.ctx, s.key("a"), "1", clientv3.WithPrevKV())
		if err != nil {
			t.Fatal(err)
		}
		if first.PrevKv != nil {
			t.Errorf("the first put has a previous value: %v", first.PrevKv)
		}
		second, err := s.Put(s.ctx, s.key("a"), "2", clientv3.WithPrevKV())
		if err != nil {
			t.Fatal(err)
		}
		p := second.PrevKv
		if p == nil || string(p.Value) != "1" || p.Version != 1 || p.ModRevision != first.Header.Revision || p.CreateRevision != first.Header.Revision {
			t.Errorf("previous value %v, want 1 at revision %d", p, first.Header.Revision)
		}
	})
}

func TestRangeBounds(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		for _, name := range []string{"a", "aa", "ab", "b", "c"} {
			s.put(t, name, name)
		}
		cases := []struct {
			what, from string
			option     clientv3.OpOption
			want       string
		}{
			{"single key", "a", nil, "a"},
			{"single key that is a prefix of none", "x", nil, ""},
			{"prefix", "a", clientv3.WithPrefix(), "a aa ab"},
			{"prefix of all", "", clientv3.WithPrefix(), "a aa ab b c"},
			{"the end is excluded", "a", clientv3.WithRange(s.key("b")), "a aa ab"},
			{"the start need not exist", "aaa", clientv3.WithRange(s.key("bb")), "ab b"},
			{"empty range", "b", clientv3.WithRange(s.key("b")), ""},
			{"range that ends before it starts", "c", clientv3.WithRange(s.key("a")), ""},
		}
		for _, c := range cases {
			var options []clientv3.OpOption
			if c.option != nil {
				options = append(options, c.option)
			}
			response := s.get(t, c.from, options...)
			equal(t, c.what, s.names(response.Kvs), c.want)
			equal(t, c.what+": count", response.Count, int64(len(response.Kvs)))
		}
		// From a key on to the end of everything: what follows belongs to others, so only the start is compared.
		response := s.get(t, "b", clientv3.WithFromKey())
		if len(response.Kvs) < 2 || s.names(response.Kvs[:2]) != "b c" {
			t.Errorf("from key: %s", s.names(response.Kvs))
		}
	})
}

func TestRangeLimitMoreCount(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		for i := range 10 {
			s.put(t, fmt.Sprintf("%d", i), "")
		}
		for _, c := range []struct {
			limit int64
			kvs   int
			more  bool
		}{{0, 10, false}, {1, 1, true}, {9, 9, true}, {10, 10, false}, {11, 10, false}} {
			response := s.get(t, "", clientv3.WithPrefix(), clientv3.WithLimit(c.limit))
			equal(t, fmt.Sprintf("limit %d: keys", c.limit), len(response.Kvs), c.kvs)
			equal(t, fmt.Sprintf("limit %d: more", c.limit), response.More, c.more)
			// Kubernetes computes the number of remaining items from this: it must not be that of the page.
			equal(t, fmt.Sprintf("limit %d: count", c.limit), response.Count, 10)
		}
		page := s.get(t, "4", clientv3.WithRange(clientv3.GetPrefixRangeEnd(s.prefix)), clientv3.WithLimit(2))
		equal(t, "a later page", s.names(page.Kvs), "4 5")
		equal(t, "a later page: count from there on", page.Count, 6)
		equal(t, "a later page: more", page.More, true)
	})
}

func TestRangeSort(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		// Each target puts these four into an order of its own.
		s.put(t, "b", "4")
		s.put(t, "d", "3")
		s.put(t, "a", "2")
		s.put(t, "c", "1")
		for range 3 {
			s.put(t, "a", "2")
		}
		s.put(t, "c", "1")
		for range 2 {
			s.put(t, "b", "4")
		}
		cases := []struct {
			target clientv3.SortTarget
			order  clientv3.SortOrder
			want   string
		}{
			{clientv3.SortByKey, clientv3.SortNone, "a b c d"},
			{clientv3.SortByKey, clientv3.SortAscend, "a b c d"},
			{clientv3.SortByKey, clientv3.SortDescend, "d c b a"},
			{clientv3.SortByVersion, clientv3.SortAscend, "d c b a"},
			{clientv3.SortByVersion, clientv3.SortDescend, "a b c d"},
			{clientv3.SortByCreateRevision, clientv3.SortAscend, "b d a c"},
			{clientv3.SortByCreateRevision, clientv3.SortDescend, "c a d b"},
			{clientv3.SortByModRevision, clientv3.SortAscend, "d a c b"},
			{clientv3.SortByModRevision, clientv3.SortDescend, "b c a d"},
			{clientv3.SortByValue, clientv3.SortAscend, "c a d b"},
			{clientv3.SortByValue, clientv3.SortDescend, "b d a c"},
			// Without an order, another target than the key is sorted in ascending order.
			{clientv3.SortByValue, clientv3.SortNone, "c a d b"},
		}
		for _, c := range cases {
			what := fmt.Sprintf("target %d order %d", c.target, c.order)
			response := s.get(t, "", clientv3.WithPrefix(), clientv3.WithSort(c.target, c.order))
			equal(t, what, s.names(response.Kvs), c.want)
			if c.order == clientv3.SortNone {
				continue
			}
			// The limit cuts the sorted list, not the list that is sorted.
			limited := s.get(t, "", clientv3.WithPrefix(), clientv3.WithSort(c.target, c.order), clientv3.WithLimit(2))
			equal(t, what+" limit 2", s.names(limited.Kvs), c.want[:3])
			equal(t, what+" limit 2: more", limited.More, true)
			equal(t, what+" limit 2: count", limited.Count, 4)
			keys := s.get(t, "", clientv3.WithPrefix(), clientv3.WithSort(c.target, c.order), clientv3.WithKeysOnly())
			equal(t, what+" keys only", s.names(keys.Kvs), c.want)
		}
	})
}

func TestRangeKeysOnlyAndCountOnly(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		for i := range 3 {
			s.put(t, fmt.Sprintf("%d", i), "old")
			s.put(t, fmt.Sprintf("%d", i), "new")
		}
		full := s.get(t, "", clientv3.WithPrefix())
		keys := s.get(t, "", clientv3.WithPrefix(), clientv3.WithKeysOnly())
		if len(keys.Kvs) != len(full.Kvs) {
			t.Fatalf("%d keys, want %d", len(keys.Kvs), len(full.Kvs))
		}
		for i, kv := range keys.Kvs {
			want := full.Kvs[i]
			if len(kv.Value) != 0 {
				t.Errorf("keys only, but %s has a value", kv.Key)
			}
			if !bytes.Equal(kv.Key, want.Key) || kv.ModRevision != want.ModRevision || kv.CreateRevision != want.CreateRevision || kv.Version != want.Version {
				t.Errorf("keys only: %v, want the revisions of %v", kv, want)
			}
		}
		count := s.get(t, "", clientv3.WithPrefix(), clientv3.WithCountOnly(), clientv3.WithLimit(1))
		equal(t, "count only", count.Count, 3)
		equal(t, "count only: keys", len(count.Kvs), 0)
		equal(t, "count only: more", count.More, false)
	})
}

func TestRangeRevisionFilters(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		created := s.put(t, "a", "1")
		s.put(t, "b", "1")
		s.put(t, "c", "1")
		s.put(t, "d", "1")
		s.put(t, "a", "2")
		s.put(t, "b", "2") // mod revisions: c +2, d +3, a +4, b +5; create revisions: a +0, b +1, c +2, d +3
		cases := []struct {
			what    string
			options []clientv3.OpOption
			want    string
			more    bool
		}{
			{"min mod", []clientv3.OpOption{clientv3.WithMinModRev(created + 4)}, "a b", false},
			{"max mod", []clientv3.OpOption{clientv3.WithMaxModRev(created + 3)}, "c d", false},
			{"min and max mod", []clientv3.OpOption{clientv3.WithMinModRev(created + 3), clientv3.WithMaxModRev(created + 4)}, "a d", false},
			{"min create", []clientv3.OpOption{clientv3.WithMinCreateRev(created + 2)}, "c d", false},
			{"max create", []clientv3.OpOption{clientv3.WithMaxCreateRev(created + 1)}, "a b", false},
			{"none", []clientv3.OpOption{clientv3.WithMinModRev(created + 6)}, "", false},
			// The filter comes first: the first key that is left is the third of the range.
			{"with a limit", []clientv3.OpOption{clientv3.WithMinCreateRev(created + 2), clientv3.WithLimit(1)}, "c", true},
			{"with a limit that is just enough", []clientv3.OpOption{clientv3.WithMinCreateRev(created + 2), clientv3.WithLimit(2)}, "c d", false},
			{"with a sort", []clientv3.OpOption{clientv3.WithMinModRev(created + 3), clientv3.WithSort(clientv3.SortByModRevision, clientv3.SortDescend), clientv3.WithLimit(2)}, "b a", true},
		}
		for _, c := range cases {
			response := s.get(t, "", append(c.options, clientv3.WithPrefix())...)
			equal(t, c.what, s.names(response.Kvs), c.want)
			equal(t, c.what+": more", response.More, c.more)
			equal(t, c.what+": count", response.Count, 4)
		}
	})
}

func TestRangeAtOldRevisions(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		start := s.revision(t)
		s.put(t, "a", "a1") // start+1
		s.put(t, "b", "b1") // start+2
		s.put(t, "a", "a2") // start+3
		s.delete(t, "a")    // start+4
		s.put(t, "c", "c1") // start+5
		s.put(t, "a", "a3") // start+6
		now := start + 6
		for i, want := range []string{"", "a1", "a1 b1", "a2 b1", "b1", "b1 c1", "a3 b1 c1"} {
			response := s.get(t, "", clientv3.WithPrefix(), clientv3.WithRev(start+int64(i)))
			equal(t, fmt.Sprintf("at revision start+%d", i), values(response.Kvs), want)
			equal(t, fmt.Sprintf("at revision start+%d: count", i), response.Count, int64(len(response.Kvs)))
			// The header tells the present, whatever was read.
			equal(t, fmt.Sprintf("at revision start+%d: header", i), response.Header.Revision, now)
			limited := s.get(t, "", clientv3.WithPrefix(), clientv3.WithRev(start+int64(i)), clientv3.WithLimit(1))
			equal(t, fmt.Sprintf("at revision start+%d with a limit: count", i), limited.Count, response.Count)
			counted := s.get(t, "", clientv3.WithPrefix(), clientv3.WithRev(start+int64(i)), clientv3.WithCountOnly())
			equal(t, fmt.Sprintf("at revision start+%d, count only", i), counted.Count, response.Count)
		}
		old := s.get(t, "a", clientv3.WithRev(start+3)).Kvs[0]
		if old.Version != 2 || old.CreateRevision != start+1 || old.ModRevision != start+3 {
			t.Errorf("the old a is %v", old)
		}
		reborn := s.get(t, "a").Kvs[0]
		if reborn.Version != 1 || reborn.CreateRevision != now || reborn.ModRevision != now {
			t.Errorf("the reborn a is %v", reborn)
		}
	})
}

func TestRangeAtFutureRevision(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		now := s.put(t, "a", "")
		_, err := s.Get(s.ctx, s.key("a"), clientv3.WithRev(now+1))
		wantError(t, err, rpctypes.ErrGRPCFutureRev)
		_, err = s.Get(s.ctx, s.key("a"), clientv3.WithRev(now+1), clientv3.WithSerializable())
		wantError(t, err, rpctypes.ErrGRPCFutureRev)
		_, err = s.Get(s.ctx, s.key("a"), clientv3.WithRev(now+1000), clientv3.WithCountOnly())
		wantError(t, err, rpctypes.ErrGRPCFutureRev)
		equal(t, "at the current revision", len(s.get(t, "a", clientv3.WithRev(now)).Kvs), 1)
		// Zero or less is the present.
		response, err := s.kv.Range(s.ctx, &pb.RangeRequest{Key: []byte(s.key("a")), Revision: -5})
		if err != nil || len(response.Kvs) != 1 {
			t.Errorf("at revision -5: %v %v", response, err)
		}
	})
}

func TestInvalidRequests(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		before := s.revision(t)
		_, err := s.kv.Put(s.ctx, &pb.PutRequest{Value: []byte("x")})
		wantError(t, err, rpctypes.ErrGRPCEmptyKey)
		_, err = s.kv.Range(s.ctx, &pb.RangeRequest{})
		wantError(t, err, rpctypes.ErrGRPCEmptyKey)
		_, err = s.kv.DeleteRange(s.ctx, &pb.DeleteRangeRequest{RangeEnd: []byte("x")})
		wantError(t, err, rpctypes.ErrGRPCEmptyKey)
		_, err = s.kv.Range(s.ctx, &pb.RangeRequest{Key: []byte("a"), SortOrder: 99})
		wantError(t, err, rpctypes.ErrGRPCInvalidSortOption)
		_, err = s.kv.Range(s.ctx, &pb.RangeRequest{Key: []byte("a"), SortTarget: 99})
		wantError(t, err, rpctypes.ErrGRPCInvalidSortOption)
		_, err = s.kv.Put(s.ctx, &pb.PutRequest{Key: []byte(s.key("a")), Value: []byte("x"), IgnoreValue: true})
		wantError(t, err, rpctypes.ErrGRPCValueProvided)
		_, err = s.kv.Put(s.ctx, &pb.PutRequest{Key: []byte(s.key("a")), Value: []byte("x"), Lease: 1, IgnoreLease: true})
		wantError(t, err, rpctypes.ErrGRPCLeaseProvided)
		_, err = s.kv.Put(s.ctx, &pb.PutRequest{Key: []byte(s.key("a")), IgnoreValue: true})
		wantError(t, err, rpctypes.ErrGRPCKeyNotFound)
		_, err = s.kv.Put(s.ctx, &pb.PutRequest{Key: []byte(s.key("a")), IgnoreLease: true})
		wantError(t, err, rpctypes.ErrGRPCKeyNotFound)
		_, err = s.Put(s.ctx, s.key("a"), "x", clientv3.WithLease(0x7eadbeef))
		wantError(t, err, rpctypes.ErrGRPCLeaseNotFound)
		equal(t, "revision after nothing but refused requests", s.revision(t), before)
	})
}

func TestDelete(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		for _, name := range []string{"c", "a", "b", "d"} {
			s.put(t, name, "value of "+name)
		}
		before := s.revision(t)
		missing, err := s.Delete(s.ctx, s.key("x"), clientv3.WithPrevKV())
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "deleting nothing: deleted", missing.Deleted, 0)
		equal(t, "deleting nothing: revision", missing.Header.Revision, before)
		equal(t, "deleting nothing: previous values", len(missing.PrevKvs), 0)

		several, err := s.Delete(s.ctx, s.key("a"), clientv3.WithRange(s.key("d")), clientv3.WithPrevKV())
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "deleted", several.Deleted, 3)
		equal(t, "one revision for all", several.Header.Revision, before+1)
		equal(t, "previous values in the order of keys", s.names(several.PrevKvs), "a b c")
		equal(t, "previous values", values(several.PrevKvs), "value of a value of b value of c")
		equal(t, "left", s.names(s.get(t, "", clientv3.WithPrefix()).Kvs), "d")

		one, err := s.Delete(s.ctx, s.key("d"))
		if err != nil {
			t.Fatal(err)
		}
		if one.Deleted != 1 || len(one.PrevKvs) != 0 || one.Header.Revision != before+2 {
			t.Errorf("deleting one: %v", one)
		}
	})
}

func TestPutIgnoreValueAndIgnoreLease(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		lease, err := s.Grant(s.ctx, 600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Revoke(s.ctx, lease.ID) })
		s.put(t, "a", "kept")

		s.put(t, "a", "", clientv3.WithIgnoreValue(), clientv3.WithLease(lease.ID))
		a := s.get(t, "a").Kvs[0]
		if string(a.Value) != "kept" || a.Lease != int64(lease.ID) || a.Version != 2 {
			t.Errorf("after a put that ignores the value: %v", a)
		}
		s.put(t, "a", "changed", clientv3.WithIgnoreLease())
		a = s.get(t, "a").Kvs[0]
		if string(a.Value) != "changed" || a.Lease != int64(lease.ID) || a.Version != 3 {
			t.Errorf("after a put that ignores the lease: %v", a)
		}
		// Neither ignored: the lease goes.
		s.put(t, "a", "again")
		a = s.get(t, "a").Kvs[0]
		if string(a.Value) != "again" || a.Lease != 0 || a.Version != 4 {
			t.Errorf("after a put without a lease: %v", a)
		}
	})
}

func TestRequestTooLarge(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		const limit = 3 << 19 // 1.5 MiB, etcd's default
		before := s.revision(t)
		_, err := s.Put(s.ctx, s.key("a"), strings.Repeat("x", limit+1))
		wantError(t, err, rpctypes.ErrGRPCRequestTooLarge)
		half := strings.Repeat("x", limit/2)
		_, err = s.Txn(s.ctx).Then(clientv3.OpPut(s.key("a"), half), clientv3.OpPut(s.key("b"), half)).Commit()
		wantError(t, err, rpctypes.ErrGRPCRequestTooLarge)
		equal(t, "revision", s.revision(t), before)

		fits := strings.Repeat("y", limit-4096)
		s.put(t, "a", fits)
		equal(t, "a value just below the limit", string(s.get(t, "a").Kvs[0].Value) == fits, true)
		// The limit is on what is asked, not on the answer.
		s.put(t, "b", fits)
		s.put(t, "c", fits)
		equal(t, "an answer above the limit", len(s.get(t, "", clientv3.WithPrefix()).Kvs), 3)
	})
}

func TestRangeStream(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		const keys = 300
		for i := 0; i < keys; i += 100 {
			var puts []clientv3.Op
			for j := range 100 {
				puts = append(puts, clientv3.OpPut(s.key(fmt.Sprintf("%03d", i+j)), strings.Repeat("v", 100+i+j)))
			}
			if _, err := s.Txn(s.ctx).Then(puts...).Commit(); err != nil {
				t.Fatal(err)
			}
		}
		request := func() *pb.RangeRequest {
			return &pb.RangeRequest{Key: []byte(s.prefix), RangeEnd: []byte(clientv3.GetPrefixRangeEnd(s.prefix))}
		}
		collect := func(request *pb.RangeRequest) (kvs []*mvccpb.KeyValue, last *pb.RangeResponse, err error) {
			stream, err := s.kv.RangeStream(s.ctx, request)
			if err != nil {
				return nil, nil, err
			}
			for {
				chunk, err := stream.Recv()
				if errors.Is(err, io.EOF) {
					return kvs, last, nil
				}
				if err != nil {
					return nil, nil, err
				}
				if last != nil && (last.Header != nil || last.More || last.Count != 0) {
					t.Errorf("a chunk before the last has header %v, more %v, count %d", last.Header, last.More, last.Count)
				}
				last = chunk.RangeResponse
				kvs = append(kvs, last.Kvs...)
			}
		}
		compare := func(what string, request *pb.RangeRequest) {
			t.Helper()
			whole, err := s.kv.Range(s.ctx, request)
			if err != nil {
				t.Fatal(err)
			}
			kvs, last, err := collect(request)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if last == nil || last.Header == nil || last.Header.MemberId == 0 {
				t.Fatalf("%s: the last chunk is %v", what, last)
			}
			equal(t, what+": keys", s.names(kvs), s.names(whole.Kvs))
			equal(t, what+": values", values(kvs), values(whole.Kvs))
			equal(t, what+": more", last.More, whole.More)
			equal(t, what+": count", last.Count, whole.Count)
		}
		compare("all", request())
		limited := request()
		limited.Limit = 25
		compare("limited", limited)
		keysOnly := request()
		keysOnly.KeysOnly = true
		compare("keys only", keysOnly)
		countOnly := request()
		countOnly.CountOnly = true
		compare("count only", countOnly)
		ascending := request()
		ascending.SortOrder = pb.RangeRequest_ASCEND
		compare("in ascending order", ascending)
		none := request()
		none.Key = []byte(s.prefix + "x")
		compare("nothing", none)
		old := request()
		old.Revision = s.put(t, "later", "") - 1
		compare("at an old revision", old)

		future := request()
		future.Revision = old.Revision + 1000
		_, _, err := collect(future)
		wantError(t, err, rpctypes.ErrGRPCFutureRev)
		descending := request()
		descending.SortOrder = pb.RangeRequest_DESCEND
		_, _, err = collect(descending)
		equal(t, "descending order", status.Code(err), codes.Unimplemented)
		filtered := request()
		filtered.MinModRevision = 1
		_, _, err = collect(filtered)
		equal(t, "revision filter", status.Code(err), codes.Unimplemented)
	})
}
