// One layer and direction over time: the forward loop and its reverse. Everything here works on a
// share of the rows, of the hidden units or of the output panels and knows of threads only that
// members of a team wait for each other; cpu/layer.h and cpu/tape.cc hand out the shares.
//
// Forward, a chunk of steps at a time: gather the chunk's input rows, multiply them all with W_ih
// into the slab `gates`, then step by step add h W_hhᵀ in place and let the cell turn
// pre-activations into what it keeps. In training the slab lives on the tape, so nothing is copied;
// in inference it is scratch and stays in cache.
//
// Backward, from the last chunk to the first: the cell turns the slab into gradients of the
// pre-activations, again in place, and dG W_hh carries them to the step before. What does not
// depend on the recurrence (gradients of weights, biases and inputs) is a large product per chunk,
// done while the slab is in cache.
#ifndef FASTRNN_CPU_SEQUENCE_H_
#define FASTRNN_CPU_SEQUENCE_H_

#include <string.h>

#include "cells/dropout.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
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

// reset[t] marks the boundary between t - 1 and t, which the reverse direction crosses before it
// visits t - 1.
template <class Args>
FASTRNN_INLINE bool starts_afresh(const Args& a, int64_t k, int64_t j) {
  const Place at = place(*a.schedule, a.reverse, k, j);
  const int64_t t = a.reverse ? at.t + 1 : at.t;
  if (a.reverse && k == 0) return false;
  return a.reset.data[a.reset.layout.at(t, at.b)] != 0;
}

// Rows of a panel that a tile takes when `left` rows are to be split as evenly as possible.
FASTRNN_INLINE int tile_rows(int64_t left) {
  const int64_t tiles = (left + kTileRows - 1) / kTileRows;
  return static_cast<int>((left + tiles - 1) / tiles);
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

// ----------------------------------------------------------------------------------------------------
// forward

template <class Cell, class T>
class Forward {
  using V = Vec<T>;
  static constexpr int W = kWidth<T>;
  static constexpr int G = Cell::kGates;

 public:
  Forward(const ForwardArgs<T>& args, const Share& share)
      : a_(args),
        s_(*args.schedule),
        S_(blocks(args.H, W)),
        X_(blocks(args.I, W)),
        j0_(share.j0),
        j1_(share.j1),
        share_(share),
        mine_(blocks_of(share, S_)) {}

  // Scratch in elements: the second half of the double buffer for h, r∘h, and in inference the
  // slabs.
  int64_t scratch() const {
    int64_t n = (Cell::kTwoPhase ? 2 : 1) * S_ * spread_rows(j1_ - j0_);
    if (a_.gates == nullptr) n += (S_ * Cell::kSlots + X_) * spread_rows(most_rows());
    return n * W;
  }

  void run(int64_t chunk0, int64_t chunk1, T* scratch) {
    const int64_t nb = spread_rows(j1_ - j0_);
    const Panels<T> home = {a_.h + j0_ * W, a_.state_rows * W};
    Panels<T> cur = home, next = {scratch, nb * W};  // swapped after every step
    scratch += S_ * nb * W;
    rh_ = {scratch, nb * W};
    if (Cell::kTwoPhase) scratch += S_ * nb * W;
    c_ = {Cell::kHasCell ? a_.c + j0_ * W : nullptr, a_.state_rows * W};
    const int64_t scratch_rows = a_.gates == nullptr ? spread_rows(most_rows()) : 0;
    Ticker ticker(a_.interrupt);
    int64_t k = s_.chunk_begin[chunk0];
    for (int64_t chunk = chunk0; chunk < chunk1; ++chunk) {
      const int64_t end = s_.chunk_begin[chunk + 1];
      if (a_.gates != nullptr) {
        const int64_t before = (s_.rows_before[chunk] - s_.rows_before[a_.first_chunk]) * W;
        const int64_t stride = s_.rows[chunk] * W;
        gates_ = {a_.gates + before * S_ * Cell::kSlots, stride};
        if (a_.x_rows != nullptr) x_ = {a_.x_rows + before * X_, stride};
      } else {
        gates_ = {scratch, scratch_rows * W};
        x_ = {scratch + S_ * Cell::kSlots * scratch_rows * W, scratch_rows * W};
      }
      if (rows_at(s_, k, j0_, j1_) == 0) break;
      if (a_.gates != nullptr) save_state(chunk, k, cur);
      gather_inputs(k, end);
      if (share_.team != nullptr && team_barrier(share_.team)) return;
      project_inputs(k, end);
      for (int64_t row = 0; k < end; ++k) {
        const int64_t n = rows_at(s_, k, j0_, j1_);
        if (n == 0) break;
        if (a_.gates != nullptr) row = s_.row_of_step[k] + j0_;
        if (a_.reset.data != nullptr) {
          apply_resets(k, n, cur);
          if (share_.team != nullptr && team_barrier(share_.team)) return;
        }
        if (a_.gates != nullptr) {
          step<true>(k, row, n, cur, next);
        } else {
          step<false>(k, row, n, cur, next);
        }
        if (ticker.stop(n * G * a_.H * (a_.H + a_.I), share_.team)) return;
        const int64_t go_on =
            rows_at(s_, k + 1, j0_, j1_);  // rows that end here leave their state in a_.h
        if (next.base != home.base) copy_rows(next, go_on, home, go_on, n - go_on, mine_);
        const Panels<T> swap = cur;
        cur = next;
        next = swap;
        row += n;
      }
    }
    if (cur.base != home.base) copy_rows(cur, 0, home, 0, rows_at(s_, k, j0_, j1_), mine_);
  }

 private:
  // The most rows that this block can have in a chunk.
  int64_t most_rows() const { return s_.max_steps * (j1_ - j0_); }

  // Calls f(first row in the slab, rows) for runs of neighbouring rows of the steps k … end - 1.
  template <class F>
  FASTRNN_INLINE void for_runs(int64_t k, int64_t end, const F& f) const {
    if (a_.gates == nullptr || (j0_ == 0 && j1_ >= s_.batch)) {
      int64_t n = 0;
      for (; k < end; ++k) n += rows_at(s_, k, j0_, j1_);
      f(0, n);
    } else {
      for (; k < end; ++k) f(s_.row_of_step[k] + j0_, rows_at(s_, k, j0_, j1_));
    }
  }

  // A team's members gather a part of the steps each.
  void gather_inputs(int64_t k, int64_t chunk_end) const {
    if (a_.input.ids != nullptr) return;
    const LayerInput<T>& in = a_.input;
    const int64_t steps = chunk_end - k;
    const int64_t first = k + steps * share_.rank / share_.size,
                  end = k + steps * (share_.rank + 1) / share_.size;
    for (int64_t row = 0; k < end; ++k) {
      const int64_t n = rows_at(s_, k, j0_, j1_);
      if (a_.gates != nullptr) row = s_.row_of_step[k] + j0_;
      if (k < first) {
        row += n;
        continue;
      }
      for (int64_t j = 0; j < n; ++j, ++row) {
        const Place at = place(s_, a_.reverse, k, j0_ + j);
        put_row(in.x + in.layout.at(at.t, at.b), a_.I, x_.stride, x_.at(0, row));
        if (in.dropout.threshold != 0)
          drop(in.dropout, static_cast<uint64_t>((at.t * s_.batch + at.b) * a_.I), row);
      }
    }
  }

  void drop(const DropoutMask& mask, uint64_t element, int64_t row) const {
    for (int64_t i = 0; i < a_.I; ++i) {
      T* const x = x_.at(i / W, row) + i % W;
      *x = dropout_keeps(mask.key, element + static_cast<uint64_t>(i), mask.threshold)
               ? *x * static_cast<T>(mask.scale)
               : T(0);
    }
  }

  // gates = bias + x W_ihᵀ for all rows of the chunk; a one-hot row picks a row of the packed
  // panel.
  void project_inputs(int64_t k0, int64_t end) const {
    const Right<T> w = {a_.weights.w_ih, W * W, a_.I * W};
    for (int64_t s = mine_.first; s < mine_.end; ++s) {
      for (int slot = 0; slot < Cell::kSlots; ++slot) {
        const T* const bias = a_.weights.bias + (s * Cell::kSlots + slot) * W;
        const V b0 = V::load(bias), b1 = V::load(bias + V::N);
        for_runs(k0, end, [&](int64_t row, int64_t n) FASTRNN_INLINE_LAMBDA {
          T* out = gates_.at(s * Cell::kSlots + slot, row);
          for (int64_t r = 0; r < n; ++r, out += W) {
            b0.store(out);
            b1.store(out + V::N);
          }
        });
      }
    }
    if (a_.input.ids != nullptr) return pick_inputs(k0, end);
    multiply_inputs(k0, end, w);
  }

  void multiply_inputs(int64_t k0, int64_t end, const Right<T>& w) const {
    // Few rows: several panels at once, so that their chains hide each other's latency. Else a
    // panel at a time, which then stays in the first-level cache for all rows.
    int64_t most_rows = 1;
    for_runs(k0, end, [&](int64_t, int64_t n) { most_rows = n > most_rows ? n : most_rows; });
    const int most =
        panels_at_once(most_rows < kTileRows ? static_cast<int>(most_rows) : kTileRows);
    const int64_t end_panel = mine_.end * G;
    for (int64_t p = mine_.first * G; p < end_panel; p += most) {
      const int together = static_cast<int>(end_panel - p < most ? end_panel - p : most);
      const Right<T> right = {w.base + p * w.panel_stride, w.group_stride, w.panel_stride};
      for_runs(k0, end, [&](int64_t row, int64_t n) FASTRNN_INLINE_LAMBDA {
        T* out[4];
        for (int i = 0; i < together; ++i) out[i] = gates_.at(slot_panel(p + i), row);
        for (int64_t r = 0; r < n;) {
          const int m = tile_rows(n - r);
          multiply<T>(m, together, state_rows(x_, row + r, a_.I), right, out);
          r += m;
          for (int i = 0; i < together; ++i) out[i] += m * W;
        }
      });
    }
  }

  // The slab's panel that gate panel p = s*G + g of the input product goes to.
  FASTRNN_INLINE int64_t slot_panel(int64_t p) const {
    return p / G * Cell::kSlots + Cell::kInputSlot[p % G];
  }

  void pick_inputs(int64_t k0, int64_t end) const {
    for (int64_t p = mine_.first * G; p < mine_.end * G; ++p) {
      const T* const w = a_.weights.w_ih + p * a_.I * W;
      int64_t row = 0;
      for (int64_t k = k0; k < end; ++k) {
        const int64_t n = rows_at(s_, k, j0_, j1_);
        if (a_.gates != nullptr) row = s_.row_of_step[k] + j0_;
        for (int64_t j = 0; j < n; ++j, ++row) {
          const Place at = place(s_, a_.reverse, k, j0_ + j);
          const int64_t id = a_.input.ids[a_.input.layout.at(at.t, at.b)];
          T* const out = gates_.at(slot_panel(p), row);
          (V::load(out) + V::load(w + id * W)).store(out);
          (V::load(out + V::N) + V::load(w + id * W + V::N)).store(out + V::N);
        }
      }
    }
  }

  // The tape keeps the state before each chunk; the states inside it follow from the slots.
  void save_state(int64_t chunk, int64_t k, const Panels<T>& cur) const {
    const int64_t n = rows_at(s_, k, j0_, j1_), stride = a_.state_rows * W;
    const int64_t start = (chunk - a_.first_chunk) * S_ * stride + j0_ * W;
    copy_rows(cur, 0, Panels<T>{a_.chunk_h + start, stride}, 0, n, mine_);
    if (Cell::kHasCell) copy_rows(c_, 0, Panels<T>{a_.chunk_c + start, stride}, 0, n, mine_);
  }

  void apply_resets(int64_t k, int64_t n, const Panels<T>& h) const {
    for (int64_t j = 0; j < n; ++j) {
      if (!starts_afresh(a_, k, j0_ + j)) continue;
      zero_row(h, mine_, j);
      if (Cell::kHasCell) zero_row(c_, mine_, j);
    }
  }

  // Step k of n rows: the slab's rows from `row` on, state cur → next.
  template <bool kSave>
  FASTRNN_INLINE void step(int64_t k, int64_t row, int64_t n, const Panels<T>& cur,
                           const Panels<T>& next) const {
    if constexpr (Cell::kTwoPhase) {
      for_tiles<2>(row, n, 0, cur, [&](int64_t s, int64_t r, int m) FASTRNN_INLINE_LAMBDA {
        gate_phase(s, row + r, r, m, cur);
      });
      if (share_.team != nullptr)
        team_barrier(share_.team);  // a stop is noticed at the end of the step
      for_tiles<1>(row, n, 2, rh_, [&](int64_t s, int64_t r, int m) FASTRNN_INLINE_LAMBDA {
        cell_phase<kSave>(k, s, row + r, r, m, cur, next);
      });
    } else {
      for_tiles<G>(row, n, 0, cur, [&](int64_t s, int64_t r, int m) FASTRNN_INLINE_LAMBDA {
        cell_phase<kSave>(k, s, row + r, r, m, cur, next);
      });
    }
  }

  // For every superblock s and tile of rows: add left · W_hhᵀ to COUNT gates from g0 on, then f(s,
  // first row, rows). An odd COUNT takes several superblocks together where the tile has room for
  // more panels.
  template <int COUNT, class F>
  FASTRNN_INLINE void for_tiles(int64_t row, int64_t n, int g0, const Panels<T>& left,
                                const F& f) const {
    static_assert(COUNT == G || COUNT == 1 || COUNT % 2 == 0, "evenly spaced panels of weights");
    constexpr int kMost = COUNT % 2 == 1 ? 4 : 1;  // superblocks together
    const int room = panels_at_once(tile_rows(n));
    const int group = room < kMost ? room : kMost;
    const int64_t panel = a_.H * W, stride = COUNT == 1 ? G * panel : panel;
    for (int64_t s = mine_.first; s < mine_.end; s += group) {
      const int together = static_cast<int>(mine_.end - s < group ? mine_.end - s : group);
      const int count = COUNT * together;
      for (int64_t r = 0; r < n;) {
        const int m = tile_rows(n - r);
        const int most = panels_at_once(m);
        T* out[COUNT * kMost];
        for (int i = 0; i < count; ++i)
          out[i] =
              gates_.at((s + i / COUNT) * Cell::kSlots + Cell::kStateSlot[g0 + i % COUNT], row + r);
        const Left<T> a = state_rows(left, r, a_.H);
        for (int i = 0; i < count; i += most) {
          const Right<T> w = {a_.weights.w_hh + (s * G + g0) * panel + i * stride, W * W, stride};
          multiply<T>(m, count - i < most ? count - i : most, a, w, out + i);
        }
        for (int i = 0; i < together; ++i) f(s + i, r, m);
        r += m;
      }
    }
  }

  FASTRNN_INLINE void gate_phase(int64_t s, int64_t row, int64_t r0, int m,
                                 const Panels<T>& cur) const {
    for (int r = 0; r < m; ++r)
      for (int v = 0; v < W; v += V::N) {
        T* const r_gate = gates_.at(s * Cell::kSlots, row + r) + v;
        T* const z_gate = gates_.at(s * Cell::kSlots + 1, row + r) + v;
        V rg = V::load(r_gate), zg = V::load(z_gate), rh;
        Cell::forward_gates(rg, zg, V::load(cur.at(s, r0 + r) + v), rh);
        rg.store(r_gate);
        zg.store(z_gate);
        rh.store(rh_.at(s, r0 + r) + v);
      }
  }

  // The cell on m rows of superblock s, `row` in the slab and r0 in the block.
  template <bool kSave>
  FASTRNN_INLINE void cell_phase(int64_t k, int64_t s, int64_t row, int64_t r0, int m,
                                 const Panels<T>& cur, const Panels<T>& next) const {
    const int lanes = valid_lanes(a_.H, s, W);
    for (int r = 0; r < m; ++r) {
      T* y = nullptr;
      if (a_.y != nullptr) {
        const Place at = place(s_, a_.reverse, k, j0_ + r0 + r);
        y = a_.y + a_.y_layout.at(at.t, at.b) + s * W;
      }
      for (int v = 0; v < W; v += V::N) {
        V slot[Cell::kSlots];
#pragma GCC unroll 4
        for (int i = 0; i < Cell::kSlots; ++i)
          slot[i] = V::load(gates_.at(s * Cell::kSlots + i, row + r) + v);
        V c = Cell::kHasCell ? V::load(c_.at(s, r0 + r) + v) : V::zero();
        V h;
        Cell::forward(slot, V::load(cur.at(s, r0 + r) + v), c, h);
        if (Cell::kHasCell) c.store(c_.at(s, r0 + r) + v);
        h.store(next.at(s, r0 + r) + v);
        if (y != nullptr) {
          if (lanes - v >= V::N) {
            h.store(y + v);
          } else if (lanes > v) {
            h.store_n(y + v, lanes - v);
          }
        }
        if (kSave) {
#pragma GCC unroll 4
          for (int i = 0; i < Cell::kSlots; ++i)
            slot[i].store(gates_.at(s * Cell::kSlots + i, row + r) + v);
        }
      }
    }
  }

  const ForwardArgs<T>& a_;
  const Schedule& s_;
  const int64_t S_, X_;  // panels of hidden units and of input features
  const int64_t j0_, j1_;
  const Share share_;
  const Blocks mine_;
  Panels<T> gates_ = {}, x_ = {}, c_ = {}, rh_ = {};
};

template <class Cell, class T>
int64_t forward_scratch(const ForwardArgs<T>& a, int64_t j0, int64_t j1) {
  return Forward<Cell, T>(a, {j0, j1}).scratch();
}

template <class Cell, class T>
void forward(const ForwardArgs<T>& a, int64_t chunk0, int64_t chunk1, const Share& share,
             T* scratch) {
  Forward<Cell, T>(a, share).run(chunk0, chunk1, scratch);
}

// ---------------------------------------------------------------------------------------------------
// backward

template <class Cell, class T>
class Backward {
  using V = Vec<T>;
  static constexpr int W = kWidth<T>;
  static constexpr int G = Cell::kGates;

 public:
  Backward(const BackwardArgs<T>& args, int64_t chunk)
      : a_(args),
        s_(*args.schedule),
        S_(blocks(args.H, W)),
        X_(blocks(args.I, W)),
        begin_(s_.chunk_begin[chunk]),
        end_(s_.chunk_begin[chunk + 1]) {
    const int64_t before = (s_.rows_before[chunk] - s_.rows_before[a_.first_chunk]) * W;
    const int64_t stride = s_.rows[chunk] * W;
    gates_ = {a_.gates + before * S_ * Cell::kSlots, stride};
    h_prev_ = {a_.h_prev, stride};
    c_prev_ = {a_.c_prev, stride};
    const int64_t start = (chunk - a_.first_chunk) * S_ * a_.state_rows * W;
    chunk_h_ = a_.chunk_h + start;
    if (Cell::kHasCell) chunk_c_ = a_.chunk_c + start;
    x_ = {a_.x_rows == nullptr ? nullptr : a_.x_rows + before * X_, stride};
    rh_ = {a_.rh, stride};
  }

  // The recurrence over a share. Scratch, for a two-phase cell: [S][j1 - j0][W].
  void run(const Share& share, T* scratch) {
    const int64_t j0 = share.j0, j1 = share.j1;
    const Blocks mine = blocks_of(share, S_);
    const Panels<T> dh = {a_.dh + j0 * W, a_.state_rows * W};
    const Panels<T> dc = {Cell::kHasCell ? a_.dc + j0 * W : nullptr, a_.state_rows * W};
    const Panels<T> drh = {scratch, (j1 - j0) * W};
    replay(share, mine);
    Ticker ticker(a_.interrupt);
    for (int64_t k = end_ - 1; k >= begin_; --k) {
      const int64_t n = rows_at(s_, k, j0, j1);
      if (n == 0) continue;
      const int64_t row = s_.row_of_step[k] + j0;
      for (int64_t s = mine.first; s < mine.end; ++s) cell_phase(k, s, row, j0, n, dh, dc);
      // Here a team meets: the products need the gradients of all units. Its members' parts of dh
      // stay apart.
      if (ticker.stop(n * G * a_.H * a_.H, share.team)) return;
      if constexpr (Cell::kTwoPhase) {
        for (int64_t s = mine.first; s < mine.end; ++s)
          memset(drh.at(s, 0), 0, sizeof(T) * static_cast<size_t>(n * W));
        multiply_back(mine, row, n, 2, 1, drh);
        for (int64_t s = mine.first; s < mine.end; ++s) reset_phase(s, row, n, drh, dh);
        if (share.team != nullptr) team_barrier(share.team);  // a stop is noticed at the next step
        multiply_back(mine, row, n, 0, 2, dh);
      } else {
        multiply_back(mine, row, n, 0, G, dh);
      }
      if (a_.reset.data != nullptr) {
        for (int64_t j = 0; j < n; ++j) {
          if (!starts_afresh(a_, k, j0 + j)) continue;
          zero_row(dh, mine, j);
          if (Cell::kHasCell) zero_row(dc, mine, j);
        }
      }
    }
  }

  // Gate panels p0 … p1 - 1 of dW_ih, dW_hh and the biases.
  void weight_gradients(int64_t p0, int64_t p1) {
    // Rows at once: a panel of them takes 16 KB, and three stay near the first-level cache.
    constexpr int64_t kBlock = 16384 / (W * static_cast<int>(sizeof(T)));
    const int64_t rows = rows_in_chunk(), P = S_ * G;
    Ticker ticker(a_.interrupt);
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t s = p / G, g = p % G;
      const int lanes = valid_lanes(a_.H, s, W);
      const int64_t in_slot = s * Cell::kSlots + Cell::kInputSlot[g],
                    state_slot = s * Cell::kSlots + Cell::kStateSlot[g];
      const Panels<T>& state = Cell::kTwoPhase && g == 2 ? rh_ : h_prev_;
      for (int64_t r1 = rows; r1 > 0;) {
        const int64_t r0 = r1 > kBlock ? r1 - kBlock : 0;
        for (int64_t b = 0; b < S_; b += kOuterPanels)
          outer_panels(gates_.at(state_slot, r0), state.at(b, r0), state.stride,
                       outer_count(S_ - b), r1 - r0, lanes, a_.dw_hh + (b * P + p) * W * W,
                       P * W * W);
        if (x_.base != nullptr)
          for (int64_t b = 0; b < X_; b += kOuterPanels)
            outer_panels(gates_.at(in_slot, r0), x_.at(b, r0), x_.stride, outer_count(X_ - b),
                         r1 - r0, lanes, a_.dw_ih + (b * P + p) * W * W, P * W * W);
        r1 = r0;
      }
      if (a_.input.ids != nullptr) add_to_table(gates_.at(in_slot, 0), a_.dw_ih + p * a_.I * W);
      sum_rows(gates_.at(in_slot, 0), rows, a_.dbias + in_slot * W);
      if (state_slot != in_slot)
        sum_rows(gates_.at(state_slot, 0), rows, a_.dbias + state_slot * W);
      if (ticker.stop(rows * W * (a_.H + a_.I))) return;
    }
  }

  // dx of the chunk's rows r0 … r1 - 1. Scratch [X][r1 - r0][W].
  void input_gradients(int64_t r0, int64_t r1, T* scratch) {
    const Panels<T> out = {scratch, (r1 - r0) * W};
    const int64_t rows = r1 - r0, panel = S_ * G * W * W;
    memset(scratch, 0, sizeof(T) * static_cast<size_t>(X_ * rows * W));
    multiply_panels(
        {0, X_}, rows, a_.w_ih, panel, out,
        [&](int64_t r) { return gate_rows<Cell>(gates_, r0 + r, a_.H, Cell::kInputSlot, 0, G); },
        G * W * W);
    for (int64_t k = begin_; k < end_; ++k) {
      const int64_t first = s_.row_of_step[k];
      const int64_t j_end = r1 - first < s_.active[k] ? r1 - first : s_.active[k];
      for (int64_t j = r0 > first ? r0 - first : 0; j < j_end; ++j)
        add_input_row(k, j, out, first + j - r0);
    }
  }

 private:
  int64_t rows_in_chunk() const { return s_.row_of_step[end_ - 1] + s_.active[end_ - 1]; }

  // The states before all steps of the chunk, from the one before the first and the slots: with the
  // forward pass's own operations, and so its bits.
  void replay(const Share& share, const Blocks& mine) const {
    const int64_t j0 = share.j0, j1 = share.j1, stride = a_.state_rows * W;
    for (int64_t s = mine.first; s < mine.end; ++s) {
      const size_t bytes = sizeof(T) * static_cast<size_t>(rows_at(s_, begin_, j0, j1) * W);
      memcpy(h_prev_.at(s, j0), chunk_h_ + s * stride + j0 * W, bytes);
      if (Cell::kHasCell) memcpy(c_prev_.at(s, j0), chunk_c_ + s * stride + j0 * W, bytes);
    }
    for (int64_t k = begin_; k < end_; ++k) {
      const int64_t n = rows_at(s_, k, j0, j1), row = s_.row_of_step[k] + j0;
      if (a_.reset.data != nullptr) {
        for (int64_t j = 0; j < n; ++j) {
          if (!starts_afresh(a_, k, j0 + j)) continue;
          zero_row(h_prev_, mine, row + j);
          if (Cell::kHasCell) zero_row(c_prev_, mine, row + j);
        }
      }
      if (k + 1 == end_) return;
      const int64_t next = s_.row_of_step[k + 1] + j0, go_on = rows_at(s_, k + 1, j0, j1);
      for (int64_t s = mine.first; s < mine.end; ++s)
        for (int64_t r = 0; r < go_on; ++r)
          for (int v = 0; v < W; v += V::N) {
            V slot[Cell::kSlots];
#pragma GCC unroll 4
            for (int i = 0; i < Cell::kSlots; ++i)
              slot[i] = V::load(gates_.at(s * Cell::kSlots + i, row + r) + v);
            V c = Cell::kHasCell ? V::load(c_prev_.at(s, row + r) + v) : V::zero(), h;
            Cell::output(slot, V::load(h_prev_.at(s, row + r) + v), c, h);
            h.store(h_prev_.at(s, next + r) + v);
            if (Cell::kHasCell) c.store(c_prev_.at(s, next + r) + v);
          }
    }
  }

  FASTRNN_INLINE void cell_phase(int64_t k, int64_t s, int64_t row, int64_t j0, int64_t n,
                                 const Panels<T>& dh_, const Panels<T>& dc_) const {
    const int lanes = valid_lanes(a_.H, s, W);
    for (int64_t r = 0; r < n; ++r) {
      const T* dy = nullptr;
      if (a_.dy != nullptr) {
        const Place at = place(s_, a_.reverse, k, j0 + r);
        dy = a_.dy + a_.dy_layout.at(at.t, at.b) + s * W;
      }
      for (int v = 0; v < W; v += V::N) {
        V slot[Cell::kSlots];
#pragma GCC unroll 4
        for (int i = 0; i < Cell::kSlots; ++i)
          slot[i] = V::load(gates_.at(s * Cell::kSlots + i, row + r) + v);
        V dh = V::load(dh_.at(s, r) + v);
        V dc = Cell::kHasCell ? V::load(dc_.at(s, r) + v) : V::zero();
        if (dy != nullptr) {
          if (lanes - v >= V::N) {
            dh = dh + V::load(dy + v);
          } else if (lanes > v) {
            dh = dh + V::load_n(dy + v, lanes - v);
          }
        }
        const V c_prev = Cell::kHasCell ? V::load(c_prev_.at(s, row + r) + v) : V::zero();
        Cell::backward(slot, V::load(h_prev_.at(s, row + r) + v), c_prev, dh, dc);
#pragma GCC unroll 4
        for (int i = 0; i < Cell::kSlots; ++i)
          slot[i].store(gates_.at(s * Cell::kSlots + i, row + r) + v);
        dh.store(dh_.at(s, r) + v);
        if (Cell::kHasCell) dc.store(dc_.at(s, r) + v);
      }
    }
  }

  FASTRNN_INLINE void reset_phase(int64_t s, int64_t row, int64_t n, const Panels<T>& drh,
                                  const Panels<T>& dh_) const {
    for (int64_t r = 0; r < n; ++r)
      for (int v = 0; v < W; v += V::N) {
        T* const gate = gates_.at(s * Cell::kSlots, row + r) + v;
        V rg = V::load(gate), dh = V::load(dh_.at(s, r) + v), rh;
        Cell::backward_reset(rg, V::load(h_prev_.at(s, row + r) + v), V::load(drh.at(s, r) + v), dh,
                             rh);
        rg.store(gate);
        dh.store(dh_.at(s, r) + v);
        rh.store(rh_.at(s, row + r) + v);
      }
  }

  // out += dG W_hh over `count` gates from g0 on: what reaches the state before through the
  // product.
  FASTRNN_INLINE void multiply_back(const Blocks& mine, int64_t row, int64_t n, int g0, int count,
                                    const Panels<T>& out) const {
    multiply_panels(
        mine, n, a_.w_hh + g0 * W * W, S_ * G * W * W, out,
        [&](int64_t r) {
          return gate_rows<Cell>(gates_, row + r, a_.H, Cell::kStateSlot, g0, count);
        },
        G * W * W);
  }

  template <class F>
  FASTRNN_INLINE void multiply_panels(const Blocks& panels, int64_t rows, const T* w, int64_t panel,
                                      const Panels<T>& out, const F& left,
                                      int64_t group_stride) const {
    const int64_t most = panels_at_once(rows < kTileRows ? static_cast<int>(rows) : kTileRows);
    for (int64_t p = panels.first; p < panels.end; p += most) {
      const int together = static_cast<int>(panels.end - p < most ? panels.end - p : most);
      for (int64_t r = 0; r < rows;) {
        const int m = tile_rows(rows - r);
        T* c[4];
        for (int i = 0; i < together; ++i) c[i] = out.at(p + i, r);
        const Right<T> right = {w + p * panel, group_stride, panel};
        multiply<T>(m, together, left(r), right, c);
        r += m;
      }
    }
  }

  // One-hot input: the gradient of W_ih's column `id` gathers the rows where that token was seen.
  void add_to_table(const T* dg, T* table) const {
    for (int64_t k = end_ - 1; k >= begin_; --k)
      for (int64_t j = s_.active[k] - 1; j >= 0; --j) {
        const Place at = place(s_, a_.reverse, k, j);
        const int64_t id = a_.input.ids[a_.input.layout.at(at.t, at.b)];
        const T* const src = dg + (s_.row_of_step[k] + j) * W;
        T* const dst = table + id * W;
        (V::load(dst) + V::load(src)).store(dst);
        (V::load(dst + V::N) + V::load(src + V::N)).store(dst + V::N);
      }
  }

  void add_input_row(int64_t k, int64_t j, const Panels<T>& from, int64_t row) const {
    const Place at = place(s_, a_.reverse, k, j);
    T* const dx = a_.dx + a_.dx_layout.at(at.t, at.b);
    const DropoutMask& mask = a_.input.dropout;
    const uint64_t element = static_cast<uint64_t>((at.t * s_.batch + at.b) * a_.I);
    for (int64_t b = 0; b < X_; ++b) {
      const int n = valid_lanes(a_.I, b, W);
      const T* const src = from.at(b, row);
      T* const dst = dx + b * W;
      if (mask.threshold == 0) {
        for (int i = 0; i < n; ++i) dst[i] += src[i];
      } else {
        for (int i = 0; i < n; ++i)
          if (dropout_keeps(mask.key, element + static_cast<uint64_t>(b * W + i), mask.threshold))
            dst[i] += src[i] * static_cast<T>(mask.scale);
      }
    }
  }

  const BackwardArgs<T>& a_;
  const Schedule& s_;
  const int64_t S_, X_;
  const int64_t begin_, end_;  // steps of the chunk
  Panels<T> gates_, h_prev_, c_prev_, x_, rh_;
  const T *chunk_h_, *chunk_c_ = nullptr;
};

template <class Cell, class T>
void backward(const BackwardArgs<T>& a, int64_t chunk, const Share& share, T* scratch) {
  Backward<Cell, T>(a, chunk).run(share, scratch);
}

template <class Cell, class T>
void weight_gradients(const BackwardArgs<T>& a, int64_t chunk, int64_t p0, int64_t p1) {
  Backward<Cell, T>(a, chunk).weight_gradients(p0, p1);
}

template <class Cell, class T>
void input_gradients(const BackwardArgs<T>& a, int64_t chunk, int64_t r0, int64_t r1, T* scratch) {
  Backward<Cell, T>(a, chunk).input_gradients(r0, r1, scratch);
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CPU_SEQUENCE_H_
