package main

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

// watchable is any typed or dynamic client of one resource.
type watchable interface {
	Watch(ctx context.Context, options metav1.ListOptions) (watch.Interface, error)
}

// change is one event of a watch, as far as it matters here.
type change struct {
	eventType watch.EventType
	name      string
	revision  int64
	value     string
}

func (c change) String() string {
	return fmt.Sprintf("%s %s=%q at %d", c.eventType, c.name, c.value, c.revision)
}

// follower keeps a watch going from a resource version on, as a controller would: when the watch ends, it starts the next
// one where the last ended. Unlike an informer it never lists again, so a gap in the events cannot be papered over: "the
// resource version is too old" is an error.
type follower struct {
	cancel context.CancelFunc
	done   chan struct{}

	mutex    sync.Mutex
	changes  []change
	last     int64 // resource version of the newest event or bookmark
	restarts int
	err      error
}

// follow begins to watch. read picks from an object the value to remember.
func follow(ctx context.Context, resource watchable, resourceVersion string, read func(event watch.Event) string) (*follower, error) {
	start, err := strconv.ParseInt(resourceVersion, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("resource version %q: %w", resourceVersion, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	f := &follower{cancel: cancel, done: make(chan struct{}), last: start}
	go func() {
		defer close(f.done)
		for ctx.Err() == nil {
			err := f.watchOnce(ctx, resource, read)
			if err != nil && ctx.Err() == nil {
				f.mutex.Lock()
				f.err = err
				f.mutex.Unlock()
				return
			}
			f.mutex.Lock()
			f.restarts++
			f.mutex.Unlock()
			select {
			case <-ctx.Done():
			case <-time.After(pollInterval):
			}
		}
	}()
	return f, nil
}

// watchOnce answers an error only for what no retry could mend.
func (f *follower) watchOnce(ctx context.Context, resource watchable, read func(event watch.Event) string) error {
	f.mutex.Lock()
	from := strconv.FormatInt(f.last, 10)
	f.mutex.Unlock()
	w, err := resource.Watch(ctx, metav1.ListOptions{ResourceVersion: from, AllowWatchBookmarks: true})
	if apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return fmt.Errorf("the watch cannot go on from %s: %w", from, err)
	}
	if err != nil {
		return nil
	}
	defer w.Stop()
	for event := range w.ResultChan() {
		if event.Type == watch.Error {
			err := apierrors.FromObject(event.Object)
			if apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
				return fmt.Errorf("the watch from %s cannot go on: %w", from, err)
			}
			return nil
		}
		object, err := meta.Accessor(event.Object)
		if err != nil {
			return fmt.Errorf("event %s: %w", event.Type, err)
		}
		revision, err := strconv.ParseInt(object.GetResourceVersion(), 10, 64)
		if err != nil {
			return fmt.Errorf("event %s of %s: resource version %q", event.Type, object.GetName(), object.GetResourceVersion())
		}
		c := change{event.Type, object.GetName(), revision, ""}
		if event.Type != watch.Bookmark {
			c.value = read(event)
		}
		f.mutex.Lock()
		// A bookmark may repeat the newest revision: it says "everything up to here has been sent".
		backwards := revision < f.last || (revision == f.last && event.Type != watch.Bookmark)
		if backwards {
			err = fmt.Errorf("the watch went from revision %d to %s", f.last, c)
		} else {
			f.last = revision
			if event.Type != watch.Bookmark {
				f.changes = append(f.changes, c)
			}
		}
		f.mutex.Unlock()
		if backwards {
			return err
		}
	}
	return nil
}

// waitFor waits until the watch has come to the resource version, and answers everything it saw.
func (f *follower) waitFor(ctx context.Context, revision int64, patience time.Duration) ([]change, error) {
	var changes []change
	err := eventually(ctx, patience, fmt.Sprintf("the watch to reach revision %d", revision), func(context.Context) error {
		f.mutex.Lock()
		defer f.mutex.Unlock()
		if f.err != nil {
			return permanent(f.err)
		}
		if f.last < revision {
			return fmt.Errorf("it is at %d after %d events and %d restarts", f.last, len(f.changes), f.restarts)
		}
		changes = append([]change(nil), f.changes...)
		return nil
	})
	return changes, err
}

// stop ends the watch and answers how often it had to be started anew.
func (f *follower) stop() (restarts int) {
	f.cancel()
	<-f.done
	f.mutex.Lock()
	defer f.mutex.Unlock()
	// The last round was ended by us.
	return max(0, f.restarts-1)
}
