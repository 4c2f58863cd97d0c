#include "core/team.h"

#include <chrono>
#include <thread>

#include "core/args.h"
#include "core/threads.h"

namespace fastrnn {
namespace {

inline void cpu_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory");
#endif
}

// Turns of a spinning wait before the processor is offered to somebody else: some 3 µs where a
// pause takes 140 cycles (Intel's since Skylake), 1 µs where it takes 40. A member that runs is
// seldom later, and a yield that finds nobody costs it 0.3 µs; one that does not run (two members
// on one processor) needs the yield.
constexpr int kSpins = 64;

// Until this bit is set in `joined` members may still join.
constexpr int kClosed = 1 << 30;

constexpr std::chrono::microseconds kWaitForMembers{100};

}  // namespace

bool Team::barrier() {
  if (size_ == 1) return interrupt_ != nullptr && interrupt_->stop();
  const uint32_t turn = turn_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    // The last to arrive decides for all whether to go on: a member that saw the flag alone would
    // leave the others waiting for it.
    const bool stop = interrupt_ != nullptr && interrupt_->stop();
    arrived_.store(0, std::memory_order_relaxed);
    turn_.store(((turn & ~1u) + 2) | (stop ? 1 : 0), std::memory_order_release);
    return stop;
  }
  for (int spins = 0;;) {
    const uint32_t now = turn_.load(std::memory_order_acquire);
    if (now != turn) return (now & 1) != 0;
    if (spins < kSpins) {
      ++spins;
      cpu_pause();
    } else {
      std::this_thread::yield();
    }
  }
}

bool team_barrier(Team* team) { return team->barrier(); }

void run_team(int members, void (*fn)(void* ctx, int rank, Team& team), void* ctx,
              Interrupt* interrupt) {
  struct Call {
    void (*fn)(void*, int, Team&);
    void* ctx;
    int members;
    Team team;
    std::atomic<int> joined{0};
    std::atomic<bool> sized{false};  // rank 0 has fixed the size
  };
  Call call = {fn, ctx, members, Team(interrupt), {0}, {false}};
  parallel(
      members,
      [](void* p, int task) {
        Call& c = *static_cast<Call*>(p);
        if (task == 0) {
          const auto deadline = std::chrono::steady_clock::now() + kWaitForMembers;
          while (c.joined.load() < c.members - 1 && std::chrono::steady_clock::now() < deadline)
            cpu_pause();
          c.team.size_ = 1 + c.joined.fetch_or(kClosed);
          c.sized.store(true, std::memory_order_release);
          c.fn(c.ctx, 0, c.team);
          return;
        }
        int others = c.joined.load();
        do {
          if (others & kClosed) return;
        } while (!c.joined.compare_exchange_weak(others, others + 1));
        while (!c.sized.load(std::memory_order_acquire)) cpu_pause();
        c.fn(c.ctx, others + 1, c.team);
      },
      &call, interrupt);
}

}  // namespace fastrnn
