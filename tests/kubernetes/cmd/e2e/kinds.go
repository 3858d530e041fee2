package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	corev1apply "k8s.io/client-go/applyconfigurations/core/v1"
)

const (
	customGroup  = "e2e.example.com"
	customPlural = "widgets"
)

var customResource = schema.GroupVersionResource{Group: customGroup, Version: "v1", Resource: customPlural}

func customObject(name string, size int64) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": customGroup + "/v1",
		"kind":       "Widget",
		"metadata":   map[string]any{"namespace": namespaceCustom, "name": name},
		"spec":       map[string]any{"size": size, "colour": "red"},
	}}
}

// customResources makes a type and objects of it. Each such type gets a client of its own to the storage, made while
// everything else goes on.
func (h *harness) customResources(ctx context.Context) (string, error) {
	number := apiextensionsv1.JSONSchemaProps{Type: "integer"}
	text := apiextensionsv1.JSONSchemaProps{Type: "string"}
	definition := &apiextensionsv1.CustomResourceDefinition{
		ObjectMeta: metav1.ObjectMeta{Name: customPlural + "." + customGroup},
		Spec: apiextensionsv1.CustomResourceDefinitionSpec{
			Group: customGroup,
			Names: apiextensionsv1.CustomResourceDefinitionNames{Plural: customPlural, Singular: "widget", Kind: "Widget", ListKind: "WidgetList"},
			Scope: apiextensionsv1.NamespaceScoped,
			Versions: []apiextensionsv1.CustomResourceDefinitionVersion{{
				Name: "v1", Served: true, Storage: true,
				Schema: &apiextensionsv1.CustomResourceValidation{OpenAPIV3Schema: &apiextensionsv1.JSONSchemaProps{
					Type: "object",
					Properties: map[string]apiextensionsv1.JSONSchemaProps{
						"spec": {Type: "object", Properties: map[string]apiextensionsv1.JSONSchemaProps{"size": number, "colour": text}},
					},
				}},
			}},
		},
	}
	definitions := h.apiServer.apiextensions.ApiextensionsV1().CustomResourceDefinitions()
	if _, err := definitions.Create(ctx, definition, metav1.CreateOptions{}); err != nil {
		return "", err
	}
	err := eventually(ctx, 30*time.Second, "the definition to be established", func(ctx context.Context) error {
		d, err := definitions.Get(ctx, definition.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, condition := range d.Status.Conditions {
			if condition.Type == apiextensionsv1.Established && condition.Status == apiextensionsv1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("conditions %v", d.Status.Conditions)
	})
	if err != nil {
		return "", err
	}

	widgets := h.apiServer.dynamic.Resource(customResource).Namespace(namespaceCustom)
	// "Established" comes a moment before the type is served.
	var list *unstructured.UnstructuredList
	err = eventually(ctx, 30*time.Second, "the type to be served", func(ctx context.Context) (err error) {
		list, err = widgets.List(ctx, metav1.ListOptions{})
		return err
	})
	if err != nil {
		return "", err
	}
	f, err := follow(ctx, widgets, list.GetResourceVersion(), func(event watch.Event) string {
		colour, _, _ := unstructured.NestedString(event.Object.(*unstructured.Unstructured).Object, "spec", "colour")
		return colour
	})
	if err != nil {
		return "", err
	}
	defer f.stop()

	const count = 120
	err = inParallel(4, count, func(i int) error {
		_, err := widgets.Create(ctx, customObject(objectName(i), int64(i)), metav1.CreateOptions{})
		return err
	})
	if err != nil {
		return "", err
	}
	patched, err := widgets.Patch(ctx, objectName(7), types.MergePatchType, []byte(`{"spec":{"colour":"blue"}}`), metav1.PatchOptions{})
	if err != nil {
		return "", err
	}
	revision, err := strconv.ParseInt(patched.GetResourceVersion(), 10, 64)
	if err != nil {
		return "", err
	}
	changes, err := f.waitFor(ctx, revision, 30*time.Second)
	if err != nil {
		return "", err
	}
	if last := changes[len(changes)-1]; len(changes) != count+1 || last.eventType != watch.Modified || last.value != "blue" {
		return "", fmt.Errorf("%d events, the last is %s; want %d, the last a change to blue", len(changes), last, count+1)
	}

	var names []string
	options := metav1.ListOptions{Limit: 50}
	for {
		page, err := widgets.List(ctx, options)
		if err != nil {
			return "", err
		}
		for _, w := range page.Items {
			names = append(names, w.GetName())
		}
		if options.Continue = page.GetContinue(); options.Continue == "" {
			break
		}
	}
	if len(names) != count || !slices.IsSorted(names) {
		return "", fmt.Errorf("%d names in pages, want %d in order", len(names), count)
	}

	// kube-apiserver takes requests of up to 3 MiB, its client of the storage sends up to 2 MiB, and the storage takes up
	// to 1.5 MiB by default. So it is the storage that refuses this one; kube-apiserver hands its words on.
	tooLarge := customObject("too-large", 1)
	if err := unstructured.SetNestedField(tooLarge.Object, strings.Repeat("x", 7<<18), "spec", "colour"); err != nil {
		return "", err
	}
	const refusal = "etcdserver: request is too large"
	if _, err := widgets.Create(ctx, tooLarge, metav1.CreateOptions{}); err == nil || !strings.Contains(err.Error(), refusal) {
		return "", fmt.Errorf("an object of 1.75 MiB: %v, want %q", err, refusal)
	}
	return fmt.Sprintf("%d objects", count), nil
}

// serverSideApply lets two managers share an object and quarrel about a field.
func (h *harness) serverSideApply(ctx context.Context) (string, error) {
	configMaps := h.apiServer.kube.CoreV1().ConfigMaps(namespaceScratch)
	apply := func(manager string, force bool, data map[string]string) (*corev1.ConfigMap, error) {
		return configMaps.Apply(ctx, corev1apply.ConfigMap("applied", namespaceScratch).WithData(data),
			metav1.ApplyOptions{FieldManager: manager, Force: force})
	}
	first, err := apply("alice", false, map[string]string{"a": "1", "shared": "alice"})
	if err != nil {
		return "", err
	}
	again, err := apply("alice", false, map[string]string{"a": "1", "shared": "alice"})
	if err != nil {
		return "", err
	}
	if again.ResourceVersion != first.ResourceVersion {
		return "", fmt.Errorf("applying the same again made revision %s out of %s", again.ResourceVersion, first.ResourceVersion)
	}
	if _, err := apply("bob", false, map[string]string{"shared": "bob"}); !apierrors.IsConflict(err) {
		return "", fmt.Errorf("taking over a field: %v, want Conflict", err)
	}
	if _, err := apply("bob", true, map[string]string{"b": "2", "shared": "bob"}); err != nil {
		return "", err
	}
	// Alice owns only "a" by now; leaving it out removes it and nothing else.
	final, err := apply("alice", false, map[string]string{})
	if err != nil {
		return "", err
	}
	if len(final.Data) != 2 || final.Data["b"] != "2" || final.Data["shared"] != "bob" {
		return "", fmt.Errorf("the data is %v, want b=2 shared=bob", final.Data)
	}
	return "", nil
}

// patches checks that the two kinds of patch are applied by their own rules.
func (h *harness) patches(ctx context.Context) (string, error) {
	deployments := h.apiServer.kube.AppsV1().Deployments(namespaceScratch)
	labels := map[string]string{"app": "patched"}
	_, err := deployments.Create(ctx, &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespaceScratch, Name: "patched"},
		Spec: appsv1.DeploymentSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "one", Image: "example.com/one:1"}, {Name: "two", Image: "example.com/two:1"}}},
			},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	images := func(d *appsv1.Deployment) string {
		var all []string
		for _, c := range d.Spec.Template.Spec.Containers {
			all = append(all, c.Name+"="+c.Image)
		}
		slices.Sort(all)
		return strings.Join(all, " ")
	}
	// A strategic merge patch merges the list of containers by name...
	d, err := deployments.Patch(ctx, "patched", types.StrategicMergePatchType,
		[]byte(`{"spec":{"template":{"spec":{"containers":[{"name":"two","image":"example.com/two:2"}]}}}}`), metav1.PatchOptions{})
	if err != nil {
		return "", err
	}
	if got, want := images(d), "one=example.com/one:1 two=example.com/two:2"; got != want {
		return "", fmt.Errorf("strategic merge patch: %s, want %s", got, want)
	}
	// ... and a merge patch replaces it.
	d, err = deployments.Patch(ctx, "patched", types.MergePatchType,
		[]byte(`{"metadata":{"annotations":{"merged":"yes"}},"spec":{"template":{"spec":{"containers":[{"name":"three","image":"example.com/three:1"}]}}}}`), metav1.PatchOptions{})
	if err != nil {
		return "", err
	}
	if got, want := images(d), "three=example.com/three:1"; got != want || d.Annotations["merged"] != "yes" {
		return "", fmt.Errorf("merge patch: %s %v, want %s", got, d.Annotations, want)
	}
	// A patch with a resource version is conditional.
	_, err = deployments.Patch(ctx, "patched", types.MergePatchType, []byte(`{"metadata":{"resourceVersion":"1","annotations":{"merged":"no"}}}`), metav1.PatchOptions{})
	if !apierrors.IsConflict(err) {
		return "", fmt.Errorf("a patch of a stale resource version: %v, want Conflict", err)
	}
	return "", nil
}

const controlPlaneLabel = "node-role.kubernetes.io/control-plane"

// kubernetesNodes registers a small cluster and reads it back as `kubectl get nodes` does, as a table.
func (h *harness) kubernetesNodes(ctx context.Context) (string, error) {
	nodes := h.apiServer.kube.CoreV1().Nodes()
	for i := range 6 {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{}}}
		if i < 3 {
			n.Name = fmt.Sprintf("control-plane-%d", i+1)
			n.Labels[controlPlaneLabel] = ""
			n.Spec.Taints = []corev1.Taint{{Key: controlPlaneLabel, Effect: corev1.TaintEffectNoSchedule}}
		} else {
			n.Name = fmt.Sprintf("worker-%d", i-2)
			n.Labels["node-role.kubernetes.io/worker"] = ""
		}
		n.Labels[corev1.LabelHostname] = n.Name
		created, err := nodes.Create(ctx, n, metav1.CreateOptions{})
		if err != nil {
			return "", err
		}
		created.Status.Conditions = []corev1.NodeCondition{{
			Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady",
			LastHeartbeatTime: metav1.Now(), LastTransitionTime: metav1.Now(),
		}}
		created.Status.Capacity = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("2"), corev1.ResourceMemory: resource.MustParse("4Gi")}
		created.Status.NodeInfo.KubeletVersion = "v1.0.0-e2e"
		if _, err := nodes.UpdateStatus(ctx, created, metav1.UpdateOptions{}); err != nil {
			return "", err
		}
	}
	for selector, want := range map[string]int{"": 6, controlPlaneLabel: 3, "!" + controlPlaneLabel: 3} {
		list, err := nodes.List(ctx, metav1.ListOptions{LabelSelector: selector})
		if err != nil {
			return "", err
		}
		if len(list.Items) != want {
			return "", fmt.Errorf("%d nodes match %q, want %d", len(list.Items), selector, want)
		}
	}

	body, err := h.apiServer.kube.CoreV1().RESTClient().Get().Resource("nodes").
		SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").Do(ctx).Raw()
	if err != nil {
		return "", err
	}
	var table metav1.Table
	if err := json.Unmarshal(body, &table); err != nil {
		return "", err
	}
	if len(table.Rows) != 6 {
		return "", fmt.Errorf("the table has %d rows, want 6", len(table.Rows))
	}
	var rows []string
	for _, row := range table.Rows {
		if len(row.Cells) < 3 {
			return "", fmt.Errorf("a row of the table: %v", row.Cells)
		}
		if row.Cells[1] != "Ready" {
			return "", fmt.Errorf("node %v is %v, want Ready", row.Cells[0], row.Cells[1])
		}
		rows = append(rows, fmt.Sprintf("%v (%v)", row.Cells[0], row.Cells[2]))
	}
	return strings.Join(rows, ", "), nil
}

// renewLeases does what kubelets and leader election do all day.
func (h *harness) renewLeases(ctx context.Context) (string, error) {
	leases := h.apiServer.kube.CoordinationV1().Leases(namespaceScratch)
	const count, renewals = 6, 50
	begin := time.Now()
	err := inParallel(count, count, func(i int) error {
		holder := fmt.Sprintf("holder-%d", i)
		lease, err := leases.Create(ctx, &coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespaceScratch, Name: holder},
			Spec:       coordinationv1.LeaseSpec{HolderIdentity: &holder},
		}, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		for range renewals {
			before := lease.ResourceVersion
			lease.Spec.RenewTime = new(metav1.NowMicro())
			if lease, err = leases.Update(ctx, lease, metav1.UpdateOptions{}); err != nil {
				return err
			}
			if lease.ResourceVersion == before {
				return errors.New("a renewal did not change the resource version")
			}
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%.0f renewals a second", count*renewals/time.Since(begin).Seconds()), nil
}
