// A team: threads that run the same loop side by side and meet at a barrier in every turn of it.
// Unlike the tasks of parallel(), which must not wait for each other, the members of a team are
// known to be running.
#ifndef FASTRNN_CORE_TEAM_H_
#define FASTRNN_CORE_TEAM_H_

#include <atomic>
#include <cstdint>

#include "core/interrupt.h"
#include "core/spin.h"

namespace fastrnn {

struct TeamCall;

class Team {
 public:
  int size() const { return size_; }

  // Returns when all members have called it; true for all of them if the computation was cancelled,
  // or in a child that was forked meanwhile, where the others do not exist.
  bool barrier();

 private:
  friend struct TeamCall;
  explicit Team(Interrupt* interrupt);

  void sit();  // notes the calling member's processor
  Spin patience() const;

  Interrupt* const interrupt_;
  const unsigned forks_;
  int size_ = 1;
  std::atomic<uint64_t> seats_{0};     // processors that members came on, modulo 64
  std::atomic<bool> together_{false};  // two came on one
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};  // bit 0: stop; the rest counts the turns
};

// Calls fn(ctx, piece, rank, team) for pieces 0 … pieces - 1, one after the other, each on up to
// `members` threads at once, the caller being rank 0; all members have left a piece before the next
// begins. Threads that are not there within `patience_us` microseconds (busy elsewhere, or still
// waking up) are left out and take part from the next piece on: team.size() says how many are in
// this one. Where the patience is less than waking a thread takes, as with a call that is short
// itself, the caller goes alone, unless the call before has ended just now: whoever calls again and
// again has the others awake, and whoever calls now and then does not pay for waking them. fn must
// not throw. Throws Interrupted like parallel().
void run_team(int members, int64_t pieces,
              void (*fn)(void* ctx, int64_t piece, int rank, Team& team), void* ctx,
              double patience_us, Interrupt* interrupt);

}  // namespace fastrnn

#endif  // FASTRNN_CORE_TEAM_H_
