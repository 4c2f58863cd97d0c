// A team's members: who takes part in which piece, that a barrier separates the turns (checked by
// the values, and by ThreadSanitizer), that all stop in the same turn, that a thread that comes
// late takes part from the next piece on, and that a forked child does not wait for members that it
// does not have. With more members than processors too, where a barrier must not spin for long.
#include "core/team.h"

#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <exception>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/args.h"
#include "core/threads.h"

#if defined(__SANITIZE_THREAD__)
#define FASTRNN_THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define FASTRNN_THREAD_SANITIZER 1
#endif
#endif

namespace {

using fastrnn::Interrupt;
using fastrnn::Interrupted;
using fastrnn::Team;

using Body = std::function<void(int rank, Team& team)>;
using Piece = std::function<void(int64_t piece, int rank, Team& team)>;

constexpr double kPatienceUs = 100;

void run_pieces(int members, int64_t pieces, const Piece& body, Interrupt* interrupt = nullptr,
                double patience_us = kPatienceUs) {
  fastrnn::run_team(
      members, pieces,
      [](void* ctx, int64_t piece, int rank, Team& team) {
        (*static_cast<const Piece*>(ctx))(piece, rank, team);
      },
      const_cast<Piece*>(&body), patience_us, interrupt);
}

void run(int members, const Body& body, Interrupt* interrupt = nullptr) {
  run_pieces(members, 1, [&body](int64_t, int rank, Team& team) { body(rank, team); }, interrupt);
}

// Without the patience to wake anybody: alone after a pause, with others in calls that follow each
// other.
void test_little_patience() {
  for (int repeat = 0; repeat < 5; ++repeat) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::atomic<int> bodies{0}, sizes{0};
    run_pieces(
        2, 1,
        [&](int64_t, int, Team& team) {
          ++bodies;
          sizes += team.size();
        },
        nullptr, 10);
    CHECK_EQ(bodies.load(), 1);
    CHECK_EQ(sizes.load(), 1);
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  const int reachable = std::min(2, fastrnn::get_num_threads());
  std::atomic<int> most{0};
  while (most < reachable && std::chrono::steady_clock::now() < deadline)
    run_pieces(
        2, 1,
        [&](int64_t, int rank, Team& team) {
          if (rank == 0) most = std::max(most.load(), team.size());
          team.barrier();
        },
        nullptr, 10);
  CHECK_EQ(most.load(), reachable);
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

// Every piece is worked on by the ranks below its size, once each, and is over when the next
// begins; a team only grows.
void test_pieces() {
  constexpr int kPieces = 200;
  for (int members = 1; members <= 4; ++members) {
    std::vector<std::vector<int>> seen(kPieces, std::vector<int>(4, 0));
    std::vector<int> size(kPieces, 0);
    std::atomic<int> inside{0}, wrong{0};
    std::atomic<int64_t> current{-1};
    run_pieces(members, kPieces, [&](int64_t piece, int rank, Team& team) {
      ++inside;
      if (rank == 0) {
        size[static_cast<std::size_t>(piece)] = team.size();
        current = piece;
      }
      ++seen[static_cast<std::size_t>(piece)][static_cast<std::size_t>(rank)];
      wrong += team.barrier();
      wrong += current != piece || inside != team.size();
      wrong += team.barrier();
      --inside;
    });
    CHECK_EQ(wrong.load(), 0);
    for (std::size_t piece = 0; piece < kPieces; ++piece) {
      CHECK(size[piece] >= (piece == 0 ? 1 : size[piece - 1]) && size[piece] <= members);
      for (int rank = 0; rank < 4; ++rank)
        CHECK_EQ(seen[piece][static_cast<std::size_t>(rank)], rank < size[piece] ? 1 : 0);
    }
  }
}

// A stop in some piece: no further one begins.
void test_stop_between_pieces() {
  Interrupt interrupt([](void*) { return false; }, nullptr);
  std::atomic<int64_t> last{-1};
  bool thrown = false;
  try {
    run_pieces(
        3, 50,
        [&](int64_t piece, int rank, Team&) {
          if (rank == 0) last = piece;
          if (rank == 0 && piece == 7) interrupt.cancelled = true;
        },
        &interrupt);
  } catch (const Interrupted&) {
    thrown = true;
  }
  CHECK(thrown);
  CHECK_EQ(last.load(), 7);
}

#if defined(__linux__) && !defined(FASTRNN_THREAD_SANITIZER) && !defined(FASTRNN_EMULATED)

// The pool's one worker, stopped for 50 ms by a signal, comes when the first pieces are done.
void test_comes_late() {
  std::signal(SIGPROF, [](int) { usleep(50000); });
  fastrnn::set_num_threads(2);
  run(2, [](int, Team&) {});
  int signals = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) {
    const auto thread = std::stol(entry.path().filename());
    if (thread == getpid()) continue;
    ++signals;
    CHECK_EQ(syscall(SYS_tgkill, getpid(), thread, SIGPROF), 0);
  }
  CHECK(signals >= 1);
  usleep(1000);  // they are in the handler now
  std::vector<int> sizes;
  run_pieces(2, 400, [&](int64_t, int rank, Team& team) {
    if (rank != 0) return;
    sizes.push_back(team.size());
    if (team.size() == 1) usleep(5000);
  });
  CHECK_EQ(sizes.size(), 400u);
  CHECK_EQ(sizes.front(), 1);
  CHECK_EQ(sizes.back(), 2);
  std::signal(SIGPROF, SIG_DFL);
}

// Forked by one member between two barriers: the parent's team goes on, the child's one member
// leaves instead of waiting for the others, and the call says what happened.
void test_fork_within_a_team() {
  fastrnn::set_num_threads(2);
  pid_t child = -1;
  int turns = 0;  // of rank 0, in pieces with both
  int pieces = 0;
  std::string message;
  try {
    run_pieces(2, 400, [&](int64_t, int rank, Team& team) {
      if (team.size() == 1) {
        usleep(5000);
        return;
      }
      if (rank == 0) ++pieces;
      for (int turn = 0; turn < 20; ++turn) {
        if (rank == 0 && child < 0 && turn == 5) {
          child = fork();
          if (child == 0) alarm(10);
        }
        if (rank == 0) ++turns;
        if (team.barrier()) return;
      }
    });
  } catch (const std::exception& error) {
    message = error.what();
  }
  if (child == 0) _exit(message.find("forked") != std::string::npos && turns < 20 ? 0 : 1);
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK_EQ(message, std::string());
  CHECK(pieces > 0);
  CHECK_EQ(turns, 20 * pieces);
}

#endif

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
    test_little_patience();
    test_barrier();
    test_stop();
    test_pieces();
    test_stop_between_pieces();
    test_within_a_task();
  }
#if defined(__linux__) && !defined(FASTRNN_THREAD_SANITIZER) && !defined(FASTRNN_EMULATED)
  test_comes_late();
  test_fork_within_a_team();
#endif
  return check_report();
}
