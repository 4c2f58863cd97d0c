// The product of the grid kernels (cuda/grid.cu): a block's weights, which stay in its registers
// and shared memory, times rows that other blocks are still writing. Kernels only.
#ifndef FASTRNN_CUDA_GRID_PRODUCT_H_
#define FASTRNN_CUDA_GRID_PRODUCT_H_

#include <stddef.h>
#include <stdint.h>

#include "cuda/grid_packing.h"
#include "cuda/ptx.h"
#include "cuda/simt.h"

namespace fastrnn {
namespace cuda {
namespace grid {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kTileRows = kTileN;  // batch rows of a tile
constexpr int kMaxTiles = 2;       // that are multiplied together: a group
constexpr int kWordElements = 8;   // of 16 bytes
constexpr int kPairWords = kPairElements / kWordElements;

struct ThreadPlace {
  int lane, warp;
  int block, replica;  // the block's number among those of a product, and which of the replicas
};

FASTRNN_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether the warp has to go round again, if this lane says `mine`. On the device it goes together,
// as a product needs all its lanes; in the emulator the product waits for them.
FASTRNN_DEVICE FASTRNN_INLINE bool any_of_warp(bool mine) {
#if defined(__CUDACC__)
  return __any_sync(~0u, mine) != 0;
#else
  return mine;
#endif
}

// Half a word.
struct alignas(8) Word8 {
  uint32_t w[2];
};

// A word of which some is still what the rows were filled with. Two parts stand for all of it: that
// 8 bytes are stored as one is certain (PTX ISA, memory consistency model).
constexpr uint32_t kUnwritten = 0xFFFFFFFFu;
FASTRNN_DEVICE FASTRNN_INLINE bool unwritten(const Word16& x) {
  return x.w[1] == kUnwritten || x.w[3] == kUnwritten;
}

// The larger one. In words that the compiler does not look into: see await_words.
FASTRNN_DEVICE FASTRNN_INLINE uint32_t larger(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  uint32_t out;
  asm("max.u32 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
#else
  return a > b ? a : b;
#endif
}

// What the kernels of a product are compiled for: kM m tiles of a block, and of the pairs of k
// tiles that a warp multiplies kP in registers, at 8 kM of them. With the accumulators of two batch
// tiles (8 kM kChains registers) and the operands that are fetched together (4 for each word) they
// must leave some 50 of 255 registers for the rest.
template <int kM, int kP, int kAlone, int kTogether>
struct Tiling {
  static constexpr int kMTiles = kM;
  static constexpr int kRows = kTileM * kM;
  static constexpr int kPairs = kP;
  // Pairs whose operands are fetched together, for one batch tile and for two.
  template <int kTiles>
  static constexpr int kBatch = kTiles == 1 ? kAlone : kTogether;
  // A product waits for the one before it into the same accumulator, so where a block has few m
  // tiles, each has several. From 2 m tiles on it is one: cells of 8 and of 16 units a block must
  // give the same bits.
  static constexpr int kChains = kM == 1 ? 4 : 1;
  static_assert(kP % kAlone == 0 && kP % kTogether == 0,
                "a batch is either in registers or in shared memory");
  static_assert(kChains == 1 || (kAlone % 2 == 0 && kTogether % 2 == 0),
                "a batch starts at the first accumulator");
};

// The weights of a warp: pairs `warp`, `warp` + 8 ... of the block's K columns.
template <class T>
struct Weights {
  uint32_t a[T::kPairs][2][T::kMTiles][4];
  Word16* shared;  // [pair - kPairs][warp][2][m tile][lane], what a lane writes only it reads
  int pairs;       // of this warp
};

// The A operand of one tile. `packed` points to the pair's tiles, [m tile][2][lane]. A block of 8
// units puts the rows of two gates in one tile: it takes `half` of the lane's data of both.
template <class T, int kUnits>
FASTRNN_DEVICE FASTRNN_INLINE void fetch_tile(const Word16* packed, int gates, int half, int tile,
                                              int t, int lane, uint32_t (&a)[4]) {
  if constexpr (kUnits == kBlockUnits) {
    const Word16 v = packed[(tile * 2 + t) * kLanes + lane];
    a[0] = v.w[0];
    a[1] = v.w[2];
    a[2] = v.w[1];
    a[3] = v.w[3];
  } else {
    const Word8* const halves = reinterpret_cast<const Word8*>(packed) + half;
    const Word8 none = {{0, 0}};
    const int first = 2 * tile, second = 2 * tile + 1;
    const Word8 low = halves[2 * ((first * 2 + t) * kLanes + lane)];
    const Word8 high = second < gates ? halves[2 * ((second * 2 + t) * kLanes + lane)] : none;
    a[0] = low.w[0];
    a[1] = high.w[0];
    a[2] = low.w[1];
    a[3] = high.w[1];
  }
}

// The weights of block p.block, from the packed ones of all: [16 units][pair][gate][2][lane].
template <class T, int kUnits>
FASTRNN_DEVICE FASTRNN_INLINE void load_weights(const Word16* packed, const ThreadPlace& p,
                                                int pairs, int gates, Word16* shared,
                                                Weights<T>& weights) {
  constexpr int kTilesOfPair = 2 * T::kMTiles;
  const int half = p.block * kUnits / 8 % 2;
  const int64_t pair_words = static_cast<int64_t>(gates) * 2 * kLanes;
  packed += (static_cast<int64_t>(p.block * kUnits / kBlockUnits) * pairs + p.warp) * pair_words;
  weights.pairs = pairs > p.warp ? (pairs - p.warp - 1) / kWarps + 1 : 0;
  weights.shared = shared + p.warp * kTilesOfPair * kLanes + p.lane;
#pragma unroll
  for (int i = 0; i < T::kPairs; ++i) {
#pragma unroll
    for (int tm = 0; tm < kTilesOfPair; ++tm) {
      uint32_t (&a)[4] = weights.a[i][tm / T::kMTiles][tm % T::kMTiles];
      a[0] = a[1] = a[2] = a[3] = 0;
      if (i < weights.pairs) {
        fetch_tile<T, kUnits>(packed + i * kWarps * pair_words, gates, half, tm % T::kMTiles,
                              tm / T::kMTiles, p.lane, a);
      }
    }
  }
  for (int i = T::kPairs; i < weights.pairs; ++i) {
    Word16* const to = weights.shared + (i - T::kPairs) * kWarps * kTilesOfPair * kLanes;
    for (int tm = 0; tm < kTilesOfPair; ++tm) {
      Word16 v;
      fetch_tile<T, kUnits>(packed + i * kWarps * pair_words, gates, half, tm % T::kMTiles,
                            tm / T::kMTiles, p.lane, v.w);
      to[tm * kLanes] = v;
    }
  }
}

// Where a lane finds its words of the rows that are multiplied, one row of each tile. It has every
// 32nd word of a row, kLaneStride elements apart.
constexpr int kLaneStride = kWarps * kPairElements;
template <class S, int kTiles>
struct Operand {
  const S* from[kTiles];
  int count[kTiles];  // of words; at most 0: no such row. The others are zeros

  FASTRNN_DEVICE FASTRNN_INLINE void skip(int words) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      from[n] += words * kLaneStride;
      count[n] -= words;
    }
  }
};

// Word q of the next ones, of all tiles, is on its way after.
template <class S, int kTiles>
FASTRNN_DEVICE FASTRNN_INLINE void load_words(const Operand<S, kTiles>& rows, int q,
                                              Word16 (&x)[kTiles]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    x[n] = {{0, 0, 0, 0}};
    if (q < rows.count[n]) x[n] = load_relaxed(rows.from[n] + q * kLaneStride);
  }
}

// Waits until the next kBatch words, which were loaded into x, have been written; loads them again
// where they had not been. Whether they have is looked up from the last one to the first, in a
// chain, so that all loads are on their way before one is waited for.
template <int kBatch, class S, int kTiles>
FASTRNN_DEVICE FASTRNN_INLINE void await_words(const Operand<S, kTiles>& rows,
                                               Word16 (&x)[kBatch][kTiles]) {
  while (true) {
    uint32_t largest = 0;
#pragma unroll
    for (int q = kBatch - 1; q >= 0; --q) {
#pragma unroll
      for (int n = kTiles - 1; n >= 0; --n)
        largest = larger(larger(largest, x[q][n].w[3]), x[q][n].w[1]);
    }
    if (!any_of_warp(largest == kUnwritten)) return;
#pragma unroll
    for (int q = 0; q < kBatch; ++q) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (unwritten(x[q][n])) x[q][n] = load_relaxed(rows.from[n] + q * kLaneStride);
      }
    }
  }
}

template <class T, int kTiles>
using Sums = float[kTiles][T::kMTiles][T::kChains][4];

// Partial sums in shared memory, [warp][tile][row of the product][8 batch rows]. The batch rows of
// every other four rows are in another order, so that neither the accumulators' writes nor the
// cells' reads (8 units, 4 batch rows) ever meet in a bank. An element's index is that of its place
// in 8 rows plus that of the 8 rows, a constant in every use.
FASTRNN_DEVICE FASTRNN_INLINE int partial_place(int row, int col) {
  return row * kTileRows + (col ^ (row & 4));
}
template <class T>
constexpr int partial_rows(int warp, int tile, int row) {
  return ((warp * kMaxTiles + tile) * T::kRows + row) * kTileRows;
}

template <class T, int kTiles>
FASTRNN_DEVICE FASTRNN_INLINE void store_partial(const Sums<T, kTiles>& sum, const ThreadPlace& p,
                                                 float* partial) {
  struct alignas(8) Two {
    float v[2];
  };
  float* const mine =
      partial + partial_rows<T>(p.warp, 0, 0) + partial_place(p.lane / 4, 2 * (p.lane % 4));
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int m = 0; m < T::kMTiles; ++m) {
      float d[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float (&chain)[T::kChains][4] = sum[n][m];
        if constexpr (T::kChains == 4) {
          d[r] = (chain[0][r] + chain[1][r]) + (chain[2][r] + chain[3][r]);
        } else {
          d[r] = chain[0][r];
        }
      }
      float* const to = mine + partial_rows<T>(0, n, m * kTileM);
      *reinterpret_cast<Two*>(to) = {{d[0], d[1]}};
      *reinterpret_cast<Two*>(to + 8 * kTileRows) = {{d[2], d[3]}};
    }
  }
}

// A batch of pairs: weight(q, t, m) is the A operand of m tile m of pair q's k tile t. `pairs`: how
// many there are from this batch on. Where there is another batch, its words, the first ones of
// `next`, are loaded into x as this one's are used up.
template <class T, class S, int kTiles, int kBatch, class Weight>
FASTRNN_DEVICE FASTRNN_INLINE void multiply_batch(int pairs, const Operand<S, kTiles>& next,
                                                  const Weight& weight, Word16 (&x)[kBatch][kTiles],
                                                  Sums<T, kTiles>& sum) {
#pragma unroll
  for (int q = 0; q < kBatch; ++q) {
    if (q >= pairs) break;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int m = 0; m < T::kMTiles; ++m) {
        const uint32_t (&a)[4] = weight(q, t, m);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          mma_16x8x16<S>(sum[n][m][(2 * q + t) % T::kChains], a, x[q][n].w[2 * t],
                         x[q][n].w[2 * t + 1]);
        }
      }
    }
    if (pairs > kBatch) load_words(next, q, x[q]);
  }
}

// This warp's part of the product of the block's weights with the rows, into `partial`.
template <class T, class S, int kTiles>
FASTRNN_DEVICE FASTRNN_INLINE void multiply(const Weights<T>& weights, Operand<S, kTiles> rows,
                                            const ThreadPlace& p, float* partial) {
  constexpr int kBatch = T::template kBatch<kTiles>;
  Sums<T, kTiles> sum = {};
  Word16 x[kBatch][kTiles];
#pragma unroll
  for (int q = 0; q < kBatch; ++q) load_words(rows, q, x[q]);
#pragma unroll
  for (int first = 0; first < T::kPairs; first += kBatch) {
    if (first >= weights.pairs) break;
    await_words(rows, x);
    rows.skip(kBatch);
    multiply_batch<T, S, kTiles, kBatch>(
        weights.pairs - first, rows,
        [&](int q, int t, int m) -> const uint32_t (&)[4] { return weights.a[first + q][t][m]; }, x,
        sum);
  }
  const Word16* shared = weights.shared;
#pragma unroll 1
  for (int first = T::kPairs; first < weights.pairs; first += kBatch) {
    await_words(rows, x);
    rows.skip(kBatch);
    Word16 a;
    multiply_batch<T, S, kTiles, kBatch>(
        weights.pairs - first, rows,
        [&](int q, int t, int m) -> const uint32_t (&)[4] {
          a = shared[((q * kWarps * 2 + t) * T::kMTiles + m) * kLanes];
          return a.w;
        },
        x, sum);
    shared += kBatch * kWarps * 2 * T::kMTiles * kLanes;
  }
  store_partial<T, kTiles>(sum, p, partial);
}

// The sum of all warps' parts, in a fixed order. `mine` points to the first warp's.
template <class T>
FASTRNN_DEVICE FASTRNN_INLINE float add_partials(const float* mine) {
  float p[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) p[w] = mine[partial_rows<T>(w, 0, 0)];
  return ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
}

// Words of weights that do not fit in registers.
template <class T>
FASTRNN_HD constexpr int64_t shared_words(int64_t pairs) {
  const int64_t rest = ceil_div(pairs, kWarps) - T::kPairs;
  return rest > 0 ? rest * kWarps * 2 * T::kMTiles * kLanes : 0;
}

template <class T>
FASTRNN_HD constexpr size_t partial_floats() {
  return static_cast<size_t>(kWarps) * kMaxTiles * T::kRows * kTileRows;
}

}  // namespace grid
}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_GRID_PRODUCT_H_
