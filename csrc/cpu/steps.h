// What the loops over time share, forward (cpu/forward.h) and backward (cpu/backward.h): which rows
// are at work in a step, blocked matrices and shares of them, and the look for Ctrl-C.
//
// The loops work on a share of the rows, of the hidden units or of the output panels and know of
// threads only that members of a team wait for each other; cpu/layer.h and cpu/tape.cc hand out the
// shares.
#ifndef FASTRNN_CPU_STEPS_H_
#define FASTRNN_CPU_STEPS_H_

#include <string.h>

#include "core/args.h"
#include "cpu/gemm.h"
#include "cpu/pack.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Where row j of the processing order is at step k, in the caller's terms.
struct Place {
  int64_t t, b;
};

FASTRNN_INLINE Place place(const Schedule& s, bool reverse, int64_t k, int64_t j) {
  return {reverse ? s.length[j] - 1 - k : k, s.order[j]};
}

// Rows of the block j0 … j1 - 1 at work in step k.
FASTRNN_INLINE int64_t rows_at(const Schedule& s, int64_t k, int64_t j0, int64_t j1) {
  const int64_t n = (s.active[k] < j1 ? s.active[k] : j1) - j0;
  return n > 0 ? n : 0;
}

// The first row of step k of a part in the chunk's slab.
FASTRNN_INLINE int64_t slab_row(const Schedule& s, int64_t k, int64_t part) {
  return s.row_of_step[k * s.parts + part];
}

// What comes i-th of `all` in step k: every other step goes from the last to the first, and so
// begins with the weights that the step before has left in the cache.
FASTRNN_INLINE int64_t in_turn(int64_t k, int64_t i, int64_t all) {
  return k % 2 == 0 ? i : all - 1 - i;
}

// reset[t] marks the boundary between t - 1 and t, which the reverse direction crosses before it
// visits t - 1.
template <class Args>
FASTRNN_INLINE bool starts_afresh(const Args& a, int64_t k, int64_t j) {
  const Place at = place(*a.schedule, a.reverse, k, j);
  const int64_t t = a.reverse ? at.t + 1 : at.t;
  if (a.reverse && k == 0) return false;
  return a.reset.data[a.reset.layout.at(t, at.b)] != 0;
}

// Distance between panels of scratch: a count that is no multiple of 8 keeps panels off each
// other's cache sets.
FASTRNN_INLINE int64_t spread_rows(int64_t rows) { return rows < 8 ? rows : rows + (7 - rows % 8); }

// A blocked matrix: panels `stride` elements apart.
template <class T>
struct Panels {
  T* base;
  int64_t stride;
  FASTRNN_INLINE T* at(int64_t panel, int64_t row) const {
    return base + panel * stride + row * kWidth<T>;
  }
};

// A product's left operand: rows from `row` on of a state matrix (S panels).
template <class T>
FASTRNN_INLINE Left<T> state_rows(const Panels<T>& m, int64_t row, int64_t cols) {
  constexpr int W = kWidth<T>;
  const int64_t n = blocks(cols, W);
  return {m.at(0, row), m.stride, {0, 0, 0, 0}, 1, n, valid_lanes(cols, n - 1, W)};
}

// The same for gradients of the pre-activations: gates `g0` … `g0 + count - 1` of every superblock.
template <class Cell, class T>
FASTRNN_INLINE Left<T> gate_rows(const Panels<T>& gates, int64_t row, int64_t H,
                                 const int (&slot)[Cell::kGates], int g0, int count) {
  constexpr int W = kWidth<T>;
  const int64_t S = blocks(H, W);
  Left<T> left = {gates.at(0, row),        Cell::kSlots * gates.stride, {0, 0, 0, 0}, count, S,
                  valid_lanes(H, S - 1, W)};
  for (int g = 0; g < count; ++g) left.offset[g] = slot[g0 + g] * gates.stride;
  return left;
}

// The superblocks first … end - 1 of a share.
struct Blocks {
  int64_t first, end;
};

FASTRNN_INLINE Blocks blocks_of(const Share& share, int64_t S) {
  return {S * share.rank / share.size, S * (share.rank + 1) / share.size};
}

template <class T>
FASTRNN_INLINE void zero_row(const Panels<T>& m, const Blocks& panels, int64_t row) {
  for (int64_t s = panels.first; s < panels.end; ++s)
    memset(m.at(s, row), 0, sizeof(T) * kWidth<T>);
}

template <class T>
FASTRNN_INLINE void copy_rows(const Panels<T>& from, int64_t row_from, const Panels<T>& to,
                              int64_t row_to, int64_t rows, const Blocks& panels) {
  if (rows <= 0) return;
  for (int64_t s = panels.first; s < panels.end; ++s)
    memcpy(to.at(s, row_to), from.at(s, row_from),
           sizeof(T) * static_cast<size_t>(rows * kWidth<T>));
}

// Asks now and then whether the caller wants to stop: about once per 2^25 multiply-adds.
class Ticker {
 public:
  explicit Ticker(Interrupt* interrupt) : interrupt_(interrupt) {}
  FASTRNN_INLINE bool stop(int64_t multiply_adds) {
    work_ += multiply_adds;
    if (work_ < (int64_t{1} << 25) || interrupt_ == nullptr) return false;
    work_ = 0;
    return interrupt_tick(interrupt_);
  }
  // The end of a step: a team's members meet, and stop together or not at all.
  FASTRNN_INLINE bool stop(int64_t multiply_adds, Team* team) {
    const bool stop_now = stop(multiply_adds);
    return team != nullptr ? team_barrier(team) : stop_now;
  }

 private:
  Interrupt* interrupt_;
  int64_t work_ = 0;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CPU_STEPS_H_
