// Stands in for NVIDIA's cuBLASLt where there is none: the functions that cuda/cublaslt.cc looks
// up, computed by plain loops on host memory, which the emulator's device memory is. Written from
// cuBLASLt's documentation: matrices are column-major, d = alpha op(a) op(b) + beta c + bias, one
// bias for each row of d.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda/half.h"

namespace {

using fastrnn::cuda::Bfloat16;
using fastrnn::cuda::Float16;

struct Layout {
  int type;
  uint64_t rows, cols;
  int64_t ld;
};
struct Descriptor {
  int compute, scale;
  int32_t operation[2];  // of a, of b
  uint32_t epilogue;
  const float* bias;
};
struct Preference {
  uint64_t workspace;
};
struct Result {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

constexpr int kInvalidValue = 7, kNotSupported = 15;

float element(const void* data, const Layout& m, uint64_t row, uint64_t col) {
  const uint64_t at = col * static_cast<uint64_t>(m.ld) + row;
  if (m.type == 0) return static_cast<const float*>(data)[at];
  return m.type == 14 ? fastrnn::cuda::to_float(static_cast<const Bfloat16*>(data)[at])
                      : fastrnn::cuda::to_float(static_cast<const Float16*>(data)[at]);
}

bool sound(const Layout& m) { return m.ld >= 0 && static_cast<uint64_t>(m.ld) >= m.rows; }

}  // namespace

extern "C" {

#define EXPORTED __attribute__((visibility("default")))

EXPORTED size_t cublasLtGetVersion() { return 130000; }
EXPORTED int cublasLtCreate(void** handle) {
  static int there;
  *handle = &there;
  return 0;
}
EXPORTED int cublasLtMatmulDescCreate(Descriptor** d, int compute, int scale) {
  *d = new Descriptor{compute, scale, {0, 0}, 1, nullptr};
  return 0;
}
EXPORTED int cublasLtMatmulDescDestroy(Descriptor* d) {
  delete d;
  return 0;
}
EXPORTED int cublasLtMatmulDescSetAttribute(Descriptor* d, int attribute, const void* value,
                                            size_t bytes) {
  if ((attribute == 3 || attribute == 4) && bytes == sizeof(int32_t)) {
    std::memcpy(&d->operation[attribute - 3], value, bytes);
  } else if (attribute == 7 && bytes == sizeof(uint32_t)) {
    std::memcpy(&d->epilogue, value, bytes);
  } else if (attribute == 8 && bytes == sizeof(void*)) {
    std::memcpy(&d->bias, value, bytes);
  } else {
    return kInvalidValue;
  }
  return 0;
}
EXPORTED int cublasLtMatrixLayoutCreate(Layout** m, int type, uint64_t rows, uint64_t cols,
                                        int64_t ld) {
  *m = new Layout{type, rows, cols, ld};
  return 0;
}
EXPORTED int cublasLtMatrixLayoutDestroy(Layout* m) {
  delete m;
  return 0;
}
EXPORTED int cublasLtMatmulPreferenceCreate(Preference** p) {
  *p = new Preference{0};
  return 0;
}
EXPORTED int cublasLtMatmulPreferenceDestroy(Preference* p) {
  delete p;
  return 0;
}
EXPORTED int cublasLtMatmulPreferenceSetAttribute(Preference* p, int attribute, const void* value,
                                                  size_t bytes) {
  if (attribute != 1 || bytes != sizeof(uint64_t)) return kInvalidValue;
  std::memcpy(&p->workspace, value, bytes);
  return 0;
}
EXPORTED int cublasLtMatmulAlgoGetHeuristic(void*, Descriptor*, Layout* a, Layout* b, Layout* c,
                                            Layout* d, Preference* p, int requested,
                                            Result* results, int* count) {
  *count = 0;
  if (!sound(*a) || !sound(*b) || !sound(*c) || !sound(*d) || requested < 1) return kInvalidValue;
  if (d->rows == 13) return kNotSupported;  // for the test of what happens then
  *results = {};
  results->algorithm[0] = 42;
  results->workspace = p->workspace < 64 ? 0 : 64;
  *count = 1;
  return 0;
}
EXPORTED int cublasLtMatmul(void* handle, Descriptor* desc, const float* alpha, const void* a,
                            Layout* la, const void* b, Layout* lb, const float* beta,
                            const float* c, Layout* lc, float* d, Layout* ld,
                            const uint64_t* algorithm, void* workspace, size_t bytes,
                            void* /*stream*/) {
  const bool at = desc->operation[0] == 1, bt = desc->operation[1] == 1;
  const uint64_t rows = at ? la->cols : la->rows, depth = at ? la->rows : la->cols;
  const uint64_t cols = bt ? lb->rows : lb->cols, depth_b = bt ? lb->cols : lb->rows;
  const int compute = la->type == 0 ? 77 : 68;
  if (handle == nullptr || algorithm[0] != 42 || workspace == nullptr || bytes != 64 ||
      desc->compute != compute || desc->scale != 0 || lc->type != 0 || ld->type != 0 ||
      la->type != lb->type || depth != depth_b || rows != ld->rows || cols != ld->cols ||
      rows != lc->rows || cols != lc->cols || (desc->epilogue == 4) != (desc->bias != nullptr))
    return kInvalidValue;
  for (uint64_t j = 0; j < cols; ++j) {
    for (uint64_t i = 0; i < rows; ++i) {
      double sum = desc->bias == nullptr ? 0.0 : static_cast<double>(desc->bias[i]);
      for (uint64_t k = 0; k < depth; ++k)
        sum += static_cast<double>(*alpha) * (at ? element(a, *la, k, i) : element(a, *la, i, k)) *
               (bt ? element(b, *lb, j, k) : element(b, *lb, k, j));
      const uint64_t out = j * static_cast<uint64_t>(ld->ld) + i;
      if (*beta != 0) sum += static_cast<double>(*beta) * c[out];
      d[out] = static_cast<float>(sum);
    }
  }
  return 0;
}

}  // extern "C"
