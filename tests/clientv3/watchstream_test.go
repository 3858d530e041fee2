package clientv3

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
)

// watchStream is one bare Watch stream. The client hides much of what is tested here: it merges fragments, swallows
// `created`, and starts watches anew.
type watchStream struct {
	t         *testing.T
	prefix    string
	stream    grpc.BidiStreamingClient[pb.WatchRequest, pb.WatchResponse]
	responses chan *pb.WatchResponse
}

// watchStreamBuffer is more than any test leaves unread.
const watchStreamBuffer = 20000

func (s *session) watch(t *testing.T) *watchStream {
	t.Helper()
	return s.watchWith(s.ctx, t)
}

func (s *session) watchWith(ctx context.Context, t *testing.T) *watchStream {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	t.Cleanup(cancel)
	stream, err := pb.NewWatchClient(s.ActiveConnection()).Watch(ctx, grpc.MaxCallRecvMsgSize(1<<30))
	if err != nil {
		t.Fatalf("opening a watch stream: %v", err)
	}
	w := &watchStream{t: t, prefix: s.prefix, stream: stream, responses: make(chan *pb.WatchResponse, watchStreamBuffer)}
	go func() {
		defer close(w.responses)
		for {
			response, err := stream.Recv()
			if err != nil {
				return
			}
			w.responses <- response
		}
	}()
	return w
}

func (w *watchStream) send(request *pb.WatchRequest) {
	w.t.Helper()
	if err := w.stream.Send(request); err != nil {
		w.t.Fatalf("sending on the watch stream: %v", err)
	}
}

// request asks for a watch without waiting for the answer.
func (w *watchStream) request(create *pb.WatchCreateRequest) {
	w.t.Helper()
	w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}})
}

// create asks for a watch and answers its `created`, which must be the next response.
func (w *watchStream) create(create *pb.WatchCreateRequest) *pb.WatchResponse {
	w.t.Helper()
	w.request(create)
	response := w.next()
	if !response.Created || response.Canceled || len(response.Events) != 0 || response.Header.GetRevision() == 0 {
		w.t.Fatalf("want created, got %v", response)
	}
	return response
}

func (w *watchStream) cancel(id int64) {
	w.t.Helper()
	w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: id}}})
}

func (w *watchStream) requestProgress() {
	w.t.Helper()
	w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
}

// next is the next response, whatever it is.
func (w *watchStream) next() *pb.WatchResponse {
	w.t.Helper()
	select {
	case response, ok := <-w.responses:
		if !ok {
			w.t.Fatal("the watch stream has ended")
		}
		return response
	case <-time.After(patience):
		w.t.Fatalf("no watch response within %s", patience)
	}
	return nil
}

// events reads responses until there are that many events, checking what is true of every response. The server decides
// how many revisions go into a response, but one revision never goes into two.
func (w *watchStream) events(count int) []*mvccpb.Event {
	w.t.Helper()
	var events []*mvccpb.Event
	last := map[int64]int64{}
	for len(events) < count {
		response := w.next()
		if response.Created || response.Canceled || response.Fragment || len(response.Events) == 0 {
			w.t.Fatalf("want events (%d of %d so far), got %v", len(events), count, response)
		}
		for _, event := range response.Events {
			if event.Kv.ModRevision > response.Header.Revision {
				w.t.Errorf("event at %d in a response of revision %d", event.Kv.ModRevision, response.Header.Revision)
			}
		}
		if first := response.Events[0].Kv.ModRevision; first <= last[response.WatchId] {
			w.t.Errorf("a response begins at revision %d after one that ended at %d", first, last[response.WatchId])
		}
		last[response.WatchId] = response.Events[len(response.Events)-1].Kv.ModRevision
		events = append(events, response.Events...)
	}
	if len(events) > count {
		w.t.Fatalf("%d events, want %d: %s", len(events), count, describe(events, w.prefix))
	}
	return events
}

// describe makes events readable: "put a=1, delete b".
func describe(events []*mvccpb.Event, prefix string) string {
	var all []string
	for _, event := range events {
		name := strings.TrimPrefix(string(event.Kv.Key), prefix)
		if event.Type == mvccpb.Event_PUT {
			all = append(all, fmt.Sprintf("put %s=%s", name, event.Kv.Value))
		} else {
			all = append(all, "delete "+name)
		}
	}
	return strings.Join(all, ", ")
}

// prefixWatch is a request for all keys of the test.
func (s *session) prefixWatch() *pb.WatchCreateRequest {
	return &pb.WatchCreateRequest{Key: []byte(s.prefix), RangeEnd: prefixEnd(s.prefix)}
}

// prefixEnd is the key after all keys with the prefix, none of which ends in 0xff here.
func prefixEnd(prefix string) []byte {
	end := []byte(prefix)
	end[len(end)-1]++
	return end
}
