// Stopping a long computation from outside (Ctrl-C): the core asks `check` now and then and winds
// down when it says so. The core knows no Python; the binding supplies a check that takes the
// interpreter's lock and looks for signals.
//
// The members are not inline, so that code compiled for any instruction set may include this
// header.
#ifndef FASTRNN_CORE_INTERRUPT_H_
#define FASTRNN_CORE_INTERRUPT_H_

#include <atomic>
#include <cstdint>
#include <exception>

namespace fastrnn {

// Thrown by parallel() (threads.h), after every task has stopped, when the computation was
// cancelled.
struct Interrupted : std::exception {
  const char* what() const noexcept override;
};

// Belongs to the thread that constructs it.
struct Interrupt {
  // check(ctx) returns true to cancel. It must not throw, and runs on the owning thread only.
  Interrupt(bool (*check)(void*), void* ctx);

  // Calls check when 10 ms have passed since the last time; a clock read otherwise. Any thread may
  // call this, but on a thread other than the owner it does nothing: kernels need not know which
  // thread they run on.
  void poll();

  // True once cancelled: a task returns as soon as it can, its results are thrown away.
  bool stop() const;

  bool (*check)(void*);
  void* ctx;
  std::atomic<bool> cancelled{false};

 private:
  const void* owner_;
  std::int64_t checked_ns_;  // when check was last called, on the steady clock
};

}  // namespace fastrnn

#endif  // FASTRNN_CORE_INTERRUPT_H_
