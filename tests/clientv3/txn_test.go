package clientv3

import (
	"fmt"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// commit runs a txn that must be accepted.
func (s *session) commit(t *testing.T, txn clientv3.Txn) *clientv3.TxnResponse {
	t.Helper()
	response, err := txn.Commit()
	if err != nil {
		t.Fatalf("txn: %v", err)
	}
	return response
}

// holds asks the server for the outcome of one comparison.
func (s *session) holds(t *testing.T, comparison clientv3.Cmp) bool {
	t.Helper()
	return s.commit(t, s.Txn(s.ctx).If(comparison)).Succeeded
}

func TestCompareTargets(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		lease, err := s.Grant(s.ctx, 600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Revoke(s.ctx, lease.ID) })
		s.put(t, "k", "a")
		s.put(t, "k", "m", clientv3.WithLease(lease.ID))
		kv := s.get(t, "k").Kvs[0]

		// The four operators on a value that is lower than, equal to, or greater than what is compared with.
		outcomes := map[string][3]bool{ // less, equal, greater
			"=": {false, true, false}, "!=": {true, false, true}, "<": {true, false, false}, ">": {false, false, true},
		}
		targets := []struct {
			name    string
			target  func(key string) clientv3.Cmp
			current any
			lower   any // what the current one is greater than
			higher  any
		}{
			{"version", clientv3.Version, kv.Version, kv.Version - 1, kv.Version + 1},
			{"create revision", clientv3.CreateRevision, kv.CreateRevision, kv.CreateRevision - 1, kv.CreateRevision + 1},
			{"mod revision", clientv3.ModRevision, kv.ModRevision, kv.ModRevision - 1, kv.ModRevision + 1},
			{"value", clientv3.Value, "m", "lm", "mm"},
			{"lease", clientv3.LeaseValue, kv.Lease, kv.Lease - 1, kv.Lease + 1},
		}
		for _, c := range targets {
			for operator, want := range outcomes {
				for i, with := range []any{c.higher, c.current, c.lower} {
					what := fmt.Sprintf("%s %v %s %v", c.name, c.current, operator, with)
					equal(t, what, s.holds(t, clientv3.Compare(c.target(s.key("k")), operator, with)), want[i])
				}
			}
		}

		// A missing key has all numbers 0 and no value: no comparison with its value holds, not even "is not".
		missing := s.key("missing")
		for operator, want := range outcomes {
			for _, target := range []func(string) clientv3.Cmp{clientv3.Version, clientv3.CreateRevision, clientv3.ModRevision, clientv3.LeaseValue} {
				equal(t, "missing "+operator+" 0", s.holds(t, clientv3.Compare(target(missing), operator, 0)), want[1])
				equal(t, "missing "+operator+" 1", s.holds(t, clientv3.Compare(target(missing), operator, 1)), want[0])
			}
			for _, value := range []string{"", "a"} {
				equal(t, "value of missing "+operator+" "+value, s.holds(t, clientv3.Compare(clientv3.Value(missing), operator, value)), false)
			}
		}

		// All comparisons must hold; none at all holds.
		exists := clientv3.Compare(clientv3.Version(s.key("k")), ">", 0)
		absent := clientv3.Compare(clientv3.Version(s.key("k")), "=", 0)
		equal(t, "both hold", s.commit(t, s.Txn(s.ctx).If(exists, exists)).Succeeded, true)
		equal(t, "one does not hold", s.commit(t, s.Txn(s.ctx).If(exists, absent)).Succeeded, false)
		equal(t, "nothing to compare", s.commit(t, s.Txn(s.ctx)).Succeeded, true)
	})
}

func TestCompareRanges(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		before := s.revision(t)
		s.put(t, "r/a", "x")
		s.put(t, "r/b", "x")
		s.put(t, "r/c", "y")
		s.put(t, "r/c", "y")
		all, ab, empty := s.key("r/"), s.key("r/c"), s.key("none/")
		cases := []struct {
			what       string
			comparison clientv3.Cmp
			want       bool
		}{
			{"every key matches", clientv3.Compare(clientv3.CreateRevision(all), ">", before).WithPrefix(), true},
			{"one key does not match", clientv3.Compare(clientv3.Value(all), "=", "x").WithPrefix(), false},
			{"the range without that key", clientv3.Compare(clientv3.Value(all), "=", "x").WithRange(ab), true},
			{"!= must hold for every key too", clientv3.Compare(clientv3.Value(all), "!=", "y").WithPrefix(), false},
			{"versions", clientv3.Compare(clientv3.Version(all), "<", 3).WithPrefix(), true},
			{"versions, one differs", clientv3.Compare(clientv3.Version(all), "=", 1).WithPrefix(), false},
			{"mod revisions", clientv3.Compare(clientv3.ModRevision(all), "<", before+5).WithPrefix(), true},
			{"leases", clientv3.Compare(clientv3.LeaseValue(all), "=", 0).WithPrefix(), true},
			// An empty range is like a missing key.
			{"empty range, version is 0", clientv3.Compare(clientv3.Version(empty), "=", 0).WithPrefix(), true},
			{"empty range, version is not 0", clientv3.Compare(clientv3.Version(empty), ">", 0).WithPrefix(), false},
			{"empty range, create revision is 0", clientv3.Compare(clientv3.CreateRevision(empty), "=", 0).WithPrefix(), true},
			{"empty range, mod revision is 0", clientv3.Compare(clientv3.ModRevision(empty), "=", 0).WithPrefix(), true},
			{"empty range, lease is 0", clientv3.Compare(clientv3.LeaseValue(empty), "=", 0).WithPrefix(), true},
			{"empty range, value =", clientv3.Compare(clientv3.Value(empty), "=", "x").WithPrefix(), false},
			{"empty range, value !=", clientv3.Compare(clientv3.Value(empty), "!=", "x").WithPrefix(), false},
		}
		for _, c := range cases {
			equal(t, c.what, s.holds(t, c.comparison), c.want)
		}
	})
}

func TestTxnBranches(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		txn := func() *clientv3.TxnResponse {
			return s.commit(t, s.Txn(s.ctx).
				If(clientv3.Compare(clientv3.ModRevision(s.key("k")), "=", 0)).
				Then(clientv3.OpPut(s.key("k"), "then")).
				Else(clientv3.OpGet(s.key("k"))))
		}
		before := s.revision(t)
		// What Kubernetes does to create an object, twice.
		first := txn()
		if !first.Succeeded || first.Header.Revision != before+1 || len(first.Responses) != 1 {
			t.Fatalf("first: %v", first)
		}
		put := first.Responses[0].GetResponsePut()
		if put == nil {
			t.Fatalf("first: response is %v", first.Responses[0])
		}
		// Inside, the headers carry the revision alone.
		if h := put.Header; h == nil || h.Revision != before+1 || h.ClusterId != 0 || h.MemberId != 0 || h.RaftTerm != 0 {
			t.Errorf("inner header: %v", h)
		}
		if first.Header.MemberId == 0 || first.Header.ClusterId == 0 || first.Header.RaftTerm == 0 {
			t.Errorf("outer header: %v", first.Header)
		}
		second := txn()
		if second.Succeeded || second.Header.Revision != before+1 || len(second.Responses) != 1 {
			t.Fatalf("second: %v", second)
		}
		got := second.Responses[0].GetResponseRange()
		if got == nil || values(got.Kvs) != "then" || got.Count != 1 {
			t.Errorf("second: response is %v", got)
		}
		if h := got.Header; h == nil || h.Revision != before+1 || h.MemberId != 0 {
			t.Errorf("inner header of a range: %v", h)
		}
	})
}

func TestTxnWithoutEffectKeepsTheRevision(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		before := s.put(t, "k", "")
		never := clientv3.Compare(clientv3.Version(s.key("k")), "=", 0)
		for what, txn := range map[string]clientv3.Txn{
			"empty":                           s.Txn(s.ctx),
			"failed compare without else":     s.Txn(s.ctx).If(never).Then(clientv3.OpPut(s.key("k"), "x")),
			"failed compare, else only reads": s.Txn(s.ctx).If(never).Then(clientv3.OpPut(s.key("k"), "x")).Else(clientv3.OpGet(s.key("k"))),
			"reads":                           s.Txn(s.ctx).Then(clientv3.OpGet(s.key("k")), clientv3.OpGet(s.prefix, clientv3.WithPrefix())),
			"delete of nothing":               s.Txn(s.ctx).Then(clientv3.OpDelete(s.key("missing")), clientv3.OpDelete(s.key("missing too"))),
			"nested, without effect":          s.Txn(s.ctx).Then(clientv3.OpTxn([]clientv3.Cmp{never}, []clientv3.Op{clientv3.OpPut(s.key("k"), "x")}, nil)),
		} {
			response := s.commit(t, txn)
			equal(t, what+": revision in the answer", response.Header.Revision, before)
			equal(t, what+": revision", s.revision(t), before)
		}
		equal(t, "mod revision", s.get(t, "k").Kvs[0].ModRevision, before)
	})
}

func TestTxnIsOneRevision(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		s.put(t, "old1", "")
		before := s.put(t, "old2", "")
		response := s.commit(t, s.Txn(s.ctx).Then(
			clientv3.OpPut(s.key("b"), "b"),
			clientv3.OpDelete(s.key("old"), clientv3.WithPrefix(), clientv3.WithPrevKV()),
			clientv3.OpPut(s.key("a"), "a", clientv3.WithPrevKV()),
			clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpPut(s.key("c"), "c")}, nil),
		))
		equal(t, "revision", response.Header.Revision, before+1)
		deleted := response.Responses[1].GetResponseDeleteRange()
		if deleted.Deleted != 2 || s.names(deleted.PrevKvs) != "old1 old2" {
			t.Errorf("delete: %v", deleted)
		}
		if p := response.Responses[2].GetResponsePut(); p.PrevKv != nil {
			t.Errorf("previous value of a new key: %v", p.PrevKv)
		}
		for _, kv := range s.get(t, "", clientv3.WithPrefix()).Kvs {
			if kv.ModRevision != before+1 || kv.CreateRevision != before+1 || kv.Version != 1 {
				t.Errorf("%v, want everything at revision %d", kv, before+1)
			}
		}
		// Nothing in between can be read.
		equal(t, "before", s.names(s.get(t, "", clientv3.WithPrefix(), clientv3.WithRev(before)).Kvs), "old1 old2")
		equal(t, "after", s.names(s.get(t, "", clientv3.WithPrefix(), clientv3.WithRev(before+1)).Kvs), "a b c")
	})
}

func TestTxnReadsItsOwnWrites(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		s.put(t, "gone", "g")
		before := s.put(t, "k", "old")
		response := s.commit(t, s.Txn(s.ctx).Then(
			clientv3.OpGet(s.key("k")),
			clientv3.OpPut(s.key("k"), "new"),
			clientv3.OpGet(s.key("k")),
			clientv3.OpDelete(s.key("gone")),
			clientv3.OpGet(s.prefix, clientv3.WithPrefix()),
			clientv3.OpPut(s.key("another"), "a"),
			clientv3.OpGet(s.prefix, clientv3.WithPrefix(), clientv3.WithCountOnly()),
			clientv3.OpGet(s.prefix, clientv3.WithPrefix(), clientv3.WithRev(before)),
			clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpGet(s.key("another"))}, nil),
		))
		read := func(i int) *pb.RangeResponse { return response.Responses[i].GetResponseRange() }
		equal(t, "before the put", values(read(0).Kvs), "old")
		equal(t, "after the put", values(read(2).Kvs), "new")
		equal(t, "mod revision inside", read(2).Kvs[0].ModRevision, before+1)
		equal(t, "version inside", read(2).Kvs[0].Version, 2)
		equal(t, "after the delete", s.names(read(4).Kvs), "k")
		equal(t, "count after another put", read(6).Count, 2)
		equal(t, "at the revision before", values(read(7).Kvs), "g old")
		nested := response.Responses[8].GetResponseTxn()
		equal(t, "nested", values(nested.Responses[0].GetResponseRange().Kvs), "a")
	})
}

func TestTxnNested(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		absent := clientv3.Compare(clientv3.Version(s.key("k")), "=", 0)
		present := clientv3.Compare(clientv3.Version(s.key("k")), ">", 0)
		// All comparisons look at the state before the whole txn, also those that come after a write.
		response := s.commit(t, s.Txn(s.ctx).If(absent).Then(
			clientv3.OpPut(s.key("k"), "outer"),
			clientv3.OpTxn([]clientv3.Cmp{absent},
				[]clientv3.Op{
					clientv3.OpPut(s.key("seen"), "absent"),
					clientv3.OpTxn([]clientv3.Cmp{present}, nil, []clientv3.Op{clientv3.OpGet(s.key("k"))}),
				},
				[]clientv3.Op{clientv3.OpPut(s.key("seen"), "present")}),
		))
		if !response.Succeeded || len(response.Responses) != 2 {
			t.Fatalf("outer: %v", response)
		}
		middle := response.Responses[1].GetResponseTxn()
		if middle == nil || !middle.Succeeded || len(middle.Responses) != 2 {
			t.Fatalf("middle: %v", middle)
		}
		inner := middle.Responses[1].GetResponseTxn()
		if inner == nil || inner.Succeeded || len(inner.Responses) != 1 {
			t.Fatalf("inner: %v", inner)
		}
		equal(t, "the innermost read sees the write", values(inner.Responses[0].GetResponseRange().Kvs), "outer")
		equal(t, "which branch ran", values(s.get(t, "seen").Kvs), "absent")
		equal(t, "one revision", s.get(t, "seen").Kvs[0].ModRevision, s.get(t, "k").Kvs[0].ModRevision)
	})
}

func TestTxnDuplicateKeys(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		before := s.revision(t)
		put := func(name string) clientv3.Op { return clientv3.OpPut(s.key(name), "") }
		remove := func(name string) clientv3.Op { return clientv3.OpDelete(s.key(name)) }
		then := func(ops ...clientv3.Op) clientv3.Op { return clientv3.OpTxn(nil, ops, nil) }
		refused := map[string][]clientv3.Op{
			"the same put twice":                     {put("a"), put("a")},
			"put, then delete":                       {put("a"), remove("a")},
			"delete, then put":                       {remove("a"), put("a")},
			"put within a deleted range":             {put("ab"), clientv3.OpDelete(s.key("a"), clientv3.WithPrefix())},
			"put outside and in a nested txn":        {put("a"), then(put("a"))},
			"put in two nested txns":                 {then(put("a")), then(put("a"))},
			"deleted outside, put in a nested txn":   {remove("a"), then(put("a"))},
			"put outside, deleted in a nested txn":   {put("a"), then(remove("a"))},
			"the same put twice within a nested txn": {then(put("a"), put("a"))},
		}
		for what, ops := range refused {
			for _, branch := range []string{"success", "failure"} {
				txn := s.Txn(s.ctx).Then(ops...)
				if branch == "failure" {
					// Checked although this branch would not be taken.
					txn = s.Txn(s.ctx).Else(ops...)
				}
				_, err := txn.Commit()
				if err == nil {
					t.Errorf("%s (%s): accepted", what, branch)
					continue
				}
				t.Run(strings.ReplaceAll(what, " ", "_")+"_"+branch, func(t *testing.T) { wantError(t, err, rpctypes.ErrGRPCDuplicateKey) })
			}
		}
		equal(t, "revision after nothing but refused txns", s.revision(t), before)

		accepted := map[string]clientv3.Txn{
			"the same key in both branches":             s.Txn(s.ctx).Then(put("b")).Else(put("b")),
			"deletes that overlap":                      s.Txn(s.ctx).Then(clientv3.OpDelete(s.key("b"), clientv3.WithPrefix()), remove("b")),
			"put just outside a deleted range":          s.Txn(s.ctx).Then(clientv3.OpDelete(s.key("c"), clientv3.WithRange(s.key("d"))), put("d")),
			"both branches of a nested txn put the key": s.Txn(s.ctx).Then(clientv3.OpTxn(nil, []clientv3.Op{put("e")}, []clientv3.Op{put("e")})),
		}
		for what, txn := range accepted {
			if _, err := txn.Commit(); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
	})
}

func TestTxnBudget(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		const budget = 128
		puts := func(from, count int) []clientv3.Op {
			var ops []clientv3.Op
			for i := range count {
				ops = append(ops, clientv3.OpPut(s.key(fmt.Sprintf("%04d", from+i)), ""))
			}
			return ops
		}
		compares := func(count int) []clientv3.Cmp {
			var all []clientv3.Cmp
			for range count {
				all = append(all, clientv3.Compare(clientv3.Version(s.key("k")), "=", 0))
			}
			return all
		}
		full := s.commit(t, s.Txn(s.ctx).If(compares(budget)...).Then(puts(0, budget)...).Else(puts(0, budget)...))
		if !full.Succeeded || len(full.Responses) != budget {
			t.Errorf("the whole budget: succeeded %v, %d responses", full.Succeeded, len(full.Responses))
		}
		before := s.revision(t)
		for what, txn := range map[string]clientv3.Txn{
			"success":  s.Txn(s.ctx).Then(puts(0, budget+1)...),
			"failure":  s.Txn(s.ctx).Else(puts(0, budget+1)...),
			"compares": s.Txn(s.ctx).If(compares(budget + 1)...),
			// A nested txn gets what its parent leaves: 128 - 100.
			"nested": s.Txn(s.ctx).Then(append(puts(0, 99), clientv3.OpTxn(nil, puts(200, budget-100+1), nil))...),
			// And the parent's larger branch counts, whichever the nested one is in.
			"nested in the small branch": s.Txn(s.ctx).Then(clientv3.OpTxn(nil, puts(200, 29), nil)).Else(puts(0, 100)...),
		} {
			_, err := txn.Commit()
			t.Run(strings.ReplaceAll(what, " ", "_"), func(t *testing.T) { wantError(t, err, rpctypes.ErrGRPCTooManyOps) })
		}
		equal(t, "revision after nothing but refused txns", s.revision(t), before)
		s.commit(t, s.Txn(s.ctx).Then(append(puts(0, 99), clientv3.OpTxn(nil, puts(200, budget-100), nil))...))
	})
}

func TestTxnRefusedHasNoEffect(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		before := s.put(t, "k", "old")
		write := clientv3.OpPut(s.key("k"), "new")
		never := []clientv3.Cmp{clientv3.Compare(clientv3.Version(s.key("k")), "=", 0)}
		future := clientv3.OpGet(s.key("k"), clientv3.WithRev(before+1000))
		cases := []struct {
			what string
			op   clientv3.Op
			want error
		}{
			{"a range at a future revision", future, rpctypes.ErrGRPCFutureRev},
			{"a lease that does not exist", clientv3.OpPut(s.key("b"), "", clientv3.WithLease(0x7eadbeef)), rpctypes.ErrGRPCLeaseNotFound},
			{"ignore_value of a missing key", clientv3.OpPut(s.key("missing"), "", clientv3.WithIgnoreValue()), rpctypes.ErrGRPCKeyNotFound},
			{"ignore_lease of a missing key", clientv3.OpPut(s.key("missing"), "x", clientv3.WithIgnoreLease()), rpctypes.ErrGRPCKeyNotFound},
		}
		for _, c := range cases {
			t.Run(strings.ReplaceAll(c.what, " ", "_"), func(t *testing.T) {
				_, err := s.Txn(s.ctx).Then(write, c.op).Commit()
				wantError(t, err, c.want)
				_, err = s.Txn(s.ctx).Then(write, clientv3.OpTxn(nil, []clientv3.Op{c.op}, nil)).Commit()
				wantError(t, err, c.want)
				// The branch that is not taken is not looked at.
				response := s.commit(t, s.Txn(s.ctx).If(never...).Then(c.op).Else(clientv3.OpGet(s.key("k"))))
				equal(t, "value", values(response.Responses[0].GetResponseRange().Kvs), "old")
			})
		}
		equal(t, "revision after nothing but refused txns", s.revision(t), before)
		equal(t, "value", values(s.get(t, "k").Kvs), "old")
	})
}

func TestTxnInvalidRequests(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		before := s.revision(t)
		put := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(s.key("k"))}}}
		for what, c := range map[string]struct {
			request *pb.TxnRequest
			want    error
		}{
			"compare without a key": {&pb.TxnRequest{Compare: []*pb.Compare{{}}, Success: []*pb.RequestOp{put}}, rpctypes.ErrGRPCEmptyKey},
			"put without a key":     {&pb.TxnRequest{Success: []*pb.RequestOp{put, {Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{}}}}}, rpctypes.ErrGRPCEmptyKey},
			"range without a key":   {&pb.TxnRequest{Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{}}}}}, rpctypes.ErrGRPCEmptyKey},
			"delete without a key":  {&pb.TxnRequest{Success: []*pb.RequestOp{put, {Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{}}}}}, rpctypes.ErrGRPCEmptyKey},
			"value and ignore_value": {&pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{
				Key: []byte(s.key("k")), Value: []byte("x"), IgnoreValue: true}}}}}, rpctypes.ErrGRPCValueProvided},
			"lease and ignore_lease": {&pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{
				Key: []byte(s.key("k")), Lease: 1, IgnoreLease: true}}}}}, rpctypes.ErrGRPCLeaseProvided},
			// Odd, but it is what etcd says to an operation that is none.
			"empty operation":                     {&pb.TxnRequest{Success: []*pb.RequestOp{put, {}}}, rpctypes.ErrGRPCKeyNotFound},
			"empty operation in the other branch": {&pb.TxnRequest{Success: []*pb.RequestOp{put}, Failure: []*pb.RequestOp{{}}}, rpctypes.ErrGRPCKeyNotFound},
		} {
			_, err := s.kv.Txn(s.ctx, c.request)
			t.Run(strings.ReplaceAll(what, " ", "_"), func(t *testing.T) { wantError(t, err, c.want) })
		}
		equal(t, "revision after nothing but refused txns", s.revision(t), before)
	})
}

// A range that goes "to the end" escapes etcd's check for duplicate keys, so one txn can put a key and delete it: two
// events of one key at one revision. Storage that is keyed by (key, revision) alone would not survive this.
func TestTxnPutAndDeleteToTheEnd(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		// Nobody else's keys are this far behind.
		last := "\xff\xff\xff" + s.prefix
		response := s.commit(t, s.Txn(s.ctx).Then(
			clientv3.OpPut(last+"1", "one"),
			clientv3.OpDelete(last, clientv3.WithFromKey()),
			clientv3.OpPut(last+"2", "two"),
		))
		revision := response.Header.Revision
		equal(t, "deleted", response.Responses[1].GetResponseDeleteRange().Deleted, 1)
		left, err := s.Get(s.ctx, last, clientv3.WithFromKey())
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "left", values(left.Kvs), "two")

		w := s.watch(t)
		w.create(&pb.WatchCreateRequest{Key: []byte(last), RangeEnd: []byte{0}, StartRevision: revision})
		equal(t, "events", describe(w.events(3), last), "put 1=one, delete 1, put 2=two")

		if _, err := s.Put(s.ctx, last+"1", "again"); err != nil {
			t.Fatal(err)
		}
		again, err := s.Get(s.ctx, last+"1")
		if err != nil {
			t.Fatal(err)
		}
		if kv := again.Kvs[0]; kv.Version != 1 || kv.CreateRevision != revision+1 {
			t.Errorf("put again: %v, want a new key", kv)
		}
		if _, err := s.Delete(s.ctx, last, clientv3.WithFromKey()); err != nil {
			t.Fatal(err)
		}
	})
}
