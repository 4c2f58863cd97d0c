// One layer and direction backward over time, from the last chunk of steps to the first: the cell
// turns the slab into gradients of the pre-activations, in place, and dG W_hh carries them to the
// step before. What does not depend on the recurrence (gradients of weights, biases and inputs) is
// a large product per chunk, done while the slab is in cache.
#ifndef FASTRNN_CPU_BACKWARD_H_
#define FASTRNN_CPU_BACKWARD_H_

#include <string.h>

#include "cells/dropout.h"
#include "core/args.h"
#include "cpu/gemm.h"
#include "cpu/pack.h"
#include "cpu/steps.h"

namespace fastrnn {
namespace FASTRNN_ISA {

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
    const int64_t copy = chunk % a_.copies * S_ * s_.max_rows * W;
    h_prev_ = {a_.h_prev + copy, stride};
    if (Cell::kHasCell) c_prev_ = {a_.c_prev + copy, stride};
    if (Cell::kTwoPhase) rh_ = {a_.rh + copy, stride};
    const int64_t start = (chunk - a_.first_chunk) * S_ * a_.state_rows * W;
    chunk_h_ = a_.chunk_h + start;
    if (Cell::kHasCell) chunk_c_ = a_.chunk_c + start;
    x_ = {a_.x_rows == nullptr ? nullptr : a_.x_rows + before * X_, stride};
    rows_ = {s_.runs + s_.run_begin[chunk], s_.run_begin[chunk + 1] - s_.run_begin[chunk]};
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
      const int64_t row = slab_row(s_, k, share.part);
      for (int64_t s = mine.first; s < mine.end; ++s)
        cell_phase(k, s, mine.end, row, j0, n, dh, dc);
      // Here a team meets: the products need the gradients of all units. Its members' parts of dh
      // stay apart.
      if (ticker.stop(n * G * a_.H * a_.H, share.team)) return;
      if constexpr (Cell::kTwoPhase) {
        multiply_back<true>(k, mine, row, n, 2, 1, drh);
        for (int64_t s = mine.first; s < mine.end; ++s) reset_phase(s, row, n, drh, dh);
        if (share.team != nullptr) team_barrier(share.team);  // a stop is noticed at the next step
        multiply_back<false>(k, mine, row, n, 0, 2, dh);
      } else {
        multiply_back<false>(k, mine, row, n, 0, G, dh);
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
    // Rows at once, as many as a chunk has in general: a panel of them takes 32 KB.
    constexpr int64_t kBlock = 32768 / (W * static_cast<int>(sizeof(T)));
    const int64_t P = S_ * G, ahead = kOuterPanels * P * W * W;
    int64_t all = 0;
    for (int64_t i = 0; i < rows_.count; ++i) all += rows_.runs[i].rows;
    Run block[kBlock];
    const bool last_chunk = end_ == s_.chunk_begin[s_.chunks];
    Ticker ticker(a_.interrupt);
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t s = p / G, g = p % G;
      const int lanes = valid_lanes(a_.H, s, W);
      const int64_t in_slot = s * Cell::kSlots + Cell::kInputSlot[g],
                    state_slot = s * Cell::kSlots + Cell::kStateSlot[g];
      const Panels<T>& state = Cell::kTwoPhase && g == 2 ? rh_ : h_prev_;
      const T *const dg_in = gates_.at(in_slot, 0), *const dg_state = gates_.at(state_slot, 0);
      int64_t i = 0, done = 0;  // runs, and rows of the next one
      while (i < rows_.count) {
        const bool first = last_chunk && i == 0 && done == 0;  // nothing to add to
        const Rows rows = {block, take_rows(i, done, kBlock, block)};
        for (int64_t b = 0; b < S_; b += kOuterPanels)
          outer_panels(dg_state, state.at(b, 0), state.stride, outer_count(S_ - b), rows, lanes,
                       first, a_.dw_hh + (b * P + p) * W * W, P * W * W,
                       b + kOuterPanels < S_ ? ahead : 0);
        if (x_.base != nullptr)
          for (int64_t b = 0; b < X_; b += kOuterPanels)
            outer_panels(dg_in, x_.at(b, 0), x_.stride, outer_count(X_ - b), rows, lanes, first,
                         a_.dw_ih + (b * P + p) * W * W, P * W * W,
                         b + kOuterPanels < X_ ? ahead : 0);
      }
      if (a_.input.ids != nullptr) add_to_table(dg_in, a_.dw_ih + p * a_.I * W);
      sum_rows(dg_in, rows_, a_.dbias + in_slot * W);
      if (state_slot != in_slot) sum_rows(dg_state, rows_, a_.dbias + state_slot * W);
      if (ticker.stop(all * W * (a_.H + a_.I))) return;
    }
  }

  // dx of the chunk's rows r0 … r1 - 1. Scratch [X][r1 - r0][W].
  void input_gradients(int64_t r0, int64_t r1, T* scratch) {
    const Panels<T> out = {scratch, (r1 - r0) * W};
    const int64_t rows = r1 - r0, panel = S_ * G * W * W;
    Ticker ticker(a_.interrupt);
    constexpr int64_t kTogether = 16;  // panels between two looks for Ctrl-C
    for (int64_t b = 0; b < X_; b += kTogether) {
      multiply_panels<true>(
          0, {b, b + kTogether < X_ ? b + kTogether : X_}, rows, a_.w_ih, panel, out,
          [&](int64_t r) { return gate_rows<Cell>(gates_, r0 + r, a_.H, Cell::kInputSlot, 0, G); },
          G * W * W, a_.fetch_w_ih);
      if (ticker.stop(rows * kTogether * W * G * a_.H)) return;
    }
    for (int64_t part = 0; part < s_.parts; ++part)
      for (int64_t k = begin_; k < end_; ++k) {
        const int64_t j0 = s_.part_begin[part], first = slab_row(s_, k, part);
        const int64_t n = rows_at(s_, k, j0, s_.part_begin[part + 1]);
        const int64_t end = r1 - first < n ? r1 - first : n;
        for (int64_t i = r0 > first ? r0 - first : 0; i < end; ++i)
          add_input_row(k, j0 + i, out, first + i - r0);
      }
  }

 private:
  // Up to `most` rows of the chunk in the order of the sums, from run i on, of which `done` are
  // done already.
  int64_t take_rows(int64_t& i, int64_t& done, int64_t most, Run* block) const {
    int64_t count = 0;
    while (i < rows_.count && most > 0) {
      const Run run = rows_.runs[i];
      const int64_t left = run.rows - done, n = left < most ? left : most;
      block[count++] = {run.row + left - n, n};
      most -= n;
      done = n < left ? done + n : 0;
      i += n == left;
    }
    return count;
  }

  // The states before all steps of the chunk, from the one before the first and the slots: with the
  // forward pass's own operations, and so its bits.
  void replay(const Share& share, const Blocks& mine) const {
    const int64_t j0 = share.j0, j1 = share.j1, stride = a_.state_rows * W;
    for (int64_t s = mine.first; s < mine.end; ++s) {
      const size_t bytes = sizeof(T) * static_cast<size_t>(rows_at(s_, begin_, j0, j1) * W);
      const int64_t row = slab_row(s_, begin_, share.part);
      memcpy(h_prev_.at(s, row), chunk_h_ + s * stride + j0 * W, bytes);
      if (Cell::kHasCell) memcpy(c_prev_.at(s, row), chunk_c_ + s * stride + j0 * W, bytes);
    }
    for (int64_t k = begin_; k < end_; ++k) {
      const int64_t n = rows_at(s_, k, j0, j1), row = slab_row(s_, k, share.part);
      if (a_.reset.data != nullptr) {
        for (int64_t j = 0; j < n; ++j) {
          if (!starts_afresh(a_, k, j0 + j)) continue;
          zero_row(h_prev_, mine, row + j);
          if (Cell::kHasCell) zero_row(c_prev_, mine, row + j);
        }
      }
      if (k + 1 == end_) return;
      const int64_t next = slab_row(s_, k + 1, share.part), go_on = rows_at(s_, k + 1, j0, j1);
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

  // The cell on n rows of superblock s of those before `end`, whose next one's dy is fetched.
  FASTRNN_INLINE void cell_phase(int64_t k, int64_t s, int64_t end, int64_t row, int64_t j0,
                                 int64_t n, const Panels<T>& dh_, const Panels<T>& dc_) const {
    const int lanes = valid_lanes(a_.H, s, W);
    for (int64_t r = 0; r < n; ++r) {
      const T* dy = nullptr;
      if (a_.dy != nullptr) {
        const Place at = place(s_, a_.reverse, k, j0 + r);
        dy = a_.dy + a_.dy_layout.at(at.t, at.b) + s * W;
        for (int i = 0; s + 1 < end && i < W; i += kLine<T>) __builtin_prefetch(dy + W + i);
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

  // out += dG W_hh over `count` gates from g0 on, or out = for the first of several: what reaches
  // the state before through the product.
  template <bool kFirst>
  FASTRNN_INLINE void multiply_back(int64_t k, const Blocks& mine, int64_t row, int64_t n, int g0,
                                    int count, const Panels<T>& out) const {
    multiply_panels<kFirst>(
        k, mine, n, a_.w_hh + g0 * W * W, S_ * G * W * W, out,
        [&](int64_t r) {
          return gate_rows<Cell>(gates_, row + r, a_.H, Cell::kStateSlot, g0, count);
        },
        G * W * W, a_.fetch_w_hh);
  }

  // In the order of step k; the first product starts from 0.
  template <bool kFirst, class F>
  FASTRNN_INLINE void multiply_panels(int64_t k, const Blocks& panels, int64_t rows, const T* w,
                                      int64_t panel, const Panels<T>& out, const F& left,
                                      int64_t group_stride, bool ahead) const {
    const int64_t most = panels_at_once(rows < kTileRows ? static_cast<int>(rows) : kTileRows);
    const int64_t groups = (panels.end - panels.first + most - 1) / most;
    const auto first_panel = [&](int64_t turn) FASTRNN_INLINE_LAMBDA {
      return panels.first + in_turn(k, turn, groups) * most;
    };
    for (int64_t turn = 0; turn < groups; ++turn) {
      const int64_t p = first_panel(turn), next = first_panel(turn + 1 < groups ? turn + 1 : turn);
      const int together = static_cast<int>(panels.end - p < most ? panels.end - p : most);
      const Right<T> right = {w + p * panel, group_stride, panel};
      for (int64_t r = 0; r < rows;) {
        const int64_t m = group_rows(rows - r);
        T* c[4];
        for (int i = 0; i < together; ++i) c[i] = out.at(p + i, r);
        multiply_rows<T>(m, together, left(r), right,
                         kFirst ? from_nothing<T>() : go_on<T>(together, c), c,
                         ahead ? w + next * panel : nullptr);
        r += m;
      }
    }
  }

  // One-hot input: the gradient of W_ih's column `id` gathers the rows where that token was seen.
  void add_to_table(const T* dg, T* table) const {
    for (int64_t k = end_ - 1; k >= begin_; --k)
      for (int64_t part = s_.parts - 1; part >= 0; --part) {
        const int64_t j0 = s_.part_begin[part];
        for (int64_t i = rows_at(s_, k, j0, s_.part_begin[part + 1]) - 1; i >= 0; --i) {
          const Place at = place(s_, a_.reverse, k, j0 + i);
          const int64_t id = a_.input.ids[a_.input.layout.at(at.t, at.b)];
          const T* const src = dg + (slab_row(s_, k, part) + i) * W;
          T* const dst = table + id * W;
          (V::load(dst) + V::load(src)).store(dst);
          (V::load(dst + V::N) + V::load(src + V::N)).store(dst + V::N);
        }
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
        add_lanes(src, n, !a_.add_dx, dst);
        continue;
      }
      for (int i = 0; i < n; ++i) {
        if (!a_.add_dx) dst[i] = 0;
        if (dropout_keeps(mask.key, element + static_cast<uint64_t>(b * W + i), mask.threshold))
          dst[i] += src[i] * static_cast<T>(mask.scale);
      }
    }
  }

  const BackwardArgs<T>& a_;
  const Schedule& s_;
  const int64_t S_, X_;
  const int64_t begin_, end_;  // steps of the chunk
  Rows rows_;                  // of the chunk
  Panels<T> gates_, h_prev_, c_prev_ = {}, x_, rh_ = {};
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

#endif  // FASTRNN_CPU_BACKWARD_H_
