package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// pollInterval is short against everything that is waited for and long enough to leave the processor to the servers.
const pollInterval = 100 * time.Millisecond

// permanentError ends a wait at once.
type permanentError struct{ error }

func permanent(err error) error { return permanentError{err} }

// eventually calls check until it answers nil. When patience runs out, the error says what was waited for and the last
// reason why it was not there.
func eventually(ctx context.Context, patience time.Duration, what string, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		var final permanentError
		if errors.As(err, &final) {
			return fmt.Errorf("waiting for %s: %w", what, final.error)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited %s for %s: %w", patience, what, err)
		case <-time.After(pollInterval):
		}
	}
}
