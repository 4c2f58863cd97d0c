// The thread pool under hostile use: exceptions, nesting, several callers, forks, interrupts,
// idling, exit. Run it under ThreadSanitizer with TSAN_OPTIONS=die_after_fork=0.
#include "core/threads.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/fpenv.h"

#if defined(__SANITIZE_THREAD__)
#define FASTRNN_THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define FASTRNN_THREAD_SANITIZER 1
#endif
#endif

namespace {

// ThreadSanitizer cannot follow a forked child that starts threads, and neither can qemu-user.
#if defined(FASTRNN_THREAD_SANITIZER) || defined(FASTRNN_EMULATED)
constexpr bool kForkAndThreads = false;
#else
constexpr bool kForkAndThreads = true;
#endif

using Clock = std::chrono::steady_clock;
using fastrnn::Interrupt;
using fastrnn::Interrupted;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double cpu_seconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

// parallel() for any callable.
void run(int tasks, const std::function<void(int)>& body, Interrupt* poll = nullptr) {
  fastrnn::parallel(
      tasks,
      [](void* ctx, int task) { (*static_cast<const std::function<void(int)>*>(ctx))(task); },
      const_cast<std::function<void(int)>*>(&body), poll);
}

// True when `tasks` tasks ran exactly once each and their plain writes are visible here.
bool each_runs_once(int tasks) {
  std::vector<int> runs(static_cast<std::size_t>(tasks), 0);
  run(tasks, [&](int task) { ++runs[static_cast<std::size_t>(task)]; });
  for (int n : runs) {
    if (n != 1) return false;
  }
  return true;
}

// The exit status of a child that runs `body`; -1 when it died otherwise or took over ten seconds.
int in_child(const std::function<int()>& body) {
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(10);
    _exit(body());
  }
  int status = 0;
  if (waitpid(pid, &status, 0) != pid) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

template <class Exception>
std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Exception& error) {
    return error.what();
  }
  return "(no exception)";
}

void test_every_task_runs_once() {
  for (int threads : {1, 2, 3, 8}) {
    fastrnn::set_num_threads(threads);
    CHECK_EQ(fastrnn::get_num_threads(), threads);
    for (int tasks : {0, 1, 2, 3, 7, 1000}) CHECK(each_runs_once(tasks));
  }
  fastrnn::set_num_threads(4);
  for (int i = 0; i < 2000; ++i) CHECK(each_runs_once(1 + i % 9));
}

void test_task_0_is_the_callers() {
  const auto caller = std::this_thread::get_id();
  std::thread::id ran_on;
  run(100, [&](int task) {
    if (task == 0) ran_on = std::this_thread::get_id();
  });
  CHECK(ran_on == caller);
}

void test_tasks_run_at_the_same_time() {
  fastrnn::set_num_threads(2);
  std::atomic<int> started{0};
  const auto start = Clock::now();
  run(2, [&](int) {
    ++started;
    while (started < 2 && seconds_since(start) < 5) std::this_thread::yield();
  });
  CHECK(seconds_since(start) < 5);
}

void test_exceptions() {
  fastrnn::set_num_threads(4);
  for (int bad : {0, 1, 99}) {
    const std::string message = message_of<std::runtime_error>([&] {
      run(100, [&](int task) {
        if (task == bad) throw std::runtime_error("task " + std::to_string(task));
      });
    });
    CHECK_EQ(message, "task " + std::to_string(bad));
    CHECK(each_runs_once(50));
  }
  bool out_of_memory = false;
  try {
    run(8, [](int) { throw std::bad_alloc(); });
  } catch (const std::bad_alloc&) {
    out_of_memory = true;
  }
  CHECK(out_of_memory);
  CHECK(each_runs_once(50));
}

void test_nesting() {
  fastrnn::set_num_threads(3);
  std::atomic<int> inner{0};
  run(6, [&](int) {
    const auto here = std::this_thread::get_id();
    run(5, [&](int) {
      if (std::this_thread::get_id() == here) ++inner;
    });
  });
  CHECK_EQ(inner.load(), 30);
}

void test_many_callers() {
  fastrnn::set_num_threads(3);
  std::atomic<int> good{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int k = 0; k < 300; ++k) good += each_runs_once(1 + k % 7) ? 1 : 0;
    });
  }
  for (int k = 0; k < 20; ++k) fastrnn::set_num_threads(1 + k % 5);
  for (std::thread& caller : callers) caller.join();
  CHECK_EQ(good.load(), 1200);
}

void test_fork() {
  fastrnn::set_num_threads(3);
  CHECK(each_runs_once(20));
  const auto child = [] { return each_runs_once(20) && each_runs_once(500) ? 0 : 1; };
  CHECK_EQ(in_child(child), 0);
  CHECK(each_runs_once(20));

  // While another thread is in the middle of regions; and a child's child.
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) CHECK(each_runs_once(7));
  });
  for (int i = 0; i < 10; ++i) {
    CHECK_EQ(in_child([&] { return child() + 2 * in_child(child); }), 0);
  }
  stop = true;
  busy.join();
}

void test_fork_from_a_check() {
  // A signal handler may fork while workers run: the child cannot finish the region, but must not
  // hang.
  fastrnn::set_num_threads(2);
  pid_t pid = -1;
  const auto check = [](void* ctx) {
    auto* id = static_cast<pid_t*>(ctx);
    if (*id < 0) *id = fork();
    if (*id == 0) alarm(10);
    return false;
  };
  Interrupt poll(check, &pid);
  const std::string message = message_of<std::runtime_error>([&] {
    std::atomic<bool> other_runs{false};
    run(
        2,
        [&](int task) {
          if (task == 1) other_runs = true;
          while (task == 0 && !other_runs) std::this_thread::yield();
          if (task == 1) std::this_thread::sleep_for(std::chrono::milliseconds(200));
        },
        &poll);
  });
  if (pid == 0) _exit(message.find("forked") != std::string::npos && each_runs_once(9) ? 0 : 1);
  CHECK_EQ(message, "(no exception)");
  int status = -1;
  CHECK_EQ(waitpid(pid, &status, 0), pid);
  CHECK_EQ(status, 0);
}

void test_interrupts() {
  struct Checks {
    std::atomic<int> count{0};
    int cancel_at = 0;
    std::thread::id owner = std::this_thread::get_id();
    std::atomic<int> foreign{0};
  };
  const auto check = [](void* ctx) {
    auto* checks = static_cast<Checks*>(ctx);
    if (std::this_thread::get_id() != checks->owner) ++checks->foreign;
    return ++checks->count == checks->cancel_at;
  };
  for (int threads : {1, 3}) {
    fastrnn::set_num_threads(threads);

    // Seen from the tasks, from the wait, and between short tasks; rate-limited in each.
    for (int tasks : {3, 100000}) {
      Checks checks;
      checks.cancel_at = 3;
      Interrupt poll(check, &checks);
      const auto start = Clock::now();
      bool interrupted = false;
      try {
        run(
            tasks,
            [&](int task) {
              const auto begin = Clock::now();
              const double limit = tasks > 3 ? 1e-3 : task == 0 && threads > 1 ? 0 : 10;
              while (seconds_since(begin) < limit && !poll.stop()) {
                poll.poll();
                std::this_thread::sleep_for(std::chrono::microseconds(200));
              }
            },
            &poll);
      } catch (const Interrupted&) {
        interrupted = true;
      }
      CHECK(interrupted);
      CHECK(seconds_since(start) > 0.025);
      CHECK(seconds_since(start) < 2);
      CHECK_EQ(checks.count.load(), 3);
      CHECK_EQ(checks.foreign.load(), 0);
      CHECK(each_runs_once(20));

      // Cancelled before it begins: nothing runs.
      int ran = 0;
      interrupted = false;
      try {
        run(1, [&](int) { ++ran; }, &poll);
      } catch (const Interrupted&) {
        interrupted = true;
      }
      CHECK(interrupted);
      CHECK_EQ(ran, 0);
    }

    Checks checks;
    Interrupt poll(check, &checks);
    run(200, [](int) {}, &poll);
    CHECK(checks.count < 10);
  }
}

// How the thread computes now, by arithmetic: std::fegetround may look at another unit than the one
// in use.
bool rounds_up() {
  volatile float one = 1.0F;
  volatile float little = 1e-10F;
  return one + little > 1.0F;
}
bool flushes_subnormals() {
  volatile float tiny = 1e-39F;
  volatile float large = 1e20F;
  return tiny * large == 0.0F;
}

void test_floating_point_environment() {
#if defined(__SSE2__) || defined(__aarch64__)
  std::fesetround(FE_UPWARD);
  CHECK(rounds_up() && !flushes_subnormals());
  {
    fastrnn::FpEnv outer;
    CHECK(!rounds_up() && flushes_subnormals());
    {
      fastrnn::FpEnv inner;
    }
    CHECK(!rounds_up() && flushes_subnormals());
  }
  CHECK(rounds_up() && !flushes_subnormals());

  // Workers compute like that whatever the thread that started them (here: in the child) did.
  const auto child = [] {
    fastrnn::set_num_threads(4);
    std::atomic<int> wrong{0};
    std::atomic<int> started{0};
    const auto caller = std::this_thread::get_id();
    const auto start = Clock::now();
    run(4, [&](int) {
      ++started;
      while (started < 4 && seconds_since(start) < 5) std::this_thread::yield();
      const bool mine = std::this_thread::get_id() == caller;
      if (rounds_up() != mine || flushes_subnormals() == mine) ++wrong;
    });
    return wrong.load();
  };
  if (kForkAndThreads) CHECK_EQ(in_child(child), 0);
  std::fesetround(FE_TONEAREST);
#endif
}

void test_idle_threads_sleep() {
  fastrnn::set_num_threads(4);
  CHECK(each_runs_once(20));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  CHECK(cpu_seconds() - before < 0.01);
}

void test_exit_with_sleeping_threads() {
  const auto start = Clock::now();
  const int status = in_child([]() -> int {
    CHECK(each_runs_once(100));
    std::exit(check_report());  // static destructors and all
  });
  CHECK_EQ(status, 0);
  CHECK(seconds_since(start) < 2);
}

void test_thread_counts() {
  CHECK(fastrnn::available_threads() >= 1);
  fastrnn::set_num_threads(fastrnn::kMaxThreads);
  CHECK_EQ(fastrnn::get_num_threads(), 1024);
  for (int n : {0, -1, 1025, 1000000000}) {
    CHECK_EQ(message_of<std::invalid_argument>([&] { fastrnn::set_num_threads(n); }),
             "threads: expected an integer from 1 to 1024, got " + std::to_string(n));
  }
  CHECK_EQ(fastrnn::get_num_threads(), 1024);
}

// FASTRNN_NUM_THREADS is read once, before the first set_num_threads: hence in children, and first
// of all.
void test_environment() {
  unsetenv("FASTRNN_NUM_THREADS");
  CHECK_EQ(in_child([] { return fastrnn::get_num_threads(); }), fastrnn::available_threads());
  setenv("FASTRNN_NUM_THREADS", "5", 1);
  CHECK_EQ(in_child([] { return fastrnn::get_num_threads(); }), 5);
  for (const char* bad : {"0", "-2", "1025", "two", "3x", "99999999999999999999"}) {
    setenv("FASTRNN_NUM_THREADS", bad, 1);
    CHECK_EQ(
        message_of<std::invalid_argument>([] { fastrnn::get_num_threads(); }),
        "FASTRNN_NUM_THREADS: expected an integer from 1 to 1024, got '" + std::string(bad) + "'");
  }
  unsetenv("FASTRNN_NUM_THREADS");
}

void test_cgroup_limits() {
  std::string root = "fastrnn_cgroup_XXXXXX";
  CHECK(mkdtemp(&root[0]) != nullptr);
  const auto shell = [](const std::string& command) { CHECK_EQ(std::system(command.c_str()), 0); };
  const auto write = [&](const std::string& path, const std::string& text) {
    std::ofstream(root + "/" + path) << text << "\n";
  };
  const auto limit = [&](const std::string& membership) {
    write("self", membership);
    return fastrnn::detail::cgroup_cpu_limit(root + "/self", root + "/fs");
  };
  shell("mkdir -p " + root + "/fs/a/b " + root + "/fs/cpu,cpuacct/c");
  CHECK_EQ(limit("0::/a/b"), 0);  // no files: no limit
  write("fs/a/b/cpu.max", "max 100000");
  CHECK_EQ(limit("0::/a/b"), 0);
  write("fs/a/cpu.max", "250000 100000");  // an ancestor's, rounded up
  CHECK_EQ(limit("0::/a/b"), 3);
  write("fs/a/b/cpu.max", "10000 100000");
  CHECK_EQ(limit("0::/a/b"), 1);
  write("fs/cpu.max", "200000 100000");  // a container whose own path is not mounted
  CHECK_EQ(limit("0::/not/there"), 2);
  write("fs/cpu,cpuacct/c/cpu.cfs_quota_us", "-1");
  write("fs/cpu,cpuacct/c/cpu.cfs_period_us", "100000");
  CHECK_EQ(limit("3:cpu,cpuacct:/c"), 0);
  write("fs/cpu,cpuacct/c/cpu.cfs_quota_us", "400000");
  CHECK_EQ(limit("4:memory:/c\n3:cpu,cpuacct:/c\n1:name=systemd:/c"), 4);
  CHECK_EQ(limit("nonsense"), 0);
  CHECK_EQ(fastrnn::detail::cgroup_cpu_limit(root + "/missing", root + "/fs"), 0);
  shell("rm -r " + root);
}

}  // namespace

int main() {
  test_environment();
  test_every_task_runs_once();
  test_task_0_is_the_callers();
  test_tasks_run_at_the_same_time();
  test_exceptions();
  test_nesting();
  test_many_callers();
  if (kForkAndThreads) test_fork();
  if (kForkAndThreads) test_fork_from_a_check();
  test_interrupts();
  test_floating_point_environment();
  test_idle_threads_sleep();
  if (kForkAndThreads) test_exit_with_sleeping_threads();
  test_thread_counts();
  test_cgroup_limits();
  return check_report();
}
