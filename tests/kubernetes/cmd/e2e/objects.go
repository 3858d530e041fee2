package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

// The namespaces of the scenario. One that is loaded while nodes die is left alone by everything else.
const (
	namespaceObjects = "e2e-objects"
	namespaceScratch = "e2e-scratch"
	namespaceWatch   = "e2e-watch"
	namespaceCustom  = "e2e-custom"
	namespaceLoad1   = "e2e-load-1"
	namespaceLoad2   = "e2e-load-2"
)

// valueKey is the key inside a ConfigMap that the steps write and compare.
const valueKey = "value"

func configMap(namespace, name, value string) *corev1.ConfigMap {
	return &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Data:       map[string]string{valueKey: value},
	}
}

// configMapValue is for follow.
func configMapValue(event watch.Event) string {
	if c, ok := event.Object.(*corev1.ConfigMap); ok {
		return c.Data[valueKey]
	}
	return fmt.Sprintf("not a ConfigMap but %T", event.Object)
}

func (h *harness) createNamespaces(ctx context.Context) (string, error) {
	names := []string{namespaceObjects, namespaceScratch, namespaceWatch, namespaceCustom, namespaceLoad1, namespaceLoad2}
	for i := range 20 {
		names = append(names, fmt.Sprintf("e2e-tenant-%02d", i))
	}
	namespaces := h.apiServer.kube.CoreV1().Namespaces()
	for _, name := range names {
		if _, err := namespaces.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			return "", err
		}
	}
	list, err := namespaces.List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	have := map[string]bool{}
	for _, n := range list.Items {
		have[n.Name] = true
	}
	for _, name := range append(names, "default", "kube-system") {
		if !have[name] {
			return "", fmt.Errorf("namespace %s is not in the list", name)
		}
	}
	return fmt.Sprintf("%d made, %d listed", len(names), len(list.Items)), nil
}

func objectName(i int) string { return fmt.Sprintf("object-%05d", i) }

func (h *harness) createConfigMaps(ctx context.Context) (string, error) {
	configMaps := h.apiServer.kube.CoreV1().ConfigMaps(namespaceObjects)
	begin := time.Now()
	err := inParallel(8, h.objects, func(i int) error {
		c := configMap(namespaceObjects, objectName(i), strconv.Itoa(i))
		c.Labels = map[string]string{"remainder": strconv.Itoa(i % 10)}
		c.Data["padding"] = strings.Repeat("x", 300)
		_, err := configMaps.Create(ctx, c, metav1.CreateOptions{})
		return err
	})
	if err != nil {
		return "", err
	}
	rate := float64(h.objects) / time.Since(begin).Seconds()
	list, err := configMaps.List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	if len(list.Items) != h.objects {
		return "", fmt.Errorf("created %d, listed %d", h.objects, len(list.Items))
	}
	return fmt.Sprintf("%.0f a second", rate), nil
}

// listInPages walks through a list as kubectl does. All pages together are the state at the revision of the first one,
// whatever is written meanwhile, and each page says exactly how many are left: kube-apiserver takes that number from the
// storage's count.
func (h *harness) listInPages(ctx context.Context) (string, error) {
	const limit = 50
	configMaps := h.apiServer.kube.CoreV1().ConfigMaps(namespaceObjects)
	var names []string
	var revision, continueToken string
	pages := 0
	for {
		page, err := configMaps.List(ctx, metav1.ListOptions{Limit: limit, Continue: continueToken})
		if err != nil {
			return "", fmt.Errorf("page %d: %w", pages, err)
		}
		if pages == 0 {
			revision = page.ResourceVersion
			// Sorts after all the others, so a page that is not pinned to the first revision would show it.
			if _, err := configMaps.Create(ctx, configMap(namespaceObjects, "zz-added-meanwhile", ""), metav1.CreateOptions{}); err != nil {
				return "", err
			}
		}
		pages++
		for _, c := range page.Items {
			names = append(names, c.Name)
		}
		if page.ResourceVersion != revision {
			return "", fmt.Errorf("page %d is of revision %s, the first was of %s", pages, page.ResourceVersion, revision)
		}
		left := int64(h.objects - len(names))
		switch {
		case left > 0 && (page.RemainingItemCount == nil || *page.RemainingItemCount != left):
			return "", fmt.Errorf("page %d: remainingItemCount %v, want %d", pages, pointee(page.RemainingItemCount), left)
		case left == 0 && page.RemainingItemCount != nil:
			return "", fmt.Errorf("last page: remainingItemCount %d, want none", *page.RemainingItemCount)
		case left > 0 && len(page.Items) != limit:
			return "", fmt.Errorf("page %d has %d items, want %d", pages, len(page.Items), limit)
		}
		continueToken = page.Continue
		if continueToken == "" {
			break
		}
	}
	if err := configMaps.Delete(ctx, "zz-added-meanwhile", metav1.DeleteOptions{}); err != nil {
		return "", err
	}
	if len(names) != h.objects {
		return "", fmt.Errorf("%d names on %d pages, want %d", len(names), pages, h.objects)
	}
	for i, name := range names {
		if name != objectName(i) {
			return "", fmt.Errorf("item %d is %s, want %s", i, name, objectName(i))
		}
	}
	return fmt.Sprintf("%d pages at revision %s", pages, revision), nil
}

func pointee(p *int64) string {
	if p == nil {
		return "none"
	}
	return strconv.FormatInt(*p, 10)
}

// watchWhileWriting makes changes of every kind and compares the watch with them, event by event.
func (h *harness) watchWhileWriting(ctx context.Context) (string, error) {
	configMaps := h.apiServer.kube.CoreV1().ConfigMaps(namespaceWatch)
	list, err := configMaps.List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	f, err := follow(ctx, configMaps, list.ResourceVersion, configMapValue)
	if err != nil {
		return "", err
	}
	defer f.stop()

	var want []change
	var last int64
	// A delete does not answer the revision it got: the comparison leaves that one to the watch.
	note := func(eventType watch.EventType, name, value, resourceVersion string) error {
		c := change{eventType: eventType, name: name, value: value}
		if resourceVersion != "" {
			if c.revision, err = strconv.ParseInt(resourceVersion, 10, 64); err != nil {
				return err
			}
			last = c.revision
		}
		want = append(want, c)
		return nil
	}
	for i := range 60 {
		name := objectName(i)
		c, err := configMaps.Create(ctx, configMap(namespaceWatch, name, "new"), metav1.CreateOptions{})
		if err != nil {
			return "", err
		}
		if err := note(watch.Added, name, "new", c.ResourceVersion); err != nil {
			return "", err
		}
		for _, value := range []string{"changed", "changed again"} {
			c.Data[valueKey] = value
			if c, err = configMaps.Update(ctx, c, metav1.UpdateOptions{}); err != nil {
				return "", err
			}
			if err := note(watch.Modified, name, value, c.ResourceVersion); err != nil {
				return "", err
			}
		}
		if i%2 == 1 {
			if err := configMaps.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
				return "", err
			}
			if err := note(watch.Deleted, name, "changed again", ""); err != nil {
				return "", err
			}
		}
	}
	// The last one is not a delete, so its revision, which ends the wait, is known.
	marker, err := configMaps.Create(ctx, configMap(namespaceWatch, "marker", ""), metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	if err := note(watch.Added, "marker", "", marker.ResourceVersion); err != nil {
		return "", err
	}

	got, err := f.waitFor(ctx, last, 30*time.Second)
	if err != nil {
		return "", err
	}
	if err := compareChanges(got, want); err != nil {
		return "", err
	}
	if restarts := f.stop(); restarts != 0 {
		return "", fmt.Errorf("the watch was interrupted %d times although no node was", restarts)
	}
	// Once more, from the past: now the events come from the cache or from the storage's history.
	again, err := follow(ctx, configMaps, list.ResourceVersion, configMapValue)
	if err != nil {
		return "", err
	}
	defer again.stop()
	if got, err = again.waitFor(ctx, last, 30*time.Second); err != nil {
		return "", err
	}
	if err := compareChanges(got, want); err != nil {
		return "", fmt.Errorf("watching the past: %w", err)
	}
	return fmt.Sprintf("%d events, live and from the past", len(got)), nil
}

// compareChanges wants the same changes in the same order; a wanted revision of 0 matches any.
func compareChanges(got, want []change) error {
	for i, w := range want {
		if i >= len(got) {
			return fmt.Errorf("event %d is missing: %s", i, w)
		}
		g := got[i]
		if g.eventType != w.eventType || g.name != w.name || g.value != w.value || (w.revision != 0 && g.revision != w.revision) {
			return fmt.Errorf("event %d is %s, want %s", i, g, w)
		}
	}
	if len(got) > len(want) {
		return fmt.Errorf("%d events too many, the first is %s", len(got)-len(want), got[len(want)])
	}
	return nil
}

// optimisticConcurrency is what every controller relies on: a write that is based on an old state is refused.
func (h *harness) optimisticConcurrency(ctx context.Context) (string, error) {
	configMaps := h.apiServer.kube.CoreV1().ConfigMaps(namespaceScratch)
	first, err := configMaps.Create(ctx, configMap(namespaceScratch, "contended", "0"), metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	if _, err := configMaps.Create(ctx, configMap(namespaceScratch, "contended", "0"), metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		return "", fmt.Errorf("creating it twice: %v, want AlreadyExists", err)
	}
	second := first.DeepCopy()
	second.Data[valueKey] = "1"
	if second, err = configMaps.Update(ctx, second, metav1.UpdateOptions{}); err != nil {
		return "", err
	}
	stale := first.DeepCopy()
	stale.Data[valueKey] = "stale"
	if _, err := configMaps.Update(ctx, stale, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		return "", fmt.Errorf("updating from a stale resource version: %v, want Conflict", err)
	}
	err = configMaps.Delete(ctx, "contended", metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &first.ResourceVersion}})
	if !apierrors.IsConflict(err) {
		return "", fmt.Errorf("deleting a stale resource version: %v, want Conflict", err)
	}

	// Many hands on one counter: with every refused write retried on the new state, no increment may be lost.
	const hands, incrementsEach = 8, 15
	conflicts := make([]int, hands)
	err = inParallel(hands, hands, func(hand int) error {
		for done := 0; done < incrementsEach; {
			c, err := configMaps.Get(ctx, "contended", metav1.GetOptions{})
			if err != nil {
				return err
			}
			number, err := strconv.Atoi(c.Data[valueKey])
			if err != nil {
				return err
			}
			c.Data[valueKey] = strconv.Itoa(number + 1)
			_, err = configMaps.Update(ctx, c, metav1.UpdateOptions{})
			switch {
			case err == nil:
				done++
			case apierrors.IsConflict(err):
				conflicts[hand]++
			default:
				return err
			}
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	final, err := configMaps.Get(ctx, "contended", metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	if want := strconv.Itoa(1 + hands*incrementsEach); final.Data[valueKey] != want {
		return "", fmt.Errorf("the counter is at %s, want %s", final.Data[valueKey], want)
	}
	total := 0
	for _, n := range conflicts {
		total += n
	}
	return fmt.Sprintf("%d increments with %d conflicts", hands*incrementsEach, total), nil
}

// largeObjects stays within the limits of a ConfigMap (1 MiB of data and 256 KiB of annotations, kube-apiserver's own).
// customResources goes past that of the storage.
func (h *harness) largeObjects(ctx context.Context) (string, error) {
	configMaps := h.apiServer.kube.CoreV1().ConfigMaps(namespaceScratch)
	large := strings.Repeat("0123456789abcdef", 1_000_000/16)
	if _, err := configMaps.Create(ctx, configMap(namespaceScratch, "large", large), metav1.CreateOptions{}); err != nil {
		return "", err
	}
	c, err := configMaps.Get(ctx, "large", metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	if c.Data[valueKey] != large {
		return "", errors.New("the large ConfigMap did not come back as it was")
	}
	tooLarge := c.DeepCopy()
	tooLarge.Annotations = map[string]string{"a": strings.Repeat("x", 200_000)}
	tooLarge.BinaryData = map[string][]byte{"b": make([]byte, 40_000)}
	if _, err := configMaps.Update(ctx, tooLarge, metav1.UpdateOptions{}); err != nil {
		return "", fmt.Errorf("an object of 1.24 MB: %w", err)
	}
	return "1.0 MB and 1.24 MB", nil
}

// createEvents makes Events, which kube-apiserver stores with a lease.
func (h *harness) createEvents(ctx context.Context) (string, error) {
	events := h.apiServer.kube.CoreV1().Events(namespaceScratch)
	const count = 20
	for i := range count {
		event := &corev1.Event{
			ObjectMeta:     metav1.ObjectMeta{Namespace: namespaceScratch, Name: fmt.Sprintf("event-%02d", i)},
			InvolvedObject: corev1.ObjectReference{Kind: "ConfigMap", Namespace: namespaceScratch, Name: "contended"},
			Reason:         "Tested",
			Message:        "made by e2e",
			Type:           corev1.EventTypeNormal,
		}
		if _, err := events.Create(ctx, event, metav1.CreateOptions{}); err != nil {
			return "", err
		}
	}
	h.eventsCreated = time.Now()
	list, err := events.List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	if len(list.Items) != count {
		return "", fmt.Errorf("created %d, listed %d", count, len(list.Items))
	}
	// In the storage each hangs on a lease, and several share one.
	leases := map[int64]int{}
	var detail string
	err = h.cluster.nodes[1].withClient(func(client *clientv3.Client) error {
		response, err := client.Get(ctx, "/registry/events/"+namespaceScratch+"/", clientv3.WithPrefix())
		if err != nil {
			return err
		}
		if len(response.Kvs) != count {
			return fmt.Errorf("%d Events in the storage, want %d", len(response.Kvs), count)
		}
		for _, kv := range response.Kvs {
			if kv.Lease == 0 {
				return fmt.Errorf("%s has no lease", kv.Key)
			}
			leases[kv.Lease]++
		}
		for id, keys := range leases {
			lease, err := client.TimeToLive(ctx, clientv3.LeaseID(id), clientv3.WithAttachedKeys())
			if err != nil {
				return err
			}
			if lease.GrantedTTL < int64(eventTTL.Seconds()) || lease.TTL <= 0 || lease.TTL > lease.GrantedTTL || len(lease.Keys) < keys {
				return fmt.Errorf("lease %x: TTL %d of %d with %d keys, want at least %d keys", id, lease.TTL, lease.GrantedTTL, len(lease.Keys), keys)
			}
			detail = fmt.Sprintf("%d on %d leases of %d s", count, len(leases), lease.GrantedTTL)
		}
		return nil
	})
	return detail, err
}

// eventsExpire waits until they are gone, from the API and from the storage.
func (h *harness) eventsExpire(ctx context.Context) (string, error) {
	if h.eventsCreated.IsZero() {
		return "", errors.New("there were none")
	}
	// kube-apiserver adds up to 5 percent to the time to live, and the server may round and revoke in its own rhythm.
	deadline := h.eventsCreated.Add(eventTTL + eventTTL/20 + 15*time.Second)
	err := eventually(ctx, max(time.Second, time.Until(deadline)), "Events to expire", func(ctx context.Context) error {
		list, err := h.apiServer.kube.CoreV1().Events(namespaceScratch).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		if len(list.Items) > 0 {
			return fmt.Errorf("%d are left", len(list.Items))
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	age := time.Since(h.eventsCreated)
	for _, n := range h.cluster.nodes {
		err := eventually(ctx, 5*time.Second, "Events to leave the storage of "+n.name, func(ctx context.Context) error {
			keys, err := n.stored(ctx, []string{"/registry/events/" + namespaceScratch + "/"})
			if err != nil {
				return err
			}
			if len(keys) > 0 {
				return fmt.Errorf("%d are left", len(keys))
			}
			return nil
		})
		if err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("gone %.1f s after they were made, or before", age.Seconds()), nil
}

// deleteCollection deletes by label, and nothing else.
func (h *harness) deleteCollection(ctx context.Context) (string, error) {
	configMaps := h.apiServer.kube.CoreV1().ConfigMaps(namespaceScratch)
	const count = 100
	err := inParallel(8, count, func(i int) error {
		c := configMap(namespaceScratch, fmt.Sprintf("collected-%03d", i), "")
		c.Labels = map[string]string{"odd": strconv.FormatBool(i%2 == 1)}
		_, err := configMaps.Create(ctx, c, metav1.CreateOptions{})
		return err
	})
	if err != nil {
		return "", err
	}
	before, err := configMaps.List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	err = configMaps.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: "odd=true"})
	if err != nil {
		return "", err
	}
	after, err := configMaps.List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	var want, got []string
	for _, c := range before.Items {
		if c.Labels["odd"] != "true" {
			want = append(want, c.Name)
		}
	}
	for _, c := range after.Items {
		got = append(got, c.Name)
	}
	if !slices.Equal(got, want) {
		return "", fmt.Errorf("left are %v, want %v", got, want)
	}
	return fmt.Sprintf("%d deleted, %d left", len(before.Items)-len(after.Items), len(after.Items)), nil
}
