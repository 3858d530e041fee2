// Command etcd-oracle is a stock etcd, built from its published Go module.
//
// The tests of this repository decide what is right by asking a real etcd, and the benchmarks run beside one. Building it
// from the module pins the version and needs no package of the distribution, whose etcd is usually some releases old.
// It takes etcd's own flags. To build it where the other tests' binaries are cached:
//
//	go build -trimpath -ldflags "-s -w" -o "${XDG_CACHE_HOME:-$HOME/.cache}/raft-sqlite/etcd-v3.7.3" .
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
