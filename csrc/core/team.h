// A team: threads that run the same loop side by side and meet at a barrier in every turn of it.
// Unlike the tasks of parallel(), which must not wait for each other, the members of a team are
// known to be running.
#ifndef FASTRNN_CORE_TEAM_H_
#define FASTRNN_CORE_TEAM_H_

#include <atomic>
#include <cstdint>

#include "core/interrupt.h"

namespace fastrnn {

class Team {
 public:
  int size() const { return size_; }

  // Returns when all members have called it; true for all of them if the computation was cancelled.
  bool barrier();

 private:
  friend void run_team(int, void (*)(void*, int, Team&), void*, Interrupt*);
  explicit Team(Interrupt* interrupt) : interrupt_(interrupt) {}

  Interrupt* const interrupt_;
  int size_ = 1;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};  // bit 0: stop; the rest counts the turns
};

// Calls fn(ctx, rank, team) on up to `members` threads at once, the caller being rank 0. Threads
// that are not there within some 100 µs (busy elsewhere, or no processor free) are left out:
// team.size() says how many take part. fn must not throw. Throws Interrupted like parallel().
void run_team(int members, void (*fn)(void* ctx, int rank, Team& team), void* ctx,
              Interrupt* interrupt);

}  // namespace fastrnn

#endif  // FASTRNN_CORE_TEAM_H_
