// Package clientv3 tests a running cluster through etcd's own Go client, from outside, for what etcd's API promises.
//
// The tests say what a real etcd does: each of them passes on a three-node etcd of the version in go.mod, and where a
// document and etcd disagreed, etcd was taken to be right. They need the addresses of the nodes:
//
//	ETCD_ENDPOINTS=http://127.0.0.1:2379,http://127.0.0.1:22379,http://127.0.0.1:32379 go test -count=1 ./...
//
// (-count=1 because go test would otherwise repeat the last result without asking the cluster.)
//
// Nearly every test runs once through each endpoint, because a follower is where a faulty implementation shows. The keys
// are unique to each run, so the tests can be repeated on one cluster. Nothing else may write to it meanwhile, since some
// tests count revisions, and the history is compacted by some. Expected are etcd's defaults: --max-txn-ops=128,
// --max-request-bytes=1572864, --election-timeout=1000.
package clientv3
