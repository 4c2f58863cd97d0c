// What the forward pass, the tape and the stream share: running one layer's directions over the
// thread pool, and moving states between the caller's layout and the kernels'.
#ifndef FASTRNN_CPU_LAYER_H_
#define FASTRNN_CPU_LAYER_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/checked.h"
#include "core/memory.h"
#include "core/schedule.h"
#include "core/spin.h"
#include "core/team.h"
#include "core/threads.h"
#include "cpu/plan.h"
#include "cpu/stack.h"
#include "dispatch.h"

namespace fastrnn {

template <class T>
const Kernels<T>& typed_kernels();
template <>
inline const Kernels<float>& typed_kernels<float>() {
  return dispatch().f32;
}
template <>
inline const Kernels<double>& typed_kernels<double>() {
  return dispatch().f64;
}

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Elements of a buffer, refused where the bytes would not fit in 64 bits.
template <class T>
Buffer make_buffer(int64_t rows, int64_t columns) {
  return Buffer(checked_mul(static_cast<size_t>(rows), static_cast<size_t>(columns), sizeof(T)));
}

// f(piece, rank, team) on the members of a team, piece by piece.
template <class F>
void run_as_team(const Division& division, int64_t pieces, Interrupt* interrupt, const F& f) {
  run_team(
      division.team, pieces,
      [](void* ctx, int64_t piece, int rank, Team& team) {
        (*static_cast<const F*>(ctx))(piece, rank, team);
      },
      const_cast<void*>(static_cast<const void*>(&f)), division.patience_us, interrupt);
}

// f(task) for tasks 0 … n - 1 on the pool.
template <class F>
void run_parallel(int n, Interrupt* interrupt, const F& f) {
  if (n <= 0) return;
  parallel(
      n, [](void* ctx, int task) { (*static_cast<const F*>(ctx))(task); },
      const_cast<void*>(static_cast<const void*>(&f)), interrupt);
}

// Range `part` of n things cut into `parts`.
inline int64_t cut(int64_t n, int parts, int part) { return n * part / parts; }

// Row-steps of a call, and the layout of an array that holds `cols` features of each: (T, B, cols),
// or the rows one after the other.
inline int64_t positions(int64_t T, int64_t B, const int64_t* lengths, const int64_t* starts) {
  if (starts == nullptr) return T * B;
  int64_t n = 0;
  for (int64_t b = 0; b < B; ++b) n += lengths[b];
  return n;
}

inline Layout dense_layout(int64_t cols, int64_t B, const int64_t* starts) {
  return starts != nullptr ? Layout{cols, 0, starts} : Layout{B * cols, cols, nullptr};
}

// Calls f(t, b) for every step of every row that has one.
template <class F>
void for_positions(int64_t T, int64_t B, const int64_t* lengths, const F& f) {
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = 0; t < (lengths != nullptr ? lengths[b] : T); ++t) f(t, b);
}

// y is 0 past a row's length; a ragged array has nothing there.
template <class T>
void zero_padding(T* y, const Layout& layout, int64_t T_, int64_t B, const int64_t* lengths,
                  int64_t cols) {
  if (lengths == nullptr || layout.starts != nullptr) return;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = lengths[b]; t < T_; ++t)
      std::memset(y + layout.at(t, b), 0, sizeof(T) * static_cast<size_t>(cols));
}

// (L*D, B, H) state `index` → blocked [S][rows][W] in processing order; zeros where src is null or
// past H.
template <class T>
void load_state(const T* src, int64_t index, const int32_t* order, int64_t B, int64_t H, int W,
                T* dst) {
  const int64_t S = ceil_div(H, W);
  std::memset(dst, 0, sizeof(T) * static_cast<size_t>(S * B * W));
  if (src == nullptr) return;
  for (int64_t j = 0; j < B; ++j) {
    const T* const row = src + (index * B + order[j]) * H;
    for (int64_t s = 0; s < S; ++s)
      std::memcpy(dst + (s * B + j) * W, row + s * W,
                  sizeof(T) * static_cast<size_t>(std::min<int64_t>(W, H - s * W)));
  }
}

template <class T>
void store_state(const T* src, int64_t index, const int32_t* order, int64_t B, int64_t H, int W,
                 T* dst) {
  const int64_t S = ceil_div(H, W);
  for (int64_t j = 0; j < B; ++j) {
    T* const row = dst + (index * B + order[j]) * H;
    for (int64_t s = 0; s < S; ++s)
      std::memcpy(row + s * W, src + (s * B + j) * W,
                  sizeof(T) * static_cast<size_t>(std::min<int64_t>(W, H - s * W)));
  }
}

// Multiply-adds of one layer's forward pass in one direction; one-hot input is worth one feature.
inline double layer_work(const Schedule& s, CellKind kind, int64_t inputs, int64_t H) {
  double rows = 0;
  for (int64_t j = 0; j < s.batch; ++j) rows += static_cast<double>(s.length[j]);
  return rows * cell_traits(kind).gates * static_cast<double>(H) *
         (static_cast<double>(inputs) + static_cast<double>(H));
}

// Whether weights, or what a member of a team has of them, come from beyond its cache.
template <class T>
bool fetches_ahead(CellKind kind, int64_t inputs, int64_t H, int members) {
  const int64_t bytes = cell_traits(kind).gates * H * inputs * static_cast<int64_t>(sizeof(T));
  return beyond_cache(bytes / members, static_cast<int64_t>(second_level_cache_bytes()));
}

// plan_division for one layer and all its directions.
template <class T>
Division divide(const Kernels<T>& kernels, CellKind kind, const Schedule& s, int64_t H,
                int directions, double multiply_adds, int threads) {
  const int64_t bytes = cell_traits(kind).gates * H * H * static_cast<int64_t>(sizeof(T));
  // A team waits for its members: no more than there can be.
  const int useful = threads > 1 ? std::min(threads, get_num_threads()) : 1;
  return plan_division(useful, {directions, s.steps, s.batch, bytes, ceil_div(H, kernels.width),
                                multiply_adds, static_cast<int64_t>(second_level_cache_bytes())});
}

// Of all segments: what run() is called with at least.
inline int64_t fewest_chunks(const ScheduleBuilder& schedule) {
  const std::vector<int64_t>& segments = schedule.segments();
  int64_t fewest = schedule.get().chunks;
  for (size_t i = 0; i + 2 < segments.size(); ++i)  // the last may be a short rest
    fewest = std::min(fewest, segments[i + 1] - segments[i]);
  return fewest;
}

// In how many parts of the batch training on so many threads goes through the steps: as many as
// the layer with the most work is worth.
template <class T>
int training_parts(const Kernels<T>& kernels, const StackSpec& spec,
                   const ScheduleBuilder& schedule, bool one_hot, int threads) {
  const Schedule& s = schedule.get();
  int64_t inputs = one_hot ? 1 : spec.input_size(0);
  if (spec.layers > 1) inputs = std::max(inputs, spec.input_size(1));
  const double work = spec.directions * layer_work(s, spec.kind, inputs, spec.H);
  const Division division = divide(kernels, spec.kind, s, spec.H, spec.directions, work, threads);
  return plan_turns(division.row_parts, s.batch, fewest_chunks(schedule));
}

// The threads' shares of one layer: all directions × row parts, or the members of a team, with the
// scratch they need.
template <class T>
class LayerForward {
 public:
  LayerForward(const Kernels<T>& kernels, CellKind kind,
               const std::vector<ForwardArgs<T>>& directions, const ScheduleBuilder& schedule,
               int threads)
      : kernels_(kernels), kind_(static_cast<int>(kind)), directions_(directions) {
    const int D = static_cast<int>(directions.size());
    const ForwardArgs<T>& first = directions[0];
    const double work =
        D * layer_work(schedule.get(), kind, first.input.ids != nullptr ? 1 : first.I, first.H);
    const Division division = divide(kernels, kind, schedule.get(), first.H, D, work, threads);
    if (first.gates != nullptr) {  // the slabs are laid out for so many
      parts_ = static_cast<int>(schedule.get().parts);
      if (parts_ == 1) team_ = division;
    } else {
      parts_ = plan_turns(division.row_parts, schedule.get().batch, fewest_chunks(schedule));
      team_ = division;
    }
    workers_ = std::min(tasks(), plan_threads(threads, work));
    rows_ = schedule.split_rows(parts_);
    for (ForwardArgs<T>& a : directions_)
      a.fetch_w_hh = fetches_ahead<T>(kind, a.H, a.H, team_.team);
    int64_t scratch = 0;
    for (const ForwardArgs<T>& a : directions_)
      for (size_t part = 0; part < static_cast<size_t>(parts_); ++part)
        scratch =
            std::max(scratch, kernels_.forward_scratch[kind_](a, rows_[part], rows_[part + 1]));
    scratch_size_ = ceil_div(scratch, 64) * 64;
    scratch_ = make_buffer<T>(workers_, scratch_size_);
  }

  std::vector<ForwardArgs<T>>& directions() { return directions_; }

  // Chunks on the calling thread alone, for callers that keep their own threads.
  void run_here(int64_t chunk0, int64_t chunk1) {
    for (int task = 0; task < tasks(); ++task) run_task(task, chunk0, chunk1, 0);
  }

  void run(int64_t chunk0, int64_t chunk1, Interrupt* interrupt) {
    if (team_.team > 1) {
      // A thread that comes late takes part from the next chunk on.
      run_as_team(team_, chunk1 - chunk0, interrupt, [&](int64_t piece, int rank, Team& team) {
        const Share share = {rows_[0], rows_[1],    0,
                             rank,     team.size(), team.size() > 1 ? &team : nullptr};
        const int64_t chunk = chunk0 + piece;
        kernels_.forward[kind_](directions_[0], chunk, chunk + 1, share,
                                scratch_.template data<T>());
      });
    } else if (workers_ == 1) {
      if (interrupt != nullptr) interrupt->poll();  // a short run ends before its kernels ask
      run_here(chunk0, chunk1);
      if (interrupt != nullptr && interrupt->stop()) throw Interrupted();
    } else if (workers_ == tasks()) {
      if (interrupt != nullptr) interrupt->poll();
      run_parallel(workers_, interrupt, [&](int task) { run_task(task, chunk0, chunk1, task); });
    } else {
      run_in_turns(chunk0, chunk1, interrupt);
    }
  }

 private:
  int tasks() const { return parts_ * static_cast<int>(directions_.size()); }

  // More tasks than threads: a thread does the next chunk of whichever task is least advanced and
  // in nobody's hands. So a thread that is slower than the others (another program's work on its
  // core, a smaller core) does less.
  void run_in_turns(int64_t chunk0, int64_t chunk1, Interrupt* interrupt) {
    struct Progress {
      std::atomic<int64_t> next;
      std::atomic<bool> taken{false};
    };
    std::vector<Progress> progress(static_cast<size_t>(tasks()));
    for (Progress& p : progress) p.next = chunk0;
    const unsigned forks = fork_count();
    run_parallel(workers_, interrupt, [&](int worker) {
      for (Spin spin(pauses_among(workers_));;) {
        int64_t least = chunk1, unfinished = 0;
        size_t chosen = 0;
        for (size_t i = 0; i < progress.size(); ++i) {
          const int64_t next = progress[i].next.load(std::memory_order_acquire);
          unfinished += next < chunk1;
          if (next < least && !progress[i].taken.load(std::memory_order_relaxed)) {
            least = next;
            chosen = i;
          }
        }
        if (unfinished == 0) return;
        if (interrupt != nullptr && interrupt_tick(interrupt)) return;
        if (fork_count() != forks) return;
        if (least == chunk1) {  // all in hand: one may come back unfinished
          spin.wait();
          continue;
        }
        spin.reset();
        Progress& task = progress[chosen];
        if (task.taken.exchange(true, std::memory_order_acquire)) continue;
        const int64_t next = task.next.load(std::memory_order_relaxed);
        if (next < chunk1) {
          run_task(static_cast<int>(chosen), next, next + 1, worker);
          task.next.store(next + 1, std::memory_order_release);
        }
        task.taken.store(false, std::memory_order_release);
      }
    });
  }

  void run_task(int task, int64_t chunk0, int64_t chunk1, int worker) {
    const size_t part = static_cast<size_t>(task % parts_);
    kernels_.forward[kind_](directions_[static_cast<size_t>(task / parts_)], chunk0, chunk1,
                            {rows_[part], rows_[part + 1], static_cast<int64_t>(part)},
                            scratch_.template data<T>() + worker * scratch_size_);
  }

  const Kernels<T>& kernels_;
  int kind_;
  std::vector<ForwardArgs<T>> directions_;
  int parts_, workers_;
  Division team_ = {1, 1};
  std::vector<int64_t> rows_;
  int64_t scratch_size_;
  Buffer scratch_;
};

// Threshold and scale of inverted dropout with probability p: an element whose 53-bit fraction u
// satisfies u >= p stays.
inline DropoutMask dropout_mask(double p, uint64_t layer_key) {
  if (p <= 0) return {0, 0, 1.0};
  return {layer_key, static_cast<uint64_t>(std::ceil(p * 9007199254740992.0)), 1.0 / (1.0 - p)};
}

}  // namespace fastrnn

#endif  // FASTRNN_CPU_LAYER_H_
