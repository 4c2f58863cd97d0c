#include "core/team.h"

#include <chrono>

#include "core/args.h"
#include "core/placement.h"
#include "core/spin.h"
#include "core/threads.h"

namespace fastrnn {
bool Team::barrier() {
  const int size = size_;  // not read again: once all have arrived, the next piece may change it
  if (size == 1) return interrupt_ != nullptr && interrupt_->stop();
  // Alone in a forked child, it would else be its own second member at the next barrier.
  if (fork_count() != forks_) return true;
  const uint32_t turn = turn_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    // The last to arrive decides for all whether to go on: a member that saw the flag alone would
    // leave the others waiting for it.
    const bool stop = interrupt_ != nullptr && interrupt_->stop();
    arrived_.store(0, std::memory_order_relaxed);
    turn_.store(((turn & ~1u) + 2) | (stop ? 1 : 0), std::memory_order_release);
    return stop;
  }
  for (Spin spin = patience();; spin.wait()) {
    const uint32_t now = turn_.load(std::memory_order_acquire);
    if (now != turn) return (now & 1) != 0;
  }
}

void Team::sit() {
  const uint64_t seat = uint64_t{1} << (this_processor() & 63);
  if (seats_.fetch_or(seat) & seat) together_.store(true);
}

Spin Team::patience() const {
  return together_.load(std::memory_order_relaxed) ? Spin(kPausesTogether) : Spin();
}

bool team_barrier(Team* team) { return team->barrier(); }

namespace {

using Piece = void (*)(void* ctx, int64_t piece, int rank, Team& team);

constexpr int kClosed = 1 << 30;
constexpr int kSizeShift = 48;
constexpr uint64_t kOver = ~uint64_t{0};

}  // namespace

// One call of run_team().
struct TeamCall {
  TeamCall(int member_count, int64_t piece_count, Piece piece_fn, void* piece_ctx, double wait_us,
           Interrupt* interrupt)
      : members(member_count),
        pieces(piece_count),
        fn(piece_fn),
        ctx(piece_ctx),
        patience_us(wait_us),
        team(interrupt) {}

  // Rank 0.
  void lead() {
    team.sit();
    const auto deadline = std::chrono::steady_clock::now() +
                          std::chrono::nanoseconds(static_cast<int64_t>(1000 * patience_us));
    while (joined.load() < members - 1 && std::chrono::steady_clock::now() < deadline) cpu_pause();
    bool stop = false;
    for (int64_t piece = 0; piece < pieces && !stop; ++piece) {
      team.size_ = 1 + joined.load();
      in_hand.store(
          static_cast<uint64_t>(team.size_) << kSizeShift | static_cast<uint64_t>(piece + 1),
          std::memory_order_release);
      fn(ctx, piece, 0, team);
      stop = team.barrier();
    }
    joined.fetch_or(kClosed);
    in_hand.store(kOver);
  }

  // Any other thread.
  void follow() {
    int before = joined.load();
    do {
      if (before & kClosed) return;
    } while (!joined.compare_exchange_weak(before, before + 1));
    const int rank = before + 1;
    team.sit();
    for (uint64_t seen = 0;;) {
      uint64_t now = in_hand.load(std::memory_order_acquire);
      for (Spin spin = team.patience(); now == seen; now = in_hand.load(std::memory_order_acquire))
        spin.wait();
      if (now == kOver) return;
      seen = now;
      if (rank >= static_cast<int>(now >> kSizeShift)) continue;  // too late for this one
      const uint64_t piece = now & ((uint64_t{1} << kSizeShift) - 1);
      fn(ctx, static_cast<int64_t>(piece - 1), rank, team);
      if (team.barrier()) return;
    }
  }

  const int members;
  const int64_t pieces;
  const Piece fn;
  void* const ctx;
  const double patience_us;
  Team team;
  std::atomic<int> joined{0};  // threads beside rank 0; with kClosed: it is over
  // The piece in hand, counted from 1, and above it the team's size, for a member must see both at
  // once. 0 before the first, kOver after the last.
  std::atomic<uint64_t> in_hand{0};
};

Team::Team(Interrupt* interrupt) : interrupt_(interrupt), forks_(fork_count()) {}

namespace {

using Clock = std::chrono::steady_clock;

// What it takes to wake a thread; and how long a thread spins before it sleeps, twice.
constexpr double kWakingUs = 100;
constexpr std::chrono::microseconds kInARow{200};

// When the last call ended, whoever's.
std::atomic<Clock::rep> g_last_end{0};

bool in_a_row() {
  const Clock::time_point last{Clock::duration(g_last_end.load(std::memory_order_relaxed))};
  return Clock::now() - last < kInARow;
}

}  // namespace

void run_team(int members, int64_t pieces, Piece fn, void* ctx, double patience_us,
              Interrupt* interrupt) {
  if (patience_us < kWakingUs && !in_a_row()) members = 1;
  TeamCall call(members, pieces, fn, ctx, patience_us, interrupt);
  parallel(
      members,
      [](void* p, int task) {
        TeamCall& c = *static_cast<TeamCall*>(p);
        if (task == 0) {
          c.lead();
        } else {
          c.follow();
        }
      },
      &call, interrupt);
  g_last_end.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
}

}  // namespace fastrnn
