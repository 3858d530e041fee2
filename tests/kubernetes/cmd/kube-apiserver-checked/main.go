// Command kube-apiserver-checked is kube-apiserver with one variable changed: how often it compares its watch cache with
// the storage.
//
// With KUBE_WATCHCACHE_CONSISTENCY_CHECKER=true it panics when they differ, which is the sharpest check that Kubernetes
// has of its storage, but the first comparison comes after 5 to 7.5 minutes and no flag shortens that.
// CACHE_CHECK_PERIOD=20s does.
package main

import (
	"fmt"
	"os"
	"time"
	_ "time/tzdata" // as in kube-apiserver

	"k8s.io/apiserver/pkg/storage/cacher/consistency"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"          // as in kube-apiserver
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // as in kube-apiserver
	_ "k8s.io/component-base/metrics/prometheus/version"  // as in kube-apiserver
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

func main() {
	if text := os.Getenv("CACHE_CHECK_PERIOD"); text != "" {
		period, err := time.ParseDuration(text)
		if err != nil || period <= 0 {
			fmt.Fprintln(os.Stderr, "CACHE_CHECK_PERIOD must be a positive duration such as 20s")
			os.Exit(2)
		}
		consistency.CheckPeriod = period
	}
	os.Exit(cli.Run(app.NewAPIServerCommand()))
}
