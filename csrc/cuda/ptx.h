// The instructions that CUDA C++ has no words for: tensor core products, the exchange of data
// between the blocks of a cluster, and loads and stores that other blocks may race with. As with
// cuda/simt.h, nvcc compiles them to PTX, another compiler to calls of the emulator.
//
// Registers of a warp's 16 x 8 x 16 product, for lane l with g = l / 4 and t = l % 4 (every
// uint32_t holds two neighbouring 16-bit elements, the one of smaller index in the lower half):
//
//   A (16 x 16, by rows)     a[0]: A[g][2t, 2t + 1]        a[1]: A[g + 8][2t, 2t + 1]
//                            a[2]: A[g][2t + 8, 2t + 9]    a[3]: A[g + 8][2t + 8, 2t + 9]
//   B (16 x 8, by columns)   b0:   B[2t, 2t + 1][g]        b1:   B[2t + 8, 2t + 9][g]
//   D (16 x 8)               d[0], d[1]: D[g][2t, 2t + 1]  d[2], d[3]: D[g + 8][2t, 2t + 1]
//
// What is named cluster, mbarrier and store_async needs compute capability 9.0: kernels that use it
// stand inside `#if FASTRNN_HAS_CLUSTERS`, as their bodies would trap on an older device.
#ifndef FASTRNN_CUDA_PTX_H_
#define FASTRNN_CUDA_PTX_H_

#include <stddef.h>
#include <stdint.h>

#include <type_traits>

#include "cuda/half.h"
#include "cuda/simt.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FASTRNN_HAS_CLUSTERS 0
#else
#define FASTRNN_HAS_CLUSTERS 1
#endif

namespace fastrnn {
namespace cuda {

// 16 bytes that are read and written as one.
struct alignas(16) Word16 {
  uint32_t w[4];
};

// Where something lies in the shared memory of a block of this cluster.
struct SharedAddress {
  uint32_t value;
};
FASTRNN_HD FASTRNN_INLINE SharedAddress operator+(SharedAddress a, uint32_t bytes) {
  return {a.value + bytes};
}

#if defined(__CUDACC__)

namespace detail {
FASTRNN_DEVICE FASTRNN_INLINE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
}  // namespace detail

// D += A B, a warp together. S: Bfloat16 or Float16.
template <class S>
FASTRNN_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
FASTRNN_DEVICE FASTRNN_INLINE void mma_16x8x16<Bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                         uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
FASTRNN_DEVICE FASTRNN_INLINE void mma_16x8x16<Float16>(float (&d)[4], const uint32_t (&a)[4],
                                                        uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory, a warp together: lane 8 m + i gives
// the address of row i (16 bytes, aligned to 16) of matrix m, and r[m] gets elements 2t, 2t + 1 of
// its row g.
FASTRNN_DEVICE FASTRNN_INLINE void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(shared_row))
               : "memory");
}

// This block's place in its cluster.
FASTRNN_DEVICE FASTRNN_INLINE unsigned cluster_rank() {
#if FASTRNN_HAS_CLUSTERS
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  __trap();
  return 0;
#endif
}

// Waits for all threads of the cluster (those that have not returned); what any of them wrote
// before is seen by all after.
FASTRNN_DEVICE FASTRNN_INLINE void cluster_sync() {
#if FASTRNN_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#else
  __trap();
#endif
}

// An mbarrier is a uint64_t in this block's shared memory. It goes from phase to phase, the first
// of parity 0; a phase ends when `count` arrivals were made and the bytes that came in are as many
// as were expected. After mbarrier_init by one thread, sync_threads or cluster_sync makes it known.
FASTRNN_DEVICE FASTRNN_INLINE void mbarrier_init(uint64_t* mbarrier, int count) {
#if FASTRNN_HAS_CLUSTERS
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;\nfence.mbarrier_init.release.cluster;" ::"r"(
          detail::shared_address(mbarrier)),
      "r"(count)
      : "memory");
#else
  __trap();
#endif
}

// Expects `bytes` more in the present phase, and is one of its arrivals.
FASTRNN_DEVICE FASTRNN_INLINE void mbarrier_expect(uint64_t* mbarrier, uint32_t bytes) {
#if FASTRNN_HAS_CLUSTERS
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   detail::shared_address(mbarrier)),
               "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

// Waits while the present phase has this parity, that is, for the end of the phase of that parity;
// the caller must not fall a whole phase behind. What came with its bytes is seen after.
FASTRNN_DEVICE FASTRNN_INLINE void mbarrier_wait(uint64_t* mbarrier, unsigned parity) {
#if FASTRNN_HAS_CLUSTERS
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(detail::shared_address(mbarrier)),
      "r"(parity)
      : "memory");
#else
  __trap();
#endif
}

// The place in block `rank` of the cluster that `mine` is in this block.
FASTRNN_DEVICE FASTRNN_INLINE SharedAddress remote(const void* mine, unsigned rank) {
#if FASTRNN_HAS_CLUSTERS
  SharedAddress to;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(to.value)
      : "r"(detail::shared_address(mine)), "r"(rank));
  return to;
#else
  __trap();
  return {};
#endif
}

// Writes 8 (16) bytes to `to`, aligned to as many, some time later, and then counts them at
// `mbarrier` of the same block. That block must not have returned.
FASTRNN_DEVICE FASTRNN_INLINE void store_async(SharedAddress to, uint32_t x, uint32_t y,
                                               SharedAddress mbarrier) {
#if FASTRNN_HAS_CLUSTERS
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::
          "r"(to.value),
      "r"(x), "r"(y), "r"(mbarrier.value)
      : "memory");
#else
  __trap();
#endif
}
FASTRNN_DEVICE FASTRNN_INLINE void store_async(SharedAddress to, const Word16& v,
                                               SharedAddress mbarrier) {
#if FASTRNN_HAS_CLUSTERS
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to.value),
      "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]), "r"(mbarrier.value)
      : "memory");
#else
  __trap();
#endif
}

// 16 aligned bytes of global memory that other blocks may be writing (reading): never torn, and not
// ordered with anything else.
FASTRNN_DEVICE FASTRNN_INLINE Word16 load_relaxed(const void* from) {
  uint64_t low, high;
  asm volatile(
      "{\n"
      ".reg .b128 word;\n"
      "ld.relaxed.gpu.global.b128 word, [%2];\n"
      "mov.b128 {%0, %1}, word;\n"
      "}"
      : "=l"(low), "=l"(high)
      : "l"(__cvta_generic_to_global(from))
      : "memory");
  return {{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
           static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)}};
}
FASTRNN_DEVICE FASTRNN_INLINE void store_relaxed(void* to, const Word16& v) {
  const uint64_t low = v.w[0] | (static_cast<uint64_t>(v.w[1]) << 32);
  const uint64_t high = v.w[2] | (static_cast<uint64_t>(v.w[3]) << 32);
  asm volatile(
      "{\n"
      ".reg .b128 word;\n"
      "mov.b128 word, {%1, %2};\n"
      "st.relaxed.gpu.global.b128 [%0], word;\n"
      "}" ::"l"(__cvta_generic_to_global(to)),
      "l"(low), "l"(high)
      : "memory");
}

#else  // the emulator: what is said above of each holds here, and is checked

template <class S>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                 FASTRNN_SITE_PARAMETERS) {
  static_assert(std::is_same<S, Bfloat16>::value || std::is_same<S, Float16>::value,
                "the operands are of 16 bits");
  emulator::mma(d, a, b0, b1, std::is_same<S, Bfloat16>::value, {file, line});
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, FASTRNN_SITE_PARAMETERS) {
  emulator::ldmatrix(r, shared_row, {file, line});
}

inline unsigned cluster_rank() { return emulator::here().block->cluster_rank; }
inline void cluster_sync(FASTRNN_SITE_PARAMETERS) { emulator::cluster_sync({file, line}); }

inline void mbarrier_init(uint64_t* mbarrier, int count, FASTRNN_SITE_PARAMETERS) {
  emulator::mbarrier_init(mbarrier, count, {file, line});
}
inline void mbarrier_expect(uint64_t* mbarrier, uint32_t bytes, FASTRNN_SITE_PARAMETERS) {
  emulator::mbarrier_expect(mbarrier, bytes, {file, line});
}
inline void mbarrier_wait(uint64_t* mbarrier, unsigned parity, FASTRNN_SITE_PARAMETERS) {
  emulator::mbarrier_wait(mbarrier, parity, {file, line});
}

inline SharedAddress remote(const void* mine, unsigned rank, FASTRNN_SITE_PARAMETERS) {
  return {emulator::remote(mine, rank, {file, line})};
}
inline void store_async(SharedAddress to, uint32_t x, uint32_t y, SharedAddress mbarrier,
                        FASTRNN_SITE_PARAMETERS) {
  const uint32_t words[2] = {x, y};
  emulator::store_async(to.value, words, 2, mbarrier.value, {file, line});
}
inline void store_async(SharedAddress to, const Word16& v, SharedAddress mbarrier,
                        FASTRNN_SITE_PARAMETERS) {
  emulator::store_async(to.value, v.w, 4, mbarrier.value, {file, line});
}

inline Word16 load_relaxed(const void* from, FASTRNN_SITE_PARAMETERS) {
  Word16 v;
  emulator::load_relaxed(v.w, from, {file, line});
  return v;
}
inline void store_relaxed(void* to, const Word16& v, FASTRNN_SITE_PARAMETERS) {
  emulator::store_relaxed(to, v.w, {file, line});
}

#endif  // __CUDACC__

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_PTX_H_
