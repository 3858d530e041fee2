package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
)

const (
	loadWriters = 8
	// updatesPerObject come after each create, so that both kinds of write run all the time.
	updatesPerObject = 9
	// loadPause between the writes of one writer leaves the processor to the servers, and bounds the history.
	loadPause = 20 * time.Millisecond
	// attemptTimeout is well above what a leader election takes.
	attemptTimeout = 10 * time.Second
)

// acknowledged is the last write of an object for which kube-apiserver answered "done".
type acknowledged struct {
	sequence int
	revision int64
}

// load is a set of writers, each with objects of its own, which remember every write that was acknowledged.
//
// An error leaves open whether the write took place. The writers then repeat it, which Kubernetes' conditions on the
// revision make safe, until they know: so at the end every object must hold exactly its last acknowledged value, and a
// watch must have seen the values 0, 1, 2, ... of every object, each once.
type load struct {
	configMaps typedcorev1.ConfigMapInterface
	namespace  string
	follower   *follower
	cancel     context.CancelFunc
	group      sync.WaitGroup

	mutex      sync.Mutex
	objects    map[string]acknowledged
	writes     int
	errors     int
	sampleErr  error
	newest     int64
	lastWrite  time.Time
	longestGap time.Duration
	violations []error
}

// startLoad begins to write into the namespace. halt ends it.
func (h *harness) startLoad(ctx context.Context, namespace string) (*load, error) {
	l := &load{
		configMaps: h.apiServer.kube.CoreV1().ConfigMaps(namespace),
		namespace:  namespace,
		objects:    map[string]acknowledged{},
		lastWrite:  time.Now(),
	}
	list, err := l.configMaps.List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	if l.follower, err = follow(ctx, l.configMaps, list.ResourceVersion, configMapValue); err != nil {
		return nil, err
	}
	running, cancel := context.WithCancel(ctx)
	l.cancel = cancel
	for w := range loadWriters {
		// The writers get the outer context for their requests, so that halt lets each finish the write it is at.
		l.group.Go(func() { l.write(ctx, running, w) })
	}
	return l, nil
}

func (l *load) write(ctx, running context.Context, writer int) {
	for object := 0; running.Err() == nil; object++ {
		name := fmt.Sprintf("writer-%d-%05d", writer, object)
		revision := ""
		for sequence := 0; sequence <= updatesPerObject && running.Err() == nil; sequence++ {
			var err error
			if revision, err = l.writeUntilKnown(ctx, name, sequence, revision); err != nil {
				if ctx.Err() == nil {
					l.mutex.Lock()
					l.violations = append(l.violations, err)
					l.mutex.Unlock()
				}
				return
			}
			select {
			case <-running.Done():
			case <-time.After(loadPause):
			}
		}
	}
}

// writeUntilKnown creates (sequence 0) or updates one object and comes back when the write is known to be done.
func (l *load) writeUntilKnown(ctx context.Context, name string, sequence int, revision string) (newRevision string, err error) {
	object := configMap(l.namespace, name, strconv.Itoa(sequence))
	object.ResourceVersion = revision
	for unsure := false; ; {
		var result *corev1.ConfigMap
		err := func() (err error) {
			ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
			defer cancel()
			if sequence == 0 {
				result, err = l.configMaps.Create(ctx, object, metav1.CreateOptions{})
			} else {
				result, err = l.configMaps.Update(ctx, object, metav1.UpdateOptions{})
			}
			if unsure && (apierrors.IsAlreadyExists(err) || apierrors.IsConflict(err)) {
				// Probably our own earlier attempt.
				result, err = l.configMaps.Get(ctx, name, metav1.GetOptions{})
				if err == nil && result.Data[valueKey] != object.Data[valueKey] {
					return permanent(fmt.Errorf("%s was refused with a conflict and holds %q, but only we write it and we are at %d", name, result.Data[valueKey], sequence))
				}
			}
			return err
		}()
		var final permanentError
		switch {
		case err == nil:
			return result.ResourceVersion, l.acknowledge(name, sequence, result.ResourceVersion)
		case ctx.Err() != nil:
			return "", ctx.Err()
		case errors.As(err, &final):
			return "", final.error
		case apierrors.IsAlreadyExists(err), apierrors.IsConflict(err), apierrors.IsNotFound(err), apierrors.IsInvalid(err):
			return "", fmt.Errorf("writing %d to %s: %w: only we write it", sequence, name, err)
		}
		unsure = true
		l.mutex.Lock()
		l.errors++
		l.sampleErr = err
		l.mutex.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(pollInterval):
		}
	}
}

func (l *load) acknowledge(name string, sequence int, resourceVersion string) error {
	revision, err := strconv.ParseInt(resourceVersion, 10, 64)
	if err != nil {
		return err
	}
	l.mutex.Lock()
	defer l.mutex.Unlock()
	l.objects[name] = acknowledged{sequence, revision}
	l.writes++
	l.newest = max(l.newest, revision)
	now := time.Now()
	l.longestGap = max(l.longestGap, now.Sub(l.lastWrite))
	l.lastWrite = now
	return nil
}

// writesSoFar counts the acknowledged writes.
func (l *load) writesSoFar() int {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	return l.writes
}

// waitForMoreWrites waits until that many more were acknowledged.
func (l *load) waitForMoreWrites(ctx context.Context, count int, patience time.Duration) error {
	target := l.writesSoFar() + count
	return eventually(ctx, patience, fmt.Sprintf("%d more writes", count), func(context.Context) error {
		l.mutex.Lock()
		defer l.mutex.Unlock()
		if len(l.violations) > 0 {
			return permanent(errors.Join(l.violations...))
		}
		if l.writes < target {
			return fmt.Errorf("%d are missing; the last error was: %v", target-l.writes, l.sampleErr)
		}
		return nil
	})
}

// halt lets the writers finish, and then compares what they remember with the API, with what one node has stored, and
// with the watch.
func (l *load) halt(ctx context.Context, c *cluster, from *node) (detail string, err error) {
	l.cancel()
	l.group.Wait()
	if err := errors.Join(l.violations...); err != nil {
		return "", err
	}
	if ctx.Err() != nil {
		return "", ctx.Err()
	}

	list, err := l.configMaps.List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	listed := map[string]acknowledged{}
	for _, c := range list.Items {
		sequence, err := strconv.Atoi(c.Data[valueKey])
		if err != nil {
			return "", fmt.Errorf("%s holds %q", c.Name, c.Data[valueKey])
		}
		revision, err := strconv.ParseInt(c.ResourceVersion, 10, 64)
		if err != nil {
			return "", err
		}
		listed[c.Name] = acknowledged{sequence, revision}
	}
	if err := l.compare("the API", listed); err != nil {
		return "", err
	}

	if _, err := c.waitCaughtUp(ctx, from, recoveryPatience); err != nil {
		return "", err
	}
	prefix := "/registry/configmaps/" + l.namespace + "/"
	keys, err := from.stored(ctx, []string{prefix})
	if err != nil {
		return "", err
	}
	stored := map[string]acknowledged{}
	for key, value := range keys {
		// One version is one write: a write done twice would show here.
		stored[key[len(prefix):]] = acknowledged{int(value.version) - 1, value.modRevision}
	}
	if err := l.compare("the storage", stored); err != nil {
		return "", err
	}

	changes, err := l.follower.waitFor(ctx, l.newest, 60*time.Second)
	if err != nil {
		return "", err
	}
	restarts := l.follower.stop()
	watched := map[string]acknowledged{}
	for _, c := range changes {
		want := 0
		eventType := watch.Added
		if before, known := watched[c.name]; known {
			want, eventType = before.sequence+1, watch.Modified
		}
		if c.value != strconv.Itoa(want) || c.eventType != eventType {
			return "", fmt.Errorf("the watch saw %s, want %s of %d", c, eventType, want)
		}
		watched[c.name] = acknowledged{want, c.revision}
	}
	if err := l.compare("the watch", watched); err != nil {
		return "", err
	}
	if len(changes) != l.writes {
		return "", fmt.Errorf("the watch saw %d events for %d writes", len(changes), l.writes)
	}
	return fmt.Sprintf("%d writes acknowledged, %d attempts failed, longest pause %.1f s; the watch saw all and was restarted %d times",
		l.writes, l.errors, l.longestGap.Seconds(), restarts), nil
}

// compare wants the same objects at the same state as the writers remember.
func (l *load) compare(where string, found map[string]acknowledged) error {
	var errs []error
	for name, want := range l.objects {
		got, ok := found[name]
		if !ok {
			errs = append(errs, fmt.Errorf("LOST: %s, written and acknowledged as %d at revision %d, is not in %s", name, want.sequence, want.revision, where))
		} else if got != want {
			errs = append(errs, fmt.Errorf("LOST: %s was acknowledged as %d at revision %d; %s has %d at revision %d", name, want.sequence, want.revision, where, got.sequence, got.revision))
		}
	}
	for name := range found {
		if _, ok := l.objects[name]; !ok {
			errs = append(errs, fmt.Errorf("%s is in %s, but no write of it was ever acknowledged", name, where))
		}
	}
	return joinFirst(errs, 10)
}

// joinFirst keeps a report readable.
func joinFirst(errs []error, limit int) error {
	if len(errs) > limit {
		errs = append(errs[:limit:limit], fmt.Errorf("... and %d more", len(errs)-limit))
	}
	return errors.Join(errs...)
}
