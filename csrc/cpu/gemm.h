// The microkernel: a tile of up to kTileRows rows × NP panels of W = 2 vectors, accumulators in
// registers.
//
// Every output element is one chain of fused multiply-adds over k in increasing order, starting
// from what the output held before: tile sizes, row counts and threads decide only where a chain is
// computed, never its order, and so never its bits.
//
// Both operands are in the blocked layout of core/dims.h, so that all distances inside the k loop
// are constants of the compiled code: one base register serves all rows of the left operand.
#ifndef FASTRNN_CPU_GEMM_H_
#define FASTRNN_CPU_GEMM_H_

#include "core/args.h"
#include "cpu/vec.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// A lambda that a kernel's loop calls: always inlined, like everything between the loop and the
// tile.
#define FASTRNN_INLINE_LAMBDA __attribute__((always_inline))

template <class T>
constexpr int kWidth = 2 * Vec<T>::N;  // W

template <class T>
constexpr int kLine = 64 / static_cast<int>(sizeof(T));  // elements of a cache line

// Rows of a tile. 6 rows × 2 vectors of accumulators, 2 vectors of weights and a broadcast fit 16
// registers.
constexpr int kTileRows = 6;

// Panels at once for a tile of so many rows. With 16 registers one panel; fewer rows take two or
// four, so that enough independent chains hide the latency of the multiply-add (3 rows × 2 panels
// would spill). With 32 registers two panels fit 6 rows: 10 loads for 24 multiply-adds instead of 8
// for 12, which tells where a core's two hardware threads share its instruction slots.
constexpr int panels_at_once(int rows) {
  if (kVectorRegisters >= 32) return rows <= 2 ? 4 : 2;
  return rows == 1 ? 4 : rows == 2 ? 2 : 1;
}

// Panels of the right operand at once in a product of columns (outer_panels below).
constexpr int kOuterPanels = panels_at_once(kTileRows);

// The left operand of a product over k: `groups` superblocks of `per_group` panels each. Rows are W
// apart; a panel contributes W values of k, in the last group `tail`.
template <class T>
struct Left {
  const T* base;
  int64_t group_stride;
  int64_t offset[4];  // of the panels of a group from its start
  int per_group;
  int64_t groups;
  int tail;
};

// The right operand: panels of weights, k rows of W each. Group g's rows start g * group_stride
// further on.
template <class T>
struct Right {
  const T* base;
  int64_t group_stride;
  int64_t panel_stride;
};

// What the sums of a product start from: row r of panel p is at panel[p] + r * row_stride. 0 for
// one row that is the same for all, such as a bias; W for what the output holds.
template <class T>
struct Start {
  const T* panel[4];
  int64_t row_stride;
};

template <class T>
struct Zeros {
  static constexpr T row[kWidth<T>] = {};
};

// The sums start from nothing.
template <class T>
FASTRNN_INLINE Start<T> from_nothing() {
  const T* const row = Zeros<T>::row;
  return {{row, row, row, row}, 0};
}

template <class T, int ROWS, int NP>
struct Tile {
  using V = Vec<T>;
  static constexpr int W = kWidth<T>;

  V acc[ROWS][NP][2];

  FASTRNN_INLINE void load(const T* const* c, int64_t row_stride) {
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) {
      const T* const from = c[p];
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        acc[r][p][0] = V::load(from + r * row_stride);
        acc[r][p][1] = V::load(from + r * row_stride + V::N);
      }
    }
  }

  FASTRNN_INLINE void store(T* const* c) const {
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) {
      T* const to = c[p];
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        acc[r][p][0].store(to + r * W);
        acc[r][p][1].store(to + r * W + V::N);
      }
    }
  }

  // One value of k: row r's factor is a[r * STEP].
  template <int STEP>
  FASTRNN_INLINE void add(const T* a, const T* w, int64_t panel_stride) {
    V w0[NP], w1[NP];
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) {
      w0[p] = V::load(w + p * panel_stride);
      w1[p] = V::load(w + p * panel_stride + V::N);
      if constexpr (ROWS > 1) {
        w0[p].hold();
        w1[p].hold();
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const V x = V::set(a[r * STEP]);
#pragma GCC unroll 4
      for (int p = 0; p < NP; ++p) {
        if constexpr (ROWS > 1) {
          accumulate(x, w0[p], acc[r][p][0]);
          accumulate(x, w1[p], acc[r][p][1]);
        } else {  // what is used once can be an operand in memory
          acc[r][p][0] = fma(x, w0[p], acc[r][p][0]);
          acc[r][p][1] = fma(x, w1[p], acc[r][p][1]);
        }
      }
    }
  }
};

// Values of k between two looks at a loop's end, at most. Where a core's other hardware thread is
// busy, this one issues half as many instructions a cycle: the arithmetic units then have enough to
// do only if next to nothing but loads and multiply-adds is in the way.
constexpr int kUnrolled = 8;

// c[p][r] = start(p, r) + Σ_k left(r, k) · right(k, p): rows of the left operand against packed
// weights. With AHEAD, a line is brought into the second-level cache with every k, the first from
// `ahead`: for weights that come from beyond it. Within it, the instruction would only take the
// slot of another.
template <class T, int ROWS, int NP, bool AHEAD>
__attribute__((noinline)) void multiply_tile(const Left<T>& left, const Right<T>& right,
                                             const Start<T>& start, T* const* c, const T* ahead) {
  constexpr int W = kWidth<T>;
  constexpr int U = W < kUnrolled ? W : kUnrolled;
  static_assert(W % U == 0, "whole groups end with a whole turn of the loop");
  Tile<T, ROWS, NP> tile;
  tile.load(start.panel, start.row_stride);
  const T *a_group = left.base, *w_group = right.base;
  for (int64_t whole = left.groups - (left.tail < W); whole > 0; --whole) {
    const T* w = w_group;
    for (int q = 0; q < left.per_group; ++q) {
      const T* a = a_group + left.offset[q];
#pragma GCC unroll 1
      for (int k = 0; k < W; k += U, a += U, w += U * W) {
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
          if constexpr (AHEAD) __builtin_prefetch(ahead + u * kLine<T>, 0, 2);
          tile.template add<W>(a + u, w + u * W, right.panel_stride);
        }
        if constexpr (AHEAD) ahead += U * kLine<T>;
      }
    }
    a_group += left.group_stride;
    w_group += right.group_stride;
  }
  if (left.tail < W) {
    for (int q = 0; q < left.per_group; ++q) {
      const T *a = a_group + left.offset[q], *w = w_group + q * W * W;
#pragma GCC unroll 1
      for (int k = 0; k < left.tail; ++k, ++a, w += W) {
        if constexpr (AHEAD) {
          __builtin_prefetch(ahead, 0, 2);
          ahead += kLine<T>;
        }
        tile.template add<W>(a, w, right.panel_stride);
      }
    }
  }
  tile.store(c);
}

// Of several tiles none has fewer rows, and a single one fetches nothing ahead (multiply_rows).
constexpr int kAheadRows = 3;

// The same for 1 … kTileRows rows and 1 … panels_at_once(rows) panels chosen at run time; `ahead`
// may be null.
template <class T, int ROWS, int NP>
FASTRNN_INLINE void multiply_some(const Left<T>& left, const Right<T>& right, const Start<T>& start,
                                  T* const* c, const T* ahead) {
  if constexpr (ROWS >= kAheadRows) {
    if (ahead != nullptr) return multiply_tile<T, ROWS, NP, true>(left, right, start, c, ahead);
  }
  multiply_tile<T, ROWS, NP, false>(left, right, start, c, nullptr);
}

template <class T, int ROWS = kTileRows>
FASTRNN_INLINE void multiply(int rows, int panels, const Left<T>& left, const Right<T>& right,
                             const Start<T>& start, T* const* c, const T* ahead = nullptr) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return multiply<T, ROWS - 1>(rows, panels, left, right, start, c, ahead);
  }
  constexpr int most = panels_at_once(ROWS);
  if constexpr (most >= 4) {
    if (panels == 4) return multiply_some<T, ROWS, 4>(left, right, start, c, ahead);
    if (panels == 3) return multiply_some<T, ROWS, 3>(left, right, start, c, ahead);
  }
  if constexpr (most >= 2) {
    if (panels == 2) return multiply_some<T, ROWS, 2>(left, right, start, c, ahead);
  }
  multiply_some<T, ROWS, 1>(left, right, start, c, ahead);
}

// `left` rows as evenly as possible in groups of at most `most`: the first one's. Without a
// division, which takes as long as a few values of k, where one group is enough.
FASTRNN_INLINE int64_t even_part(int64_t left, int64_t most) {
  if (left <= most) return left;
  const int64_t parts = (left + most - 1) / most;
  return (left + parts - 1) / parts;
}

// Rows of a panel that a tile takes when `left` are to be done.
FASTRNN_INLINE int tile_rows(int64_t left) { return static_cast<int>(even_part(left, kTileRows)); }

// Rows that go through all panels of a few units together: their accumulators stay in the
// first-level cache.
FASTRNN_INLINE int64_t group_rows(int64_t left) { return even_part(left, 8 * kTileRows); }

// Bytes of weights that all tiles of a few rows go through before the next: they stay in the
// second-level cache, beside what else is wanted of it. The first-level cache would give them
// faster, but with blocks of its size the sums are put down and taken up again so often that it
// costs more.
constexpr int kBlockBytes = 262144;

// The sums go on from what the output holds.
template <class T>
FASTRNN_INLINE Start<T> go_on(int panels, T* const* c) {
  Start<T> start = {{}, kWidth<T>};
  for (int p = 0; p < panels; ++p) start.panel[p] = c[p];
  return start;
}

// The same for any number of rows, which lie W apart in c as in the left operand, in blocks of k.
// With `next` the tiles of a block fetch the block after it; those of the last one what begins at
// `next`, panels as far apart as the right operand's. A single tile has nothing to hide that
// behind.
template <class T>
FASTRNN_INLINE void multiply_rows(int64_t rows, int panels, const Left<T>& left,
                                  const Right<T>& right, const Start<T>& start, T* const* c,
                                  const T* next) {
  constexpr int W = kWidth<T>;
  constexpr int kLines = W > kLine<T> ? W / kLine<T> : 1;  // of a row of weights
  if (rows <= kTileRows) return multiply<T>(static_cast<int>(rows), panels, left, right, start, c);
  const int group_bytes = left.per_group * panels * W * W * static_cast<int>(sizeof(T));
  const int64_t together = kBlockBytes > group_bytes ? kBlockBytes / group_bytes : 1;
  for (int64_t g = 0; g < left.groups; g += together) {
    const bool last = g + together >= left.groups;
    Left<T> a = left;
    a.base += g * left.group_stride;
    a.groups = last ? left.groups - g : together;
    if (!last) a.tail = W;
    const Right<T> w = {right.base + g * right.group_stride, right.group_stride,
                        right.panel_stride};
    Start<T> from = g == 0 ? start : go_on<T>(panels, c);
    // A tile fetches as many lines as it has k: every kLines-th of them begins a panel.
    const T* const after = last ? next : w.base + together * right.group_stride;
    const int64_t lines = a.groups * a.per_group * W * kLine<T>;
    int tiles = 0;
    for (int64_t r = 0; r < rows; ++tiles) {
      const int m = tile_rows(rows - r);
      T* out[4];
      for (int i = 0; i < panels; ++i) out[i] = c[i] + r * W;
      const T* ahead = nullptr;
      if (next != nullptr && tiles < panels * kLines)
        ahead = after + tiles / kLines * right.panel_stride + tiles % kLines * lines;
      multiply<T>(m, panels, a, w, from, out, ahead);
      a.base += m * W;
      for (int i = 0; i < panels; ++i) from.panel[i] += m * from.row_stride;
      r += m;
    }
  }
}

// A number of rows that the compiler knows.
template <int n>
struct FixedRows {
  static constexpr int value = n;
};

// The k of a product of columns: rows of panels, in runs, each from its last row to its first.
struct Rows {
  const Run* runs;
  int64_t count;
};

// c[r] = start(r) + Σ_k a(k, r) · b(k): columns of one panel against another panel, both k-major,
// every run from its last row to its first. Descending, because back-propagation visits the steps
// from the last to the first: so a gradient is one chain over all steps and does not depend on how
// they were cut into chunks. On the way the accumulators `ahead` elements further on are brought
// nearer.
template <class T, int ROWS, int NP>
__attribute__((noinline)) void outer_tile(const T* a, const T* b, int64_t b_stride,
                                          const Rows& rows, const Start<T>& start, T* const* c,
                                          int64_t ahead) {
  constexpr int W = kWidth<T>;
  Tile<T, ROWS, NP> tile;
  tile.load(start.panel, start.row_stride);
#pragma GCC unroll 4
  for (int p = 0; p < NP; ++p)
#pragma GCC unroll 16
    for (int i = 0; i < ROWS * W; i += kLine<T>) __builtin_prefetch(c[p] + ahead + i, 0, 2);
  for (int64_t i = 0; i < rows.count; ++i) {
    const Run run = rows.runs[i];
    const T* x = a + (run.row + run.rows) * W;
    const T* y = b + (run.row + run.rows) * W;
    int64_t k = run.rows;
    const auto take = [&](auto fixed) FASTRNN_INLINE_LAMBDA {
      constexpr int n = decltype(fixed)::value;
#pragma GCC unroll 8
      for (int u = 1; u <= n; ++u) tile.template add<1>(x - u * W, y - u * W, b_stride);
      x -= n * W;
      y -= n * W;
      k -= n;
    };
    while (k >= kUnrolled) take(FixedRows<kUnrolled>());
    if (k >= kUnrolled / 2) take(FixedRows<kUnrolled / 2>());
    while (k > 0) take(FixedRows<1>());
  }
  tile.store(c);
}

template <class T, int ROWS = kTileRows>
FASTRNN_INLINE void outer_rows(int n, int panels, const T* a, const T* b, int64_t b_stride,
                               const Rows& rows, const Start<T>& start, T* const* c,
                               int64_t ahead) {
  if constexpr (ROWS > 1) {
    if (n < ROWS) return outer_rows<T, ROWS - 1>(n, panels, a, b, b_stride, rows, start, c, ahead);
  }
  if constexpr (kOuterPanels > 1) {
    if (panels > 1) return outer_tile<T, ROWS, kOuterPanels>(a, b, b_stride, rows, start, c, ahead);
  }
  outer_tile<T, ROWS, 1>(a, b, b_stride, rows, start, c, ahead);
}

// c[p] [W][W] += aᵀ b[p] over rows of the panel a and of 1 … kOuterPanels panels b, or = for the
// first of several such sums; only the first `lanes` columns of a are wanted, and rows of c. The
// next to be added to lies `ahead` elements on.
template <class T>
void outer_panels(const T* a, const T* b, int64_t b_stride, int panels, const Rows& rows, int lanes,
                  bool first, T* c, int64_t c_stride, int64_t ahead) {
  constexpr int W = kWidth<T>;
  for (int done = 0; done < lanes;) {
    const int n = tile_rows(lanes - done);
    T* out[kOuterPanels];
    for (int p = 0; p < panels; ++p) out[p] = c + p * c_stride + done * W;
    outer_rows<T>(n, panels, a + done, b, b_stride, rows,
                  first ? from_nothing<T>() : go_on<T>(panels, out), out, ahead);
    done += n;
  }
}

// Panels that outer_panels takes when `left` are to be done.
FASTRNN_INLINE int outer_count(int64_t left) {
  return left < kOuterPanels ? static_cast<int>(left) : kOuterPanels;
}

// sum [W] += column sums of a panel, likewise from the last row to the first.
template <class T>
void sum_rows(const T* a, const Rows& rows, T* sum) {
  using V = Vec<T>;
  constexpr int W = kWidth<T>;
  V s0 = V::load(sum), s1 = V::load(sum + V::N);
  for (int64_t i = 0; i < rows.count; ++i) {
    const Run run = rows.runs[i];
    for (int64_t k = run.row + run.rows - 1; k >= run.row; --k) {
      s0 = s0 + V::load(a + k * W);
      s1 = s1 + V::load(a + k * W + V::N);
    }
  }
  s0.store(sum);
  s1.store(sum + V::N);
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CPU_GEMM_H_
