package main

import (
	"errors"
	"sync"
	"sync/atomic"
)

// inParallel calls work(0) to work(count-1) from several goroutines and joins the errors. After an error no new call is
// begun.
func inParallel(workers, count int, work func(i int) error) error {
	var next atomic.Int64
	var failed atomic.Bool
	var group sync.WaitGroup
	errs := make([]error, workers)
	for w := range workers {
		group.Go(func() {
			for !failed.Load() {
				i := int(next.Add(1)) - 1
				if i >= count {
					return
				}
				if err := work(i); err != nil {
					errs[w] = err
					failed.Store(true)
				}
			}
		})
	}
	group.Wait()
	return errors.Join(errs...)
}
