// The thread pool: one per process, started at first use, asleep when idle, rebuilt in a forked
// child.
#ifndef FASTRNN_CORE_THREADS_H_
#define FASTRNN_CORE_THREADS_H_

#include <string>

#include "core/interrupt.h"

namespace fastrnn {

constexpr int kMaxThreads = 1024;

using TaskFn = void (*)(void* ctx, int task);  // may throw

// Runs fn(ctx, 0) … fn(ctx, tasks - 1) on up to get_num_threads() threads and returns when all have
// ended. The caller takes part and always runs task 0; the others go in any order to whichever
// thread is free, so tasks must not wait for each other, but for what a running thread has in hand
// (see fork_count()). When another caller holds the pool, or from within a task, everything runs on
// the caller.
//
// The first exception of a task is rethrown here after the running tasks have ended and the rest
// were dropped. With `poll`, the caller polls it while it waits and between tasks; once it is
// cancelled (before the call too), Interrupted is thrown when all tasks have ended. A task that
// takes more than some 50 ms polls and watches stop() itself.
void parallel(int tasks, TaskFn fn, void* ctx, Interrupt* poll = nullptr);

// How many forks this process descends from. A task that waits for what another running thread has
// in hand leaves when this has changed: in a forked child that thread does not exist, and
// parallel() then throws.
unsigned fork_count();

// Threads a parallel region may use, the caller's included. At first FASTRNN_NUM_THREADS, else
// available_threads(); throws std::invalid_argument when that variable is not an integer from 1 to
// kMaxThreads.
int get_num_threads();

// n from 1 to kMaxThreads, else std::invalid_argument; more than the machine has is allowed, and
// slow.
void set_num_threads(int n);

// Processors this process may use now: its affinity mask, cut by the cgroup's CPU quota (rounded
// up).
int available_threads();

// How long a thread that is one of `threads` should spin before it offers its processor to others:
// pauses for a Spin (core/spin.h). Few where there are more threads than processors.
int pauses_among(int threads);

namespace detail {

// CPUs' worth of quota, rounded up, from a file like /proc/self/cgroup and the cgroup mount
// (versions 1 and 2, all ancestors considered); 0 when there is no limit.
int cgroup_cpu_limit(const std::string& membership, const std::string& mount);

}  // namespace detail
}  // namespace fastrnn

#endif  // FASTRNN_CORE_THREADS_H_
