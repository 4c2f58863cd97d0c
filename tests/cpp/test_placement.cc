// Where a sleeping thread wakes up: which processors are offered to it, and that a real one comes
// up beside its waker and may use all of its processors afterwards.
#include "core/placement.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <initializer_list>
#include <mutex>
#include <thread>

#include "check.h"

#if defined(__linux__)

namespace {

using fastrnn::free_processors;
using fastrnn::Placement;
using fastrnn::this_processor;

cpu_set_t set_of(std::initializer_list<int> processors) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int processor : processors) CPU_SET(processor, &set);
  return set;
}

bool same(const cpu_set_t& a, const cpu_set_t& b) { return CPU_EQUAL(&a, &b); }

void test_free_processors() {
  // What nobody has, as long as its own is among them.
  CHECK(same(free_processors(set_of({0, 1, 2, 3}), set_of({0}), 2), set_of({1, 2, 3})));
  CHECK(same(free_processors(set_of({0, 1}), set_of({}), 0), set_of({0, 1})));
  CHECK(same(free_processors(set_of({4, 5}), set_of({0, 1}), 5), set_of({4, 5})));
  // Its own is taken: the next one after it, around the end.
  CHECK(same(free_processors(set_of({0, 1, 2, 3}), set_of({0, 2}), 2), set_of({3})));
  CHECK(same(free_processors(set_of({0, 1, 2, 3}), set_of({2, 3}), 3), set_of({0})));
  CHECK(same(free_processors(set_of({0, 1}), set_of({1}), 1), set_of({0})));
  CHECK(same(
      free_processors(set_of({3, CPU_SETSIZE - 1}), set_of({CPU_SETSIZE - 1}), CPU_SETSIZE - 1),
      set_of({3})));
  // Nobody knows where it was, or it was somewhere that it may not use any more.
  CHECK(same(free_processors(set_of({0, 1, 2}), set_of({0}), -1), set_of({1})));
  CHECK(same(free_processors(set_of({0, 1, 2}), set_of({0}), 7), set_of({1})));
  CHECK(same(free_processors(set_of({0, 1, 2}), set_of({0}), CPU_SETSIZE + 5), set_of({1})));
  // None is free: as if nobody were there.
  CHECK(same(free_processors(set_of({0, 1}), set_of({0, 1, 2}), 1), set_of({0, 1})));
}

// Wakes a sleeping thread again and again; it must come up where the waker is not.
void test_wakes_apart() {
  cpu_set_t allowed;
  CHECK_EQ(pthread_getaffinity_np(pthread_self(), sizeof(allowed), &allowed), 0);
  std::mutex mutex;
  std::condition_variable condition;
  bool go = false, over = false;
  std::atomic<int> came_on{-1};
  std::thread sleeper([&] {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex);
      condition.wait(lock, [&] { return go; });
      go = false;
      came_on = this_processor();
      if (over) return;
    }
  });
  int together = 0;
  constexpr int kTimes = 100;
  for (int i = 0; i <= kTimes; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    came_on = -1;
    {
      std::lock_guard<std::mutex> lock(mutex);
      go = true;
      over = i == kTimes;
    }
    Placement placement;
    const int mine = this_processor();
    placement.take(mine);
    placement.wake(sleeper.native_handle(), mine, [&] { condition.notify_one(); });
    if (!over) {
      cpu_set_t now;
      CHECK_EQ(pthread_getaffinity_np(sleeper.native_handle(), sizeof(now), &now), 0);
      CHECK(same(now, allowed));
    }
    while (came_on < 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
    together += came_on == mine;
  }
  sleeper.join();
  // It may be moved as soon as it may use all processors again, and this thread at any time.
  if (CPU_COUNT(&allowed) > 1) CHECK(together <= kTimes / 10);
}

}  // namespace

int main() {
  test_free_processors();
  test_wakes_apart();
  return check_report();
}

#else

int main() { return check_report(); }

#endif
