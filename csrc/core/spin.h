// Waiting for another thread that is expected to be quick.
#ifndef FASTRNN_CORE_SPIN_H_
#define FASTRNN_CORE_SPIN_H_

#include <thread>

namespace fastrnn {

inline void cpu_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory");
#endif
}

// Pauses before a waiting thread offers its processor to others: some 200 µs where a pause takes
// 140 cycles (Intel's since Skylake), 60 µs where it takes 40. Not sooner, since another program
// that gets the processor keeps it for milliseconds.
constexpr int kPausesBeforeYield = 4096;

// The same where the thread that is waited for may need this very processor: some 3 µs, or 1 µs.
constexpr int kPausesTogether = 64;

// Turns of a wait, until reset().
class Spin {
 public:
  explicit Spin(int pauses = kPausesBeforeYield) : pauses_(pauses) {}

  void wait() {
    if (waited_ < pauses_) {
      ++waited_;
      cpu_pause();
    } else {
      std::this_thread::yield();
    }
  }
  void reset() { waited_ = 0; }

 private:
  const int pauses_;
  int waited_ = 0;
};

}  // namespace fastrnn

#endif  // FASTRNN_CORE_SPIN_H_
