package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"
)

const (
	thisModule = "raft-sqlite/tests/kubernetes"
	// stockAPIServer is the command of the Kubernetes release itself.
	stockAPIServer = "k8s.io/kubernetes/cmd/kube-apiserver"
	// checkedAPIServer is the same with a shorter period of the cache consistency check.
	checkedAPIServer = thisModule + "/cmd/kube-apiserver-checked"
)

// resolveKubeAPIServer finds or builds the kube-apiserver to test.
func resolveKubeAPIServer(ctx context.Context, opts options) (string, error) {
	if opts.kubeAPIServer != "" {
		return executable(opts.kubeAPIServer)
	}
	checked := opts.cacheCheckPeriod > 0
	if assets := os.Getenv("KUBEBUILDER_ASSETS"); assets != "" && !checked {
		if path, err := executable(filepath.Join(assets, "kube-apiserver")); err == nil {
			return path, nil
		}
	}
	version, err := kubernetesVersion()
	if err != nil {
		return "", err
	}
	cacheDir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	name, source := "kube-apiserver-"+version, stockAPIServer
	if checked {
		name, source = "kube-apiserver-checked-"+version, checkedAPIServer
	}
	path := filepath.Join(cacheDir, "raft-sqlite", name)
	if _, err := executable(path); err == nil {
		return path, nil
	}
	return path, buildKubeAPIServer(ctx, source, version, path)
}

func executable(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if info.IsDir() || info.Mode()&0o111 == 0 {
		return "", fmt.Errorf("%s is not executable", path)
	}
	return path, nil
}

// kubernetesVersion is the release of which this program's client libraries are: they are tagged v0.x where Kubernetes
// is tagged v1.x, and go.mod keeps both the same.
func kubernetesVersion() (string, error) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "", errors.New("this program was built without module information")
	}
	for _, module := range info.Deps {
		if module.Path != "k8s.io/client-go" {
			continue
		}
		if module.Replace != nil {
			module = module.Replace
		}
		if rest, ok := strings.CutPrefix(module.Version, "v0."); ok {
			return "v1." + rest, nil
		}
	}
	return "", errors.New("no k8s.io/client-go v0.x among this program's modules")
}

// buildKubeAPIServer takes about ten minutes on two cores the first time; the compiler's cache makes it short afterwards.
func buildKubeAPIServer(ctx context.Context, source, version, output string) error {
	// The Kubernetes module can only be built from within a module with all the replacements that ours has.
	if out, err := exec.CommandContext(ctx, "go", "list", "-m").Output(); err != nil || strings.TrimSpace(string(out)) != thisModule {
		return fmt.Errorf("there is no %s yet: run this from within tests/kubernetes so that it can be built, or give --kube-apiserver", output)
	}
	if err := os.MkdirAll(filepath.Dir(output), 0o755); err != nil {
		return err
	}
	numbers := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(numbers) != 3 {
		return fmt.Errorf("unexpected Kubernetes version %s", version)
	}
	const versionPackage = "k8s.io/component-base/version"
	ldflags := []string{
		"-s", "-w",
		"-X", versionPackage + ".gitVersion=" + version,
		"-X", versionPackage + ".gitMajor=" + numbers[0],
		"-X", versionPackage + ".gitMinor=" + numbers[1],
		"-X", versionPackage + ".gitTreeState=clean",
	}
	fmt.Printf("building %s %s (about ten minutes the first time)\n", source, version)
	begin := time.Now()
	// Built beside its place and moved there, so that an interrupted build leaves no half of a binary in the cache.
	partial := fmt.Sprintf("%s.%d", output, os.Getpid())
	defer os.Remove(partial)
	command := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", strings.Join(ldflags, " "), "-o", partial, source)
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	command.Stdout, command.Stderr = os.Stderr, os.Stderr
	if err := command.Run(); err != nil {
		return fmt.Errorf("building %s: %w", source, err)
	}
	if err := os.Rename(partial, output); err != nil {
		return err
	}
	fmt.Printf("built %s in %s\n", output, time.Since(begin).Round(time.Second))
	return nil
}
