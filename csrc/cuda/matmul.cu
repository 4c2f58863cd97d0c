#include "cuda/matmul.h"

#include <algorithm>

#include "cuda/simt.h"

namespace fastrnn {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kDepth = 16;  // columns of a, rows of b, that a block keeps in shared memory

// A block's tile of c: each of 16 x 16 threads has kSide / 16 rows and columns of it.
template <class T, class C>
struct Product {
  int64_t M, N, K;
  Matrix<T> a, b;
  Start start;
  const C* bias;
  C* c;
  int64_t c_stride;
  int64_t slab;         // block z does the k from z * slab on, `slab` of them
  int64_t slab_stride;  // and writes to c + z * slab_stride
};

// Shared memory: one tile of a, transposed, and one of b, each [kDepth][kSide + 4].
template <class C, int kSide>
constexpr size_t shared_bytes() {
  return sizeof(C) * 2 * kDepth * (kSide + 4);
}

// Loads side (kSide rows or columns from `first` on) x depth (kDepth from `k` on) into
// out[depth][kSide + 4], zeros beyond the matrix. Neighbouring threads take neighbours in memory.
template <int kSide, class T, class C>
FASTRNN_DEVICE void load_tile(const T* data, int64_t side_stride, int64_t depth_stride,
                              int64_t first, int64_t sides, int64_t k, int64_t k_end, C* out) {
  const bool along_side = side_stride == 1;
  for (int e = static_cast<int>(thread_index()); e < kSide * kDepth; e += kThreads) {
    const int side = along_side ? e % kSide : e / kDepth;
    const int depth = along_side ? e / kSide : e % kDepth;
    const int64_t i = first + side, d = k + depth;
    C value = C(0);
    if (i < sides && d < k_end)
      value = static_cast<C>(widen(data[i * side_stride + d * depth_stride]));
    out[depth * (kSide + 4) + side] = value;
  }
}

template <class T, class C, int kSide>
FASTRNN_KERNEL void FASTRNN_LAUNCH_BOUNDS(kThreads, 1) product(Product<T, C> p) {
  constexpr int kEach = kSide / 16, kRow = kSide + 4;
  C* const tile_a = shared_memory<C>();
  C* const tile_b = tile_a + kDepth * kRow;
  const int tx = static_cast<int>(thread_index()) % 16, ty = static_cast<int>(thread_index()) / 16;
  // The many rows of a are the grid's x, which has room for them.
  const int64_t m0 = static_cast<int64_t>(block_index().x) * kSide,
                n0 = static_cast<int64_t>(block_index().y) * kSide;
  const int64_t z = block_index().z;
  const int64_t k0 = z * p.slab;
  const int64_t k_end = k0 + p.slab < p.K ? k0 + p.slab : p.K;
  C* const c = p.c + z * p.slab_stride;

  // Thread (ty, tx) has the rows m0 + ty + 16 i and the columns n0 + tx + 16 j.
  C sum[kEach][kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t m = m0 + ty + 16 * i, n = n0 + tx + 16 * j;
      const bool inside = m < p.M && n < p.N;
      sum[i][j] = C(0);
      if (inside && p.start == Start::kBias) sum[i][j] = p.bias[n];
      if (inside && p.start == Start::kAccumulate) sum[i][j] = c[m * p.c_stride + n];
    }
  }
  for (int64_t k = k0; k < k_end; k += kDepth) {
    load_tile<kSide>(p.a.data, p.a.row_stride, p.a.col_stride, m0, p.M, k, k_end, tile_a);
    load_tile<kSide>(p.b.data, p.b.col_stride, p.b.row_stride, n0, p.N, k, k_end, tile_b);
    sync_threads();
    // Not a step more than there are: a product with padding would turn -0 into 0.
    const int depth = k_end - k < kDepth ? static_cast<int>(k_end - k) : kDepth;
    for (int d = 0; d < depth; ++d) {
      C left[kEach], right[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) left[i] = tile_a[d * kRow + ty + 16 * i];
#pragma unroll
      for (int j = 0; j < kEach; ++j) right[j] = tile_b[d * kRow + tx + 16 * j];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) sum[i][j] = scalar::fused(left[i], right[j], sum[i][j]);
      }
    }
    sync_threads();
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t m = m0 + ty + 16 * i, n = n0 + tx + 16 * j;
      if (m < p.M && n < p.N) c[m * p.c_stride + n] = sum[i][j];
    }
  }
}

unsigned blocks(int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); }

template <class T, class C, int kSide>
void launch_product(Stream stream, const Product<T, C>& p, int64_t slabs) {
  Launch how;
  how.grid = {blocks(p.M, kSide), blocks(p.N, kSide), static_cast<unsigned>(slabs)};
  how.block = kThreads;
  how.shared = shared_bytes<C, kSide>();
  launch(stream, how, &product<T, C, kSide>, p);
}

template <class T, class C>
void run_product(Stream stream, const Product<T, C>& p, int64_t slabs) {
  if (p.M == 0 || p.N == 0) return;
  // Rows beyond what one launch's grid can have in y or z go into several.
  constexpr int64_t kGridLimit = 65535;
  // Large tiles where there are enough of them to fill a device, and registers for the sums.
  const bool large = sizeof(C) == 4 && p.M >= 512 && p.N >= 128;
  const int64_t side = large ? 128 : 64;
  for (int64_t n = 0; n < p.N; n += kGridLimit * side) {
    Product<T, C> part = p;
    part.N = std::min(p.N - n, kGridLimit * side);
    part.b.data += n * p.b.col_stride;
    part.c += n;
    if (p.bias != nullptr) part.bias += n;
    if constexpr (sizeof(C) == 4) {
      if (large) {
        launch_product<T, C, 128>(stream, part, slabs);
        continue;
      }
    }
    launch_product<T, C, 64>(stream, part, slabs);
  }
}

// Slabs of rows for sums over `rows`: at least 512 rows each and at most 64 of them.
struct Slabs {
  int64_t rows_each, count;
  explicit Slabs(int64_t rows)
      : rows_each(std::max<int64_t>(512, (rows + 63) / 64)),
        count((rows + rows_each - 1) / rows_each) {}
};

template <class C>
struct AddParts {
  const C* parts;
  int64_t count, stride;
  C* out;
  FASTRNN_HD void operator()(int64_t i) const {
    C sum = out[i];
    for (int64_t s = 0; s < count; ++s) sum += parts[s * stride + i];
    out[i] = sum;
  }
};

template <class T, class C>
struct SlabSums {
  const T* m;
  int64_t rows, cols, rows_each;
  C* parts;
  FASTRNN_HD void operator()(int64_t i) const {
    const int64_t slab = i / cols, col = i % cols;
    const int64_t end = rows < (slab + 1) * rows_each ? rows : (slab + 1) * rows_each;
    C sum = C(0);
    for (int64_t r = slab * rows_each; r < end; ++r)
      sum += static_cast<C>(widen(m[r * cols + col]));
    parts[i] = sum;
  }
};

}  // namespace

template <class T, class C>
void matmul(Stream stream, int64_t M, int64_t N, int64_t K, const Matrix<T>& a, const Matrix<T>& b,
            Start start, const C* bias, C* c, int64_t c_stride) {
  // One slab, of at least one column, so that K = 0 still writes what the chain starts from.
  run_product<T, C>(stream, {M, N, K, a, b, start, bias, c, c_stride, std::max<int64_t>(K, 1), 0},
                    1);
}

template <class T, class C>
void add_outer_products(Stream stream, int64_t rows, int64_t M, int64_t N, const T* a, const T* b,
                        C* c) {
  if (rows == 0 || M == 0 || N == 0) return;
  const Matrix<T> left = transposed(row_major(a, M)), right = row_major(b, N);
  const Slabs slabs(rows);
  if (slabs.count == 1)
    return matmul<T, C>(stream, M, N, rows, left, right, Start::kAccumulate, nullptr, c, N);
  const Memory parts = allocate<C>(slabs.count * M * N, stream);
  run_product<T, C>(
      stream,
      {M, N, rows, left, right, Start::kZero, nullptr, parts.data<C>(), N, slabs.rows_each, M * N},
      slabs.count);
  for_each(stream, M * N, AddParts<C>{parts.data<C>(), slabs.count, M * N, c});
}

template <class T, class C>
void add_column_sums(Stream stream, int64_t rows, int64_t cols, const T* m, C* sums) {
  if (rows == 0 || cols == 0) return;
  const Slabs slabs(rows);
  const Memory parts = allocate<C>(slabs.count * cols, stream);
  for_each(stream, slabs.count * cols,
           SlabSums<T, C>{m, rows, cols, slabs.rows_each, parts.data<C>()});
  for_each(stream, cols, AddParts<C>{parts.data<C>(), slabs.count, cols, sums});
}

#define FASTRNN_INSTANTIATE(T, C)                                                               \
  template void matmul<T, C>(Stream, int64_t, int64_t, int64_t, const Matrix<T>&,               \
                             const Matrix<T>&, Start, const C*, C*, int64_t);                   \
  template void add_outer_products<T, C>(Stream, int64_t, int64_t, int64_t, const T*, const T*, \
                                         C*);                                                   \
  template void add_column_sums<T, C>(Stream, int64_t, int64_t, const T*, C*);
FASTRNN_INSTANTIATE(float, float)
FASTRNN_INSTANTIATE(double, double)
FASTRNN_INSTANTIATE(Bfloat16, float)
FASTRNN_INSTANTIATE(Float16, float)

}  // namespace cuda
}  // namespace fastrnn
