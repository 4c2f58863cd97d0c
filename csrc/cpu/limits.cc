// Times the kernels of cpu/limits.h on the thread pool.
#include <atomic>
#include <chrono>

#include "core/fpenv.h"
#include "cpu/layer.h"

namespace fastrnn {
namespace {

using Clock = std::chrono::steady_clock;

// Work per second of work(task), which does some microseconds of it and returns how much that was.
// Every task goes on for `seconds` by its own clock, and the whole counts from the first begin to
// the last end: so tasks that had to run one after the other count as one thread. They wait for
// each other first, since a sleeping thread may take milliseconds to come.
template <class Work>
double rate(int tasks, double seconds, const Work& work) {
  struct Window {
    double done;
    Clock::time_point begin, end;
  };
  std::vector<Window> windows(static_cast<size_t>(tasks));
  std::atomic<int> there{0};
  run_parallel(tasks, nullptr, [&](int task) {
    work(task);  // a first time for the caches
    ++there;
    const Clock::time_point latest = Clock::now() + std::chrono::milliseconds(20);
    while (there < tasks && Clock::now() < latest) continue;
    Window w = {0, Clock::now(), {}};
    do {
      w.done += work(task);
      w.end = Clock::now();
    } while (std::chrono::duration<double>(w.end - w.begin).count() < seconds);
    windows[static_cast<size_t>(task)] = w;
  });
  Window all = windows[0];
  for (size_t i = 1; i < windows.size(); ++i) {
    all.done += windows[i].done;
    all.begin = std::min(all.begin, windows[i].begin);
    all.end = std::max(all.end, windows[i].end);
  }
  return all.done / std::chrono::duration<double>(all.end - all.begin).count();
}

}  // namespace

template <class T>
Limits measure_limits(int threads, int64_t bytes, double seconds) {
  const FpEnv env;
  const Kernels<T>& k = typed_kernels<T>();
  // Lines of their own: the threads write.
  const int64_t scratch = ceil_div(k.tile_peak_scratch(), 1024) * 1024;
  Buffer tiles = make_buffer<T>(threads, scratch);
  std::memset(tiles.data(), 0, tiles.size());
  T* const operands = tiles.template data<T>();
  Limits limits = {};
  limits.gflops = rate(threads, seconds, [&k](int) { return k.fma_peak(10000); }) / 1e9;
  limits.tile_gflops =
      rate(threads, seconds, [&](int task) { return k.tile_peak(operands + task * scratch, 20); }) /
      1e9;
  if (bytes == 0) return limits;

  // A share is a multiple of what read_memory takes at once, whatever the ISA, and of a cache line.
  const int64_t share = ceil_div(ceil_div(bytes, threads), 512) * 512;
  const int64_t n = share / static_cast<int64_t>(sizeof(T));
  Buffer memory = make_buffer<T>(threads, n);
  T* const p = memory.template data<T>();
  // Written by the thread that (likely) reads it, and so placed near it; zeros, so that sums stay
  // harmless.
  run_parallel(threads, nullptr,
               [&](int task) { std::memset(p + task * n, 0, static_cast<size_t>(share)); });
  const int64_t repeats = ceil_div(1 << 20, share);
  const auto read = [&](int task) {
    // The sum, which is 0, is in what is counted, so that it has to be computed.
    return k.read_memory(p + task * n, n, repeats) + static_cast<double>(share * repeats);
  };
  limits.gbytes_per_s = rate(threads, seconds, read) / 1e9;
  return limits;
}

template Limits measure_limits<float>(int, int64_t, double);
template Limits measure_limits<double>(int, int64_t, double);

}  // namespace fastrnn
