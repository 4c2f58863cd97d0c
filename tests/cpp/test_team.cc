// A team's members: who takes part, that a barrier separates the turns (checked by the values, and
// by ThreadSanitizer), that all stop in the same turn. With more members than processors too, where
// a barrier must not spin for long.
#include "core/team.h"

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "check.h"
#include "core/args.h"
#include "core/threads.h"

namespace {

using fastrnn::Interrupt;
using fastrnn::Interrupted;
using fastrnn::Team;

using Body = std::function<void(int rank, Team& team)>;

void run(int members, const Body& body, Interrupt* interrupt = nullptr) {
  fastrnn::run_team(
      members,
      [](void* ctx, int rank, Team& team) { (*static_cast<const Body*>(ctx))(rank, team); },
      const_cast<Body*>(&body), interrupt);
}

void test_members() {
  const auto caller = std::this_thread::get_id();
  for (int members = 1; members <= 5; ++members)
    for (int repeat = 0; repeat < 50; ++repeat) {
      std::vector<std::atomic<int>> seen(5);
      std::atomic<int> size{0}, others_at_0{0};
      run(members, [&](int rank, Team& team) {
        ++seen[static_cast<std::size_t>(rank)];
        size = team.size();
        if (rank == 0 && std::this_thread::get_id() != caller) ++others_at_0;
      });
      CHECK(size >= 1 && size <= members);
      CHECK_EQ(others_at_0.load(), 0);
      for (int rank = 0; rank < 5; ++rank)
        CHECK_EQ(seen[static_cast<std::size_t>(rank)].load(), rank < size ? 1 : 0);
    }
}

// Every member writes its number of turns, plainly, and reads all others' after the barrier.
void test_barrier() {
  constexpr int kTurns = 300;
  for (int members : {1, 2, 3, 4}) {
    std::vector<int> turns(4, 0);
    std::atomic<int> wrong{0}, stops{0};
    int size = 0;
    run(members, [&](int rank, Team& team) {
      if (rank == 0) size = team.size();
      for (int turn = 1; turn <= kTurns; ++turn) {
        turns[static_cast<std::size_t>(rank)] = turn;
        stops += team.barrier();
        for (int other = 0; other < team.size(); ++other)
          wrong += turns[static_cast<std::size_t>(other)] != turn;
        stops += fastrnn::team_barrier(&team);  // as kernels call it
      }
    });
    CHECK_EQ(wrong.load(), 0);
    CHECK_EQ(stops.load(), 0);
    for (int rank = 0; rank < 4; ++rank)
      CHECK_EQ(turns[static_cast<std::size_t>(rank)], rank < size ? kTurns : 0);
  }
}

// One member cancels in the middle of a turn; all leave after that turn, none waits for another.
void test_stop() {
  for (int members : {1, 2, 4}) {
    Interrupt interrupt([](void*) { return false; }, nullptr);
    std::vector<int> turns(4, 0);
    int size = 0;
    bool thrown = false;
    try {
      run(
          members,
          [&](int rank, Team& team) {
            if (rank == 0) size = team.size();
            for (int turn = 1; turn <= 100; ++turn) {
              if (turn == 50 && rank == team.size() - 1) interrupt.cancelled = true;
              turns[static_cast<std::size_t>(rank)] = turn;
              if (team.barrier()) return;
            }
          },
          &interrupt);
    } catch (const Interrupted&) {
      thrown = true;
    }
    CHECK(thrown);
    for (int rank = 0; rank < size; ++rank)
      CHECK_EQ(turns[static_cast<std::size_t>(rank)], turns[0]);
    CHECK_EQ(turns[0], 50);
  }
}

// Within a task of the pool nobody can join: the caller is the whole team.
void test_within_a_task() {
  std::atomic<int> sum{0};
  fastrnn::parallel(
      3,
      [](void* ctx, int) {
        run(4, [&](int rank, Team& team) {
          CHECK_EQ(rank, 0);
          CHECK_EQ(team.size(), 1);
          CHECK(!team.barrier());
          ++*static_cast<std::atomic<int>*>(ctx);
        });
      },
      &sum);
  CHECK_EQ(sum.load(), 3);
}

}  // namespace

int main() {
  for (int threads : {1, 2, 4}) {
    fastrnn::set_num_threads(threads);
    test_members();
    test_barrier();
    test_stop();
    test_within_a_task();
  }
  return check_report();
}
