// Command library-dqlite puts the library benchmark's load on three nodes of dqlite in this process; callers use database/sql as a Go
// program does. It takes the same flags as the other systems and prints the same line of JSON.
package main

import (
	"context"
	"database/sql"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/canonical/go-dqlite/app"
)

const (
	preloaded  = 100_000
	rows       = 1000
	valueBytes = 256
	writers    = 16
	insertRow  = "INSERT INTO item(value) VALUES (?)"
	selectRow  = "SELECT value FROM item WHERE id = ?"
)

type outcome struct {
	OperationsPerSecond   float64  `json:"operations_per_second"`
	P50                   float64  `json:"p50_ms"`
	P99                   float64  `json:"p99_ms"`
	CPUSecondsPer1000     float64  `json:"cpu_seconds_per_1000"`
	DiskBytesPerOperation float64  `json:"disk_bytes_per_operation"`
	RSS                   float64  `json:"rss_mib"`
	Failures              uint64   `json:"failures"`
	Replicated            *float64 `json:"replicated_bytes_per_operation"`
	Failure               *string  `json:"failure"`
}

func main() {
	workload := flag.String("workload", "insert", "")
	callers := flag.Int("callers", 1, "")
	seconds := flag.Int("seconds", 3, "")
	data := flag.String("data", "", "")
	flag.Parse()
	result, err := measure(*workload, *callers, time.Duration(*seconds)*time.Second, *data)
	if err != nil {
		log.Fatal(err)
	}
	line, _ := json.Marshal(result)
	fmt.Println(string(line))
	// Its nodes are not stopped: what they would still write is not measured.
	os.Exit(0)
}

func measure(workload string, callers int, duration time.Duration, data string) (*outcome, error) {
	db, err := start(data)
	if err != nil {
		return nil, err
	}
	if _, err := db.Exec("CREATE TABLE item(id INTEGER PRIMARY KEY, value BLOB NOT NULL)"); err != nil {
		return nil, err
	}
	// A second writer is refused at once ("database is locked"), and its retries slow the first one down: here writers queue, as is best
	// for dqlite.
	var writing sync.Mutex
	insert := func(number uint64) error {
		writing.Lock()
		defer writing.Unlock()
		_, err := db.Exec(insertRow, value(number))
		return err
	}
	insertRows := func(number uint64) error {
		writing.Lock()
		defer writing.Unlock()
		return insertMany(db, number*rows)
	}
	read := func(number uint64) error {
		var got []byte
		return db.QueryRow(selectRow, int64((number*0x9e3779b97f4a7c15)>>32)%preloaded+1).Scan(&got)
	}
	switch workload {
	case "insert":
		return drive(callers, duration, 1, insert), nil
	case "rows":
		return drive(callers, duration, rows, insertRows), nil
	}
	for first := uint64(0); first < preloaded/rows; first++ {
		if err := insertRows(first); err != nil {
			return nil, err
		}
	}
	switch workload {
	// It reads on the leader only, and asks no quorum: nearer to a local read than to a linearizable one.
	case "select-local":
		return drive(callers, duration, 1, read), nil
	case "select-while-writing":
		go drive(writers, duration, 1, insert)
		return drive(callers, duration, 1, read), nil
	}
	return nil, fmt.Errorf("dqlite has no %s", workload)
}

func insertMany(db *sql.DB, first uint64) error {
	transaction, err := db.Begin()
	if err != nil {
		return err
	}
	defer transaction.Rollback()
	statement, err := transaction.Prepare(insertRow)
	if err != nil {
		return err
	}
	defer statement.Close()
	for number := first; number < first+rows; number++ {
		if _, err := statement.Exec(value(number)); err != nil {
			return err
		}
	}
	return transaction.Commit()
}

func start(data string) (*sql.DB, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var first string
	var leader *app.App
	for node := 0; node < 3; node++ {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		address := listener.Addr().String()
		listener.Close()
		folder := filepath.Join(data, strconv.Itoa(node))
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return nil, err
		}
		options := []app.Option{app.WithAddress(address)}
		if node > 0 {
			options = append(options, app.WithCluster([]string{first}))
		} else {
			first = address
		}
		application, err := app.New(folder, options...)
		if err != nil {
			return nil, err
		}
		if err := application.Ready(ctx); err != nil {
			return nil, err
		}
		if node == 0 {
			leader = application
		}
	}
	return leader.Open(ctx, "bench")
}

func drive(callers int, duration time.Duration, count uint64, operation func(uint64) error) *outcome {
	var number, operations, failures atomic.Uint64
	var failure atomic.Pointer[string]
	latencies := make([][]float64, callers)
	start, cpu, disk := time.Now(), cpuSeconds(), numberAfter("/proc/self/io", "write_bytes:")
	end := start.Add(duration)
	var group sync.WaitGroup
	for caller := range callers {
		group.Add(1)
		go func() {
			defer group.Done()
			for time.Now().Before(end) {
				began := time.Now()
				if err := operation(number.Add(1)); err != nil {
					failures.Add(1)
					text := err.Error()
					failure.CompareAndSwap(nil, &text)
					continue
				}
				operations.Add(count)
				latencies[caller] = append(latencies[caller], float64(time.Since(began).Microseconds())/1000)
			}
		}()
	}
	group.Wait()
	elapsed := time.Since(start).Seconds()
	var all []float64
	for _, some := range latencies {
		all = append(all, some...)
	}
	sort.Float64s(all)
	quantile := func(q float64) float64 {
		if len(all) == 0 {
			return 0
		}
		return all[int(q*float64(len(all)-1))]
	}
	done := float64(max(operations.Load(), 1))
	return &outcome{
		OperationsPerSecond:   float64(operations.Load()) / elapsed,
		P50:                   quantile(0.50),
		P99:                   quantile(0.99),
		CPUSecondsPer1000:     (cpuSeconds() - cpu) / done * 1000,
		DiskBytesPerOperation: (numberAfter("/proc/self/io", "write_bytes:") - disk) / done,
		RSS:                   numberAfter("/proc/self/status", "VmRSS:") / 1024,
		Failures:              failures.Load(),
		Failure:               failure.Load(),
	}
}

// value is half random, half text, as the other programs make it.
func value(seed uint64) []byte {
	state := seed*0x9e3779b97f4a7c15 | 1
	next := func() uint64 {
		state ^= state << 13
		state ^= state >> 7
		state ^= state << 17
		return state
	}
	value := make([]byte, 0, valueBytes+32)
	for range valueBytes / 16 {
		value = binary.LittleEndian.AppendUint64(value, next())
	}
	for len(value) < valueBytes {
		value = append(value, fmt.Sprintf("\"name\":\"pod-%x\",", next()>>40)...)
	}
	return value[:valueBytes]
}

func cpuSeconds() float64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return 0
	}
	seconds := func(t syscall.Timeval) float64 { return float64(t.Sec) + float64(t.Usec)/1e6 }
	return seconds(usage.Utime) + seconds(usage.Stime)
}

func numberAfter(file, label string) float64 {
	text, _ := os.ReadFile(file)
	for line := range strings.Lines(string(text)) {
		if rest, found := strings.CutPrefix(line, label); found {
			if fields := strings.Fields(rest); len(fields) > 0 {
				number, _ := strconv.ParseFloat(fields[0], 64)
				return number
			}
		}
	}
	return 0
}
