// The pool behind parallel(), and how many threads it may have.
//
// Each worker has a slot in which the caller offers a region (a pointer); whoever exchanges it for
// null owns the offer: the worker, which then works on the region, or the caller, which takes back
// what no worker has picked up by the time no tasks are left. So a region never waits for a thread
// that is slow to wake. The region itself lies on the caller's stack; a worker's last touch of it
// comes before its decrement of `remaining`.
//
// Waiting, on both sides: spin (a hand-over between running threads costs 0.1 µs), a worker for
// some 100 µs, the caller for 2 ms, then sleep on a condition variable. Sleeper and waker each
// write their own flag and then read the other's with sequential consistency, so a wake-up cannot
// be missed. Who is woken wakes on a processor of its own (core/placement.h).
#include "core/threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "core/fpenv.h"
#include "core/placement.h"
#include "core/spin.h"

namespace fastrnn {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds kSpin{100};  // about what a thread takes to wake at best
// A caller that waits for threads at work: asleep, it would itself have to be woken, late and
// perhaps on the processor of the thread that wakes it.
constexpr std::chrono::microseconds kSpinForOthers{2000};
constexpr std::chrono::milliseconds kPollWhileWaiting{20};
constexpr std::int64_t kPollNs = 10'000'000;

thread_local bool t_in_task = false;  // this thread is working on a region
thread_local char t_identity = 0;     // its address tells threads apart

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch())
      .count();
}

// True as soon as ready() is; false when it was not for `budget`. Whoever has waited in vain
// sleeps: to offer the processor to others first would hand it to another program for milliseconds.
template <class Ready>
bool spin_until(const Ready& ready, Clock::duration budget) {
  const Clock::time_point deadline = Clock::now() + budget;
  do {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      cpu_pause();
    }
  } while (Clock::now() < deadline);
  return ready();
}

// One call of parallel(); task 0 is the caller's.
struct Region {
  Region(int task_count, TaskFn task_fn, void* task_ctx, Interrupt* interrupt)
      : tasks(task_count), fn(task_fn), ctx(task_ctx), poll(interrupt) {}

  bool stopped() const {
    return failed.load(std::memory_order_relaxed) || (poll != nullptr && poll->stop());
  }

  void run(int task) {
    try {
      fn(ctx, task);
    } catch (...) {
      // Only the first writes; the caller reads after every worker has left.
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }

  void claim_tasks() {
    while (!stopped()) {
      const std::int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      run(static_cast<int>(task));
      if (poll != nullptr) poll->poll();
    }
  }

  const std::int64_t tasks;
  const TaskFn fn;
  void* const ctx;
  Interrupt* const poll;
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  alignas(64) std::atomic<std::int64_t> next{1};
};

// available_threads() when the pool was first used: to ask each time would take too long.
int processors() {
  static const int n = available_threads();
  return n;
}

struct Worker {
  alignas(64) std::atomic<Region*> offer{nullptr};
  std::atomic<bool> parked{false};
  std::atomic<int> processor{-1};  // where it was when it last had an offer or went to sleep
  pthread_t thread{};
  std::mutex mutex;
  std::condition_variable wake;
};

std::atomic<unsigned> g_forks{
    0};  // how many forks this process descends from, as far as the pool knows

class Pool {
 public:
  // False when another caller is in a region.
  bool try_acquire() { return !busy_.exchange(true, std::memory_order_acquire); }
  void release() { busy_.store(false, std::memory_order_release); }

  // Works on the region with `threads` threads, this one included. The caller has acquired the
  // pool.
  void run(Region& region, int threads) {
    const unsigned forks = g_forks.load();
    const std::size_t helpers = start_workers(threads - 1);
    remaining_.store(static_cast<int>(helpers));
    offer(helpers, &region);
    try {
      region.run(0);
      region.claim_tasks();
      take_back(helpers);
      join(region.poll, forks);
    } catch (
        ...) {  // poll's check threw although it must not: never leave with workers on our stack
      region.failed.store(true);
      take_back(helpers);
      join(nullptr, forks);
      throw;
    }
  }

 private:
  // Makes sure of `wanted` workers as far as the system lets us; returns how many of them there
  // are.
  std::size_t start_workers(int wanted) {
    const auto count = static_cast<std::size_t>(wanted);
    // With more threads than processors a spinning one only keeps another from its work.
    spin_ns_.store(wanted < processors() ? std::chrono::nanoseconds(kSpin).count() : 0);
    if (workers_.size() < count) {
      // Signals belong to the application's threads; the synchronous ones stay, for crash
      // reporters.
      sigset_t blocked;
      sigset_t before;
      sigfillset(&blocked);
      for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS, SIGPROF}) {
        sigdelset(&blocked, signal);
      }
      pthread_sigmask(SIG_SETMASK, &blocked, &before);
      try {
        while (workers_.size() < count) {
          workers_.reserve(count);
          auto worker = std::make_unique<Worker>();
          std::thread thread(&Pool::worker_main, this, worker.get());
          worker->thread = thread.native_handle();  // valid for good: workers never end
          thread.detach();
          workers_.push_back(std::move(worker));
        }
      } catch (const std::system_error&) {  // no more threads: fewer do
      } catch (const std::bad_alloc&) {
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    return std::min(count, workers_.size());
  }

  // To all first: those who spin are on their way while the sleepers are woken.
  void offer(std::size_t helpers, Region* region) {
    for (std::size_t i = 0; i < helpers; ++i) workers_[i]->offer.store(region);
    Placement placement;
    placement.take(this_processor());
    for (std::size_t i = 0; i < helpers; ++i) {
      Worker& worker = *workers_[i];
      const int processor = worker.processor.load(std::memory_order_relaxed);
      if (!worker.parked.load()) {
        placement.take(processor);
        continue;
      }
      {
        std::lock_guard<std::mutex> lock(worker.mutex);
      }  // it is now inside wait, not on its way
      placement.wake(worker.thread, processor, [&worker] { worker.wake.notify_one(); });
    }
  }

  void take_back(std::size_t helpers) {
    int taken = 0;
    for (std::size_t i = 0; i < helpers; ++i) {
      if (workers_[i]->offer.exchange(nullptr) != nullptr) ++taken;
    }
    remaining_.fetch_sub(taken);
  }

  void join(Interrupt* poll, unsigned forks) {
    const auto done = [this] { return remaining_.load() == 0; };
    if (spin_until(done, spin_ns_.load() > 0 ? kSpinForOthers : kSpinForOthers.zero())) return;
    while (!done()) {
      if (g_forks.load() !=
          forks) {  // poll's check forked, and this is the child: nobody will finish
        throw std::runtime_error("the process was forked in the middle of a computation");
      }
      {
        std::unique_lock<std::mutex> lock(done_mutex_);
        caller_parked_.store(true);
        done_.wait_for(lock, kPollWhileWaiting, done);
        caller_parked_.store(false);
      }
      if (poll != nullptr && !done()) poll->poll();
    }
  }

  static void worker_main(Pool* pool, Worker* worker) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "fastrnn");
#endif
    FpEnv environment;
    t_in_task = true;
    const auto offered = [worker] { return worker->offer.load() != nullptr; };
    for (;;) {
      if (!spin_until(offered, std::chrono::nanoseconds(pool->spin_ns_.load()))) {
        std::unique_lock<std::mutex> lock(worker->mutex);
        worker->processor.store(this_processor(), std::memory_order_relaxed);
        worker->parked.store(true);
        // No loop: woken for an offer that was taken back again, spin for the next one.
        if (!offered()) worker->wake.wait(lock);
        worker->parked.store(false);
      }
      Region* region = worker->offer.exchange(nullptr);
      if (region == nullptr) continue;  // taken back meanwhile
      worker->processor.store(this_processor(), std::memory_order_relaxed);
      region->claim_tasks();
      if (pool->remaining_.fetch_sub(1) == 1 && pool->caller_parked_.load()) {
        {
          std::lock_guard<std::mutex> lock(pool->done_mutex_);
        }
        pool->done_.notify_one();
      }
    }
  }

  std::atomic<bool> busy_{false};
  std::vector<std::unique_ptr<Worker>> workers_;  // touched by the acquirer only
  std::atomic<std::int64_t> spin_ns_{0};

  alignas(64) std::atomic<int> remaining_{0};  // workers that may still touch the region
  std::atomic<bool> caller_parked_{false};
  std::mutex done_mutex_;
  std::condition_variable done_;
};

// Never destroyed: workers sleep in it until the process ends. A forked child, in which the workers
// do not exist and the mutexes may be held by nobody, forgets the parent's pool and makes its own.
std::atomic<Pool*> g_pool{nullptr};

void forget_pool_after_fork() {
  g_pool.store(nullptr);
  g_forks.fetch_add(1);
}

const bool g_fork_safe = pthread_atfork(nullptr, nullptr, forget_pool_after_fork) == 0;

Pool& pool() {
  if (!g_fork_safe) throw std::bad_alloc();  // the only reason pthread_atfork can have
  Pool* current = g_pool.load();
  if (current == nullptr) {
    auto fresh = std::make_unique<Pool>();
    if (g_pool.compare_exchange_strong(current, fresh.get())) current = fresh.release();
  }
  return *current;
}

struct InTask {
  InTask() { t_in_task = true; }
  ~InTask() { t_in_task = false; }
};

struct Acquired {
  explicit Acquired(Pool& p) : pool(p), held(p.try_acquire()) {}
  ~Acquired() {
    if (held) pool.release();
  }
  Pool& pool;
  const bool held;
};

void throw_if_stopped(const Interrupt* poll) {
  if (poll != nullptr && poll->stop()) throw Interrupted();
}

void run_serially(int tasks, TaskFn fn, void* ctx, Interrupt* poll) {
  for (int task = 0; task < tasks; ++task) {
    if (task > 0 && poll != nullptr) poll->poll();
    throw_if_stopped(poll);
    fn(ctx, task);
  }
  throw_if_stopped(poll);
}

std::invalid_argument bad_thread_count(const std::string& name, const std::string& got) {
  return std::invalid_argument(name + ": expected an integer from 1 to " +
                               std::to_string(kMaxThreads) + ", got " + got);
}

int default_num_threads() {
  const char* name = "FASTRNN_NUM_THREADS";
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return std::min(available_threads(), kMaxThreads);
  char* end = nullptr;
  errno = 0;
  const long n = std::strtol(text, &end, 10);
  if (errno != 0 || *end != '\0' || n < 1 || n > kMaxThreads) {
    throw bad_thread_count(name, "'" + std::string(text) + "'");
  }
  return static_cast<int>(n);
}

std::atomic<int> g_num_threads{0};  // 0: not decided yet

int affinity_count() {
#if defined(__linux__)
  for (int cpus = 1024; cpus <= 1 << 20;
       cpus *= 2) {  // the kernel refuses a mask smaller than its own
    cpu_set_t* set = CPU_ALLOC(static_cast<std::size_t>(cpus));
    if (set == nullptr) break;
    const std::size_t bytes = CPU_ALLOC_SIZE(static_cast<std::size_t>(cpus));
    const bool known = sched_getaffinity(0, bytes, set) == 0;
    const int count = known ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (known) return std::max(1, count);
    if (errno != EINVAL) break;
  }
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Quota and period of one cgroup directory, in CPUs rounded up; 0 when unlimited or unreadable.
int directory_limit(const std::string& directory, bool version2) {
  double quota = 0;
  double period = 0;
  if (version2) {
    std::ifstream file(directory + "/cpu.max");  // "150000 100000" or "max 100000"
    if (!(file >> quota >> period)) return 0;
  } else {
    std::ifstream quota_file(directory + "/cpu.cfs_quota_us");  // -1: unlimited
    std::ifstream period_file(directory + "/cpu.cfs_period_us");
    if (!(quota_file >> quota) || !(period_file >> period)) return 0;
  }
  if (!(quota > 0) || !(period > 0)) return 0;
  const double cpus = quota / period;
  if (cpus >= kMaxThreads) return 0;
  const int whole = static_cast<int>(cpus);
  return std::max(1, whole + (cpus > whole ? 1 : 0));
}

// The tightest limit of mount/path and all its parents up to the mount.
int hierarchy_limit(const std::string& mount, std::string path, bool version2) {
  int limit = 0;
  for (;;) {
    const int here = directory_limit(mount + path, version2);
    if (here > 0) limit = limit == 0 ? here : std::min(limit, here);
    const std::size_t slash = path.rfind('/');
    if (slash == std::string::npos) return limit;
    path.erase(slash);
  }
}

}  // namespace

const char* Interrupted::what() const noexcept { return "the computation was interrupted"; }

Interrupt::Interrupt(bool (*check_fn)(void*), void* check_ctx)
    : check(check_fn), ctx(check_ctx), owner_(&t_identity), checked_ns_(now_ns()) {}

void Interrupt::poll() {
  if (owner_ != &t_identity || stop()) return;
  const std::int64_t now = now_ns();
  if (now - checked_ns_ < kPollNs) return;
  if (check(ctx)) cancelled.store(true, std::memory_order_relaxed);
  checked_ns_ = now_ns();
}

bool Interrupt::stop() const { return cancelled.load(std::memory_order_relaxed); }

void parallel(int tasks, TaskFn fn, void* ctx, Interrupt* poll) {
  throw_if_stopped(poll);
  if (tasks <= 1 || t_in_task) return run_serially(tasks, fn, ctx, poll);
  const int threads = std::min(tasks, get_num_threads());
  if (threads == 1) return run_serially(tasks, fn, ctx, poll);
  Acquired acquired(pool());
  if (!acquired.held) return run_serially(tasks, fn, ctx, poll);
  Region region(tasks, fn, ctx, poll);
  {
    InTask in_task;
    acquired.pool.run(region, threads);
  }
  if (region.error) std::rethrow_exception(region.error);
  throw_if_stopped(poll);
}

unsigned fork_count() { return g_forks.load(); }

int pauses_among(int threads) {
  return threads <= processors() ? kPausesBeforeYield : kPausesTogether;
}

int get_num_threads() {
  int n = g_num_threads.load(std::memory_order_relaxed);
  if (n == 0) {
    const int chosen = default_num_threads();
    n = g_num_threads.compare_exchange_strong(n, chosen) ? chosen : n;
  }
  return n;
}

void set_num_threads(int n) {
  if (n < 1 || n > kMaxThreads) throw bad_thread_count("threads", std::to_string(n));
  g_num_threads.store(n);
}

int available_threads() {
  const int cpus = affinity_count();
#if defined(__linux__)
  const int limit = detail::cgroup_cpu_limit("/proc/self/cgroup", "/sys/fs/cgroup");
  if (limit > 0) return std::min(cpus, limit);
#endif
  return cpus;
}

namespace detail {

int cgroup_cpu_limit(const std::string& membership, const std::string& mount) {
  std::ifstream file(membership);
  int limit = 0;
  const auto tighten = [&limit](int found) {
    if (found > 0) limit = limit == 0 ? found : std::min(limit, found);
  };
  for (std::string line; std::getline(file, line);) {  // "id:controllers:path"
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (controllers.empty()) {
      tighten(hierarchy_limit(mount, path, true));
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      tighten(hierarchy_limit(mount + "/" + controllers, path, false));
      if (controllers != "cpu") tighten(hierarchy_limit(mount + "/cpu", path, false));
    }
  }
  return limit;
}

}  // namespace detail
}  // namespace fastrnn
