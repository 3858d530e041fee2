package clientv3

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/status"
)

// patience bounds each wait for something that must happen. It is generous: a slow machine is not a wrong answer.
const patience = 20 * time.Second

// session is what a test gets: a client of one endpoint, one of each other, and keys of its own.
type session struct {
	*clientv3.Client
	// ctx ends with the test.
	ctx      context.Context
	endpoint string
	prefix   string
	// all has a client of every endpoint, this one's included.
	all []*clientv3.Client
	// kv is the bare protocol under the client, for requests that the client would not make.
	kv pb.KVClient
}

func endpoints(t *testing.T) []string {
	t.Helper()
	text := os.Getenv("ETCD_ENDPOINTS")
	if text == "" {
		t.Fatal("set ETCD_ENDPOINTS to the client URLs of a running cluster, such as http://127.0.0.1:2379,http://127.0.0.1:22379")
	}
	return strings.Split(text, ",")
}

func newClient(t *testing.T, endpoint string) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints:   []string{endpoint},
		DialTimeout: 5 * time.Second,
		// Many tests provoke errors, each of which the client would print.
		Logger: zap.NewNop(),
	})
	if err != nil {
		t.Fatalf("connecting to %s: %v", endpoint, err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// throughEachEndpoint runs the test once for each node.
func throughEachEndpoint(t *testing.T, test func(t *testing.T, s *session)) {
	t.Helper()
	for i := range endpoints(t) {
		t.Run(fmt.Sprintf("endpoint%d", i+1), func(t *testing.T) { test(t, newSession(t, i)) })
	}
}

// throughOneEndpoint is for tests that take long, or that use all nodes anyway.
func throughOneEndpoint(t *testing.T, test func(t *testing.T, s *session)) {
	t.Helper()
	test(t, newSession(t, 0))
}

func newSession(t *testing.T, index int) *session {
	t.Helper()
	s := &session{prefix: fmt.Sprintf("clientv3/%s/%d/", t.Name(), time.Now().UnixNano())}
	for i, endpoint := range endpoints(t) {
		client := newClient(t, endpoint)
		s.all = append(s.all, client)
		if i == index {
			s.Client, s.endpoint, s.kv = client, endpoint, pb.NewKVClient(client.ActiveConnection())
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	s.ctx = ctx
	t.Cleanup(func() {
		// The keys are removed before the clients are closed; the order of clean-ups is last in, first out.
		_, _ = s.Delete(ctx, s.prefix, clientv3.WithPrefix())
		cancel()
	})
	return s
}

// key is a key of this test alone.
func (s *session) key(name string) string { return s.prefix + name }

// put writes and answers the revision.
func (s *session) put(t *testing.T, name, value string, options ...clientv3.OpOption) int64 {
	t.Helper()
	response, err := s.Put(s.ctx, s.key(name), value, options...)
	if err != nil {
		t.Fatalf("put %s: %v", name, err)
	}
	return response.Header.Revision
}

// get reads, and the test ends if that fails.
func (s *session) get(t *testing.T, name string, options ...clientv3.OpOption) *clientv3.GetResponse {
	t.Helper()
	response, err := s.Get(s.ctx, s.key(name), options...)
	if err != nil {
		t.Fatalf("get %s: %v", name, err)
	}
	return response
}

// delete removes and answers the revision.
func (s *session) delete(t *testing.T, name string, options ...clientv3.OpOption) int64 {
	t.Helper()
	response, err := s.Delete(s.ctx, s.key(name), options...)
	if err != nil {
		t.Fatalf("delete %s: %v", name, err)
	}
	return response.Header.Revision
}

// revision is the store's current one.
func (s *session) revision(t *testing.T) int64 {
	t.Helper()
	return s.get(t, "no such key").Header.Revision
}

// names strips the prefix off the keys.
func (s *session) names(kvs []*mvccpb.KeyValue) string {
	var names []string
	for _, kv := range kvs {
		names = append(names, strings.TrimPrefix(string(kv.Key), s.prefix))
	}
	return strings.Join(names, " ")
}

// values joins the values.
func values(kvs []*mvccpb.KeyValue) string {
	var all []string
	for _, kv := range kvs {
		all = append(all, string(kv.Value))
	}
	return strings.Join(all, " ")
}

// wantError compares code and text, whether the error comes from the client or from the bare protocol.
func wantError(t *testing.T, got, want error) {
	t.Helper()
	if got == nil {
		t.Fatalf("no error, want %q", rpctypes.ErrorDesc(want))
	}
	wanted := status.Convert(want)
	var etcdError rpctypes.EtcdError
	if errors.As(got, &etcdError) {
		if etcdError.Code() != wanted.Code() || etcdError.Error() != wanted.Message() {
			t.Fatalf("error %s %q, want %s %q", etcdError.Code(), etcdError.Error(), wanted.Code(), wanted.Message())
		}
		return
	}
	if s := status.Convert(got); s.Code() != wanted.Code() || s.Message() != wanted.Message() {
		t.Fatalf("error %s %q, want %s %q", s.Code(), s.Message(), wanted.Code(), wanted.Message())
	}
}

// equal compares what was got with what was wanted.
func equal[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// eventually polls until check answers nil.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %s for %s: %v", patience, what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
