package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	apiextensions "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
)

// eventTTL is how long kube-apiserver keeps Events: short, so that their expiry can be watched.
const eventTTL = 20 * time.Second

// compactionInterval is that of kube-apiserver (5 minutes by default): short, so that the history is compacted under the
// scenario several times.
const compactionInterval = 30 * time.Second

// apiServer is the kube-apiserver under which the nodes come and go. It must live through all of it.
type apiServer struct {
	supervisor  *supervisor
	argv        []string
	environment []string
	config      *rest.Config

	kube          *kubernetes.Clientset
	dynamic       *dynamic.DynamicClient
	apiextensions *apiextensions.Clientset

	mutex   sync.Mutex
	process *process
	closing bool
	crashes []string
}

func newAPIServer(s *supervisor, binary string, endpoints []string, workDir string, cacheCheckPeriod time.Duration) (*apiServer, error) {
	ports, err := freePorts(1)
	if err != nil {
		return nil, err
	}
	port := strconv.Itoa(ports[0])
	credentials := filepath.Join(workDir, "credentials")
	if err := os.MkdirAll(credentials, 0o700); err != nil {
		return nil, err
	}
	file := func(name string) string { return filepath.Join(credentials, name) }

	certificate, key, err := cert.GenerateSelfSignedCertKey("localhost", []net.IP{net.IPv4(127, 0, 0, 1)}, nil)
	if err != nil {
		return nil, err
	}
	serviceAccountKey, err := keyutil.MakeEllipticPrivateKeyPEM()
	if err != nil {
		return nil, err
	}
	var random [16]byte
	if _, err := rand.Read(random[:]); err != nil {
		return nil, err
	}
	token := hex.EncodeToString(random[:])
	for name, content := range map[string][]byte{
		"serving.crt":         certificate,
		"serving.key":         key,
		"service-account.key": serviceAccountKey,
		"tokens.csv":          []byte(token + ",admin,admin,system:masters\n"),
	} {
		if err := os.WriteFile(file(name), content, 0o600); err != nil {
			return nil, err
		}
	}

	environment := []string{"KUBE_WATCHCACHE_CONSISTENCY_CHECKER=true"}
	if cacheCheckPeriod > 0 {
		environment = append(environment, "CACHE_CHECK_PERIOD="+cacheCheckPeriod.String())
	}
	a := &apiServer{
		supervisor:  s,
		environment: environment,
		argv: []string{
			binary,
			"--etcd-servers=" + strings.Join(endpoints, ","),
			"--etcd-compaction-interval=" + compactionInterval.String(),
			"--event-ttl=" + eventTTL.String(),
			"--bind-address=127.0.0.1",
			"--secure-port=" + port,
			"--tls-cert-file=" + file("serving.crt"),
			"--tls-private-key-file=" + file("serving.key"),
			"--token-auth-file=" + file("tokens.csv"),
			"--authorization-mode=RBAC",
			"--service-account-issuer=https://kubernetes.default.svc",
			"--service-account-key-file=" + file("service-account.key"),
			"--service-account-signing-key-file=" + file("service-account.key"),
			"--service-cluster-ip-range=10.0.0.0/24",
			"-v=2",
		},
		config: &rest.Config{
			Host:            "https://127.0.0.1:" + port,
			BearerToken:     token,
			TLSClientConfig: rest.TLSClientConfig{CAData: certificate},
			// The scenario sets its own pace; client-go's default would be 5 requests a second.
			QPS:   -1,
			Burst: -1,
		},
	}
	if a.kube, err = kubernetes.NewForConfig(a.config); err != nil {
		return nil, err
	}
	if a.dynamic, err = dynamic.NewForConfig(a.config); err != nil {
		return nil, err
	}
	if a.apiextensions, err = apiextensions.NewForConfig(a.config); err != nil {
		return nil, err
	}
	return a, nil
}

// start runs kube-apiserver and keeps it running: should it exit unasked, that is remembered as a failure and it is
// started again, so that the rest of the scenario still says something.
func (a *apiServer) start(ctx context.Context) error {
	if err := a.spawn(); err != nil {
		return err
	}
	go a.keepRunning()
	return a.waitReady(ctx, 120*time.Second)
}

func (a *apiServer) spawn() error {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	if a.closing {
		return errors.New("closing")
	}
	p, err := a.supervisor.start("kube-apiserver", a.argv, a.environment)
	if err != nil {
		return err
	}
	a.process = p
	return nil
}

func (a *apiServer) keepRunning() {
	for {
		a.mutex.Lock()
		current := a.process
		a.mutex.Unlock()
		<-current.done
		a.mutex.Lock()
		if a.closing {
			a.mutex.Unlock()
			return
		}
		a.crashes = append(a.crashes, fmt.Sprintf("kube-apiserver exited at %s: %v", time.Now().Format(time.TimeOnly), current.result))
		a.mutex.Unlock()
		if err := a.spawn(); err != nil {
			return
		}
		// One that exits at once would otherwise be started as fast as the machine can.
		time.Sleep(time.Second)
	}
}

// takeCrashes answers, once, the exits that nobody asked for.
func (a *apiServer) takeCrashes() []string {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	crashes := a.crashes
	a.crashes = nil
	return crashes
}

// close tells keepRunning that the next exit is wanted. The supervisor ends the process.
func (a *apiServer) close() {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	a.closing = true
}

func (a *apiServer) waitReady(ctx context.Context, patience time.Duration) error {
	return eventually(ctx, patience, "kube-apiserver's /readyz", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		body, err := a.kube.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Raw()
		if err != nil {
			return fmt.Errorf("%w: %.400s", err, body)
		}
		return nil
	})
}

// metric adds up the samples of a counter whose labels contain all of the given text.
func (a *apiServer) metric(ctx context.Context, name string, labels ...string) (float64, error) {
	body, err := a.kube.Discovery().RESTClient().Get().AbsPath("/metrics").Do(ctx).Raw()
	if err != nil {
		return 0, err
	}
	var sum float64
lines:
	for _, line := range strings.Split(string(body), "\n") {
		if !strings.HasPrefix(line, name+"{") {
			continue
		}
		for _, label := range labels {
			if !strings.Contains(line, label) {
				continue lines
			}
		}
		value, err := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:], 64)
		if err != nil {
			return 0, fmt.Errorf("metric %q: %w", line, err)
		}
		sum += value
	}
	return sum, nil
}
