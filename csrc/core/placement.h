// Where a sleeping thread wakes up: on a processor that no other thread of the same region has.
//
// Left to itself, Linux may put a woken thread on its waker's processor while others are idle, and
// leave it there for tens of milliseconds. Two threads that hand work to each other then take turns
// on one processor, and a call with two threads takes as long as with one (measured:
// docs/performance.md, "A sleeping thread has to wake up").
#ifndef FASTRNN_CORE_PLACEMENT_H_
#define FASTRNN_CORE_PLACEMENT_H_

#include <pthread.h>
#include <sched.h>

namespace fastrnn {

// The processor that the calling thread runs on; -1 where the system does not tell.
int this_processor();

#if defined(__linux__)

// The processors on which a thread may wake that may use `allowed` and was last on `last`, when
// `taken` have a thread of the region each: those that are free, for the system to choose from; a
// single one where it would choose `last` and that is taken. All of `allowed` when none is free.
cpu_set_t free_processors(const cpu_set_t& allowed, const cpu_set_t& taken, int last);

// The processors of a region's threads.
class Placement {
 public:
  Placement() { CPU_ZERO(&taken_); }

  // A thread that runs.
  void take(int processor) {
    if (processor >= 0 && processor < CPU_SETSIZE) CPU_SET(processor, &taken_);
  }

  // Calls wake(), which wakes `thread`, last on `last`; it may use all its processors again when
  // this returns.
  template <class Wake>
  void wake(pthread_t thread, int last, const Wake& wake) {
    cpu_set_t allowed;
    if (pthread_getaffinity_np(thread, sizeof(allowed), &allowed) != 0) return wake();
    const cpu_set_t free = free_processors(allowed, taken_, last);
    const bool steered =
        !CPU_EQUAL(&free, &allowed) && pthread_setaffinity_np(thread, sizeof(free), &free) == 0;
    wake();
    if (steered) pthread_setaffinity_np(thread, sizeof(allowed), &allowed);
    if (CPU_COUNT(&free) == 1) {
      CPU_OR(&taken_, &taken_, &free);
    } else {
      take(last);
    }
  }

 private:
  cpu_set_t taken_;
};

#else

class Placement {
 public:
  void take(int) {}
  template <class Wake>
  void wake(pthread_t, int, const Wake& wake) {
    wake();
  }
};

#endif

}  // namespace fastrnn

#endif  // FASTRNN_CORE_PLACEMENT_H_
