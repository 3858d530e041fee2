package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// supervisor starts child processes and sees to it that none outlives this program.
//
// Three things work together. Every child is stopped by its own id (its process group, which has the same number, so a
// child that forked is covered too). Every child asks the kernel to be killed when its parent's thread dies, which covers
// a crash or a SIGKILL of this program. And because that is tied to the thread, not the process, all children are started
// from one goroutine which keeps its thread for ever: the Go runtime may end any other thread at any time.
type supervisor struct {
	starts chan func()
	logDir string

	mutex     sync.Mutex
	processes []*process
}

func newSupervisor(logDir string) *supervisor {
	s := &supervisor{starts: make(chan func()), logDir: logDir}
	go func() {
		runtime.LockOSThread()
		for start := range s.starts {
			start()
		}
	}()
	return s
}

// process is one started child.
type process struct {
	name    string
	command *exec.Cmd
	logPath string
	// done is closed when the process has been reaped; result is set before.
	done   chan struct{}
	result error
	// stopping is set before we signal it, so that an exit we asked for is not taken for a crash.
	stopping atomic.Bool
}

// start runs argv with its output appended to the log called name.
func (s *supervisor) start(name string, argv []string, environment []string) (*process, error) {
	logPath := filepath.Join(s.logDir, name+".log")
	logFile, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	fmt.Fprintf(logFile, "=== e2e: %s: %s\n", time.Now().Format(time.RFC3339Nano), strings.Join(argv, " "))

	command := exec.Command(argv[0], argv[1:]...)
	command.Stdout, command.Stderr = logFile, logFile
	command.Env = append(os.Environ(), environment...)
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	p := &process{name: name, command: command, logPath: logPath, done: make(chan struct{})}

	started := make(chan error)
	s.starts <- func() { started <- command.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	s.mutex.Lock()
	s.processes = append(s.processes, p)
	s.mutex.Unlock()
	go func() {
		p.result = command.Wait()
		close(p.done)
	}()
	return p, nil
}

// signal sends to the process and whatever it forked.
func (p *process) signal(sig syscall.Signal) {
	p.stopping.Store(true)
	// ESRCH only says that it is gone already.
	_ = syscall.Kill(-p.command.Process.Pid, sig)
}

// kill is kill -9, and waits until the kernel has taken the process down: its ports are free afterwards.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.done
}

// terminate asks with SIGTERM and reports whether the process obeyed in time; it is gone afterwards in either case.
func (p *process) terminate(patience time.Duration) error {
	p.signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(patience):
		p.kill()
		return fmt.Errorf("%s did not stop within %s of SIGTERM", p.name, patience)
	}
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// close ends everything that still runs, and answers an error if a process group was left behind by its leader.
func (s *supervisor) close() error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	for _, p := range s.processes {
		if p.running() {
			p.signal(syscall.SIGTERM)
		}
	}
	patience := time.After(10 * time.Second)
	for _, p := range s.processes {
		select {
		case <-p.done:
		case <-patience:
			p.kill()
			patience = time.After(0)
		}
	}
	var orphans []error
	for _, p := range s.processes {
		if syscall.Kill(-p.command.Process.Pid, 0) == nil {
			p.kill()
			orphans = append(orphans, fmt.Errorf("%s left a process behind", p.name))
		}
	}
	return errors.Join(orphans...)
}

// printLogTails shows the end of every log once, newest lines last.
func (s *supervisor) printLogTails(lines int) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	seen := map[string]bool{}
	for _, p := range s.processes {
		if seen[p.logPath] {
			continue
		}
		seen[p.logPath] = true
		content, err := os.ReadFile(p.logPath)
		if err != nil {
			fmt.Printf("--- %s: %v\n", p.logPath, err)
			continue
		}
		all := strings.Split(strings.TrimRight(string(content), "\n"), "\n")
		if len(all) > lines {
			all = all[len(all)-lines:]
		}
		fmt.Printf("--- the end of %s\n", p.logPath)
		for _, line := range all {
			// A single line of a server's log can carry a whole request.
			if len(line) > 400 {
				line = line[:400] + " ..."
			}
			fmt.Println(line)
		}
	}
}
