package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// dumpedResources are compared in full before and after each restart, with the place where kube-apiserver stores them.
// Leases and Events are not: those change by themselves.
var dumpedResources = []struct {
	resource schema.GroupVersionResource
	prefix   string
}{
	{schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}, "/registry/namespaces/"},
	{schema.GroupVersionResource{Version: "v1", Resource: "nodes"}, "/registry/minions/"},
	{schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}, "/registry/configmaps/"},
	{schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}, "/registry/deployments/"},
	{customResource, "/registry/" + customGroup + "/" + customPlural + "/"},
}

// dumpedObject is one object as the API shows it.
type dumpedObject struct {
	uid      string
	revision int64
	// contentHash is over the whole object: data, labels, status, everything.
	contentHash [sha256.Size]byte
}

// dump reads everything through the API. The keys are those of the storage.
func (h *harness) dump(ctx context.Context) (map[string]dumpedObject, error) {
	objects := map[string]dumpedObject{}
	for _, dumped := range dumpedResources {
		list, err := h.apiServer.dynamic.Resource(dumped.resource).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, fmt.Errorf("listing %s: %w", dumped.resource.Resource, err)
		}
		for _, item := range list.Items {
			revision, err := strconv.ParseInt(item.GetResourceVersion(), 10, 64)
			if err != nil {
				return nil, fmt.Errorf("%s %s: %w", dumped.resource.Resource, item.GetName(), err)
			}
			content, err := json.Marshal(item.Object)
			if err != nil {
				return nil, err
			}
			key := dumped.prefix + item.GetName()
			if item.GetNamespace() != "" {
				key = dumped.prefix + item.GetNamespace() + "/" + item.GetName()
			}
			objects[key] = dumpedObject{string(item.GetUID()), revision, sha256.Sum256(content)}
		}
	}
	return objects, nil
}

// dumpEventually is dump for when the nodes have just come back: kube-apiserver may need a moment to reach them again.
func (h *harness) dumpEventually(ctx context.Context, patience time.Duration) (objects map[string]dumpedObject, err error) {
	err = eventually(ctx, patience, "lists of everything", func(ctx context.Context) (err error) {
		objects, err = h.dump(ctx)
		return err
	})
	return objects, err
}

// compareDumps wants the same objects with the same content at the same revision.
func compareDumps(before, after map[string]dumpedObject) error {
	var errs []error
	for key, b := range before {
		a, ok := after[key]
		switch {
		case !ok:
			errs = append(errs, fmt.Errorf("LOST: %s is gone", key))
		case a.uid != b.uid:
			errs = append(errs, fmt.Errorf("%s is another object: uid %s, was %s", key, a.uid, b.uid))
		case a.revision != b.revision:
			errs = append(errs, fmt.Errorf("%s is at revision %d, was at %d", key, a.revision, b.revision))
		case a.contentHash != b.contentHash:
			errs = append(errs, fmt.Errorf("%s has another content at the same revision %d", key, a.revision))
		}
	}
	for key := range after {
		if _, ok := before[key]; !ok {
			errs = append(errs, fmt.Errorf("%s was not there before", key))
		}
	}
	return joinFirst(errs, 10)
}

// compareEverywhere compares what the API lists, mostly out of kube-apiserver's memory, with what each node has stored.
func (h *harness) compareEverywhere(ctx context.Context) (string, error) {
	objects, err := h.dumpEventually(ctx, 30*time.Second)
	if err != nil {
		return "", err
	}
	if err := h.compareNodes(ctx, objects); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d objects", len(objects)), nil
}

// compareNodes compares every running node's own storage with the API's view and with the other nodes.
func (h *harness) compareNodes(ctx context.Context, objects map[string]dumpedObject) error {
	var prefixes []string
	for _, dumped := range dumpedResources {
		prefixes = append(prefixes, dumped.prefix)
	}
	var errs []error
	var first map[string]storedKey
	var firstName string
	for _, n := range h.cluster.nodes {
		if !n.process.running() {
			continue
		}
		if _, err := h.cluster.waitCaughtUp(ctx, n, 10*time.Second); err != nil {
			return err
		}
		keys, err := n.stored(ctx, prefixes)
		if err != nil {
			return err
		}
		for key, object := range objects {
			if k, ok := keys[key]; !ok {
				errs = append(errs, fmt.Errorf("%s is not in the storage of %s", key, n.name))
			} else if k.modRevision != object.revision {
				errs = append(errs, fmt.Errorf("%s is at revision %d, but at %d in the storage of %s", key, object.revision, k.modRevision, n.name))
			}
		}
		for key := range keys {
			if _, ok := objects[key]; !ok {
				errs = append(errs, fmt.Errorf("%s is in the storage of %s, but not in the API", key, n.name))
			}
		}
		if first == nil {
			first, firstName = keys, n.name
			continue
		}
		for key, k := range keys {
			if k != first[key] {
				errs = append(errs, fmt.Errorf("%s differs between %s and %s", key, firstName, n.name))
			}
		}
	}
	if first == nil {
		return errors.New("no node runs")
	}
	return joinFirst(errs, 10)
}
