#include "cuda/elementwise.h"

#include "cuda/half.h"
#include "cuda/simt.h"

namespace fastrnn {
namespace cuda {

namespace {

// Where element i, in C order, lies in each of K views of one shape. Axes that follow each other in
// all views are merged, so that contiguous ones cost no division.
template <int K>
struct Places {
  int ndim;
  int64_t size;
  int64_t shape[kMaxDimensions];
  int64_t strides[K][kMaxDimensions];

  FASTRNN_HD void find(int64_t i, int64_t (&at)[K]) const {
    for (int k = 0; k < K; ++k) at[k] = 0;
    for (int axis = ndim - 1; axis > 0; --axis) {
      const int64_t rest = i % shape[axis];
      i /= shape[axis];
      for (int k = 0; k < K; ++k) at[k] += rest * strides[k][axis];
    }
    for (int k = 0; k < K; ++k) at[k] += i * strides[k][0];
  }
};

template <int K>
Places<K> places(const View* const (&views)[K]) {
  Places<K> p = {1, 1, {1}, {}};
  bool first = true;
  for (int axis = 0; axis < views[0]->ndim; ++axis) {
    const int64_t extent = views[0]->shape[axis];
    p.size *= extent;
    if (extent == 1) continue;
    bool follows = !first;
    for (int k = 0; k < K; ++k)
      follows = follows && p.strides[k][p.ndim - 1] == extent * views[k]->strides[axis];
    const int here = follows || first ? p.ndim - 1 : p.ndim++;
    p.shape[here] = follows ? p.shape[here] * extent : extent;
    for (int k = 0; k < K; ++k) p.strides[k][here] = views[k]->strides[axis];
    first = false;
  }
  return p;
}

template <int K>
bool contiguous(const Places<K>& p) {
  for (int k = 0; k < K; ++k)
    if (p.strides[k][0] != 1) return p.size == 1;
  return p.ndim == 1;
}

// Elements moved as they are.
template <class Word>
struct Move {
  Places<2> where;
  const Word* from;
  Word* to;
  FASTRNN_HD void operator()(int64_t i) const {
    int64_t at[2];
    where.find(i, at);
    to[at[1]] = from[at[0]];
  }
};

// Every dtype's values fit a double, int64 beyond 2^53 apart.
FASTRNN_HD double load(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<double>(static_cast<const float*>(data)[at]);
    case DType::kFloat64:
      return static_cast<const double*>(data)[at];
    case DType::kFloat16:
      return static_cast<double>(to_float(static_cast<const Float16*>(data)[at]));
    case DType::kBfloat16:
      return static_cast<double>(to_float(static_cast<const Bfloat16*>(data)[at]));
    case DType::kInt32:
      return static_cast<double>(static_cast<const int32_t*>(data)[at]);
    case DType::kInt64:
      return static_cast<double>(static_cast<const int64_t*>(data)[at]);
    default:
      return static_cast<const uint8_t*>(data)[at] != 0 ? 1.0 : 0.0;
  }
}

FASTRNN_HD void store(void* data, DType dtype, int64_t at, double value) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(data)[at] = static_cast<float>(value);
      return;
    case DType::kFloat64:
      static_cast<double*>(data)[at] = value;
      return;
    case DType::kFloat16:
      static_cast<Float16*>(data)[at] = from_float<Float16>(static_cast<float>(value));
      return;
    case DType::kBfloat16:
      static_cast<Bfloat16*>(data)[at] = from_float<Bfloat16>(static_cast<float>(value));
      return;
    case DType::kInt32:
      static_cast<int32_t*>(data)[at] = static_cast<int32_t>(value);
      return;
    case DType::kInt64:
      static_cast<int64_t*>(data)[at] = static_cast<int64_t>(value);
      return;
    default:
      static_cast<uint8_t*>(data)[at] = value != 0 ? 1 : 0;
  }
}

struct Convert {
  Places<2> where;
  const void* from;
  DType from_dtype;
  void* to;
  DType to_dtype;
  FASTRNN_HD void operator()(int64_t i) const {
    int64_t at[2];
    where.find(i, at);
    store(to, to_dtype, at[1], load(from, from_dtype, at[0]));
  }
};

struct Fill {
  Places<1> where;
  void* to;
  DType dtype;
  double value;
  FASTRNN_HD void operator()(int64_t i) const {
    int64_t at[1];
    where.find(i, at);
    store(to, dtype, at[0], value);
  }
};

template <class T>
struct Add {
  Places<2> where;
  const T* from;
  T* to;
  FASTRNN_HD void operator()(int64_t i) const {
    int64_t at[2];
    where.find(i, at);
    to[at[1]] += from[at[0]];
  }
};

template <class Word>
struct Where {
  Places<3> where;
  const uint8_t* keep;
  const Word* from;
  Word* to;
  FASTRNN_HD void operator()(int64_t i) const {
    int64_t at[3];
    where.find(i, at);
    to[at[2]] = keep[at[0]] != 0 ? from[at[1]] : Word(0);
  }
};

template <class T>
struct Scale {
  T factor;
  T* x;
  FASTRNN_HD void operator()(int64_t i) const { x[i] *= factor; }
};

template <class T>
struct Clip {
  T limit;
  T* x;
  FASTRNN_HD void operator()(int64_t i) const {
    x[i] = x[i] > limit ? limit : (x[i] < -limit ? -limit : x[i]);
  }
};

// Calls f with the unsigned integer of the dtype's size.
template <class F>
void for_words(DType dtype, const F& f) {
  const int64_t size = size_of(dtype);
  if (size == 8) return f(uint64_t{});
  if (size == 4) return f(uint32_t{});
  if (size == 2) return f(uint16_t{});
  f(uint8_t{});
}

}  // namespace

void copy(Stream stream, const View& from, const View& to) {
  const View* const views[] = {&from, &to};
  const Places<2> where = places(views);
  if (where.size == 0) return;
  if (from.dtype != to.dtype) {
    for_each(stream, where.size, Convert{where, from.data, from.dtype, to.data, to.dtype});
  } else if (contiguous(where)) {
    const int64_t bytes = where.size * size_of(to.dtype);
    copy_on_device(to.data, from.data, static_cast<size_t>(bytes), stream);
  } else {
    for_words(to.dtype, [&](auto word) {
      using Word = decltype(word);
      for_each(stream, where.size,
               Move<Word>{where, static_cast<const Word*>(from.data), static_cast<Word*>(to.data)});
    });
  }
}

void fill(Stream stream, const View& to, double value) {
  const View* const views[] = {&to};
  const Places<1> where = places(views);
  for_each(stream, where.size, Fill{where, to.data, to.dtype, value});
}

void add(Stream stream, const View& from, const View& to) {
  const View* const views[] = {&from, &to};
  const Places<2> where = places(views);
  if (to.dtype == DType::kFloat64) {
    for_each(
        stream, where.size,
        Add<double>{where, static_cast<const double*>(from.data), static_cast<double*>(to.data)});
  } else {
    for_each(stream, where.size,
             Add<float>{where, static_cast<const float*>(from.data), static_cast<float*>(to.data)});
  }
}

void where(Stream stream, const View& keep, const View& from, const View& to) {
  const View* const views[] = {&keep, &from, &to};
  const Places<3> p = places(views);
  for_words(to.dtype, [&](auto word) {
    using Word = decltype(word);
    for_each(stream, p.size,
             Where<Word>{p, static_cast<const uint8_t*>(keep.data),
                         static_cast<const Word*>(from.data), static_cast<Word*>(to.data)});
  });
}

template <class T>
void scale(Stream stream, int64_t n, T factor, T* x) {
  for_each(stream, n, Scale<T>{factor, x});
}

template <class T>
void clip(Stream stream, int64_t n, T limit, T* x) {
  for_each(stream, n, Clip<T>{limit, x});
}

template void scale(Stream, int64_t, float, float*);
template void scale(Stream, int64_t, double, double*);
template void clip(Stream, int64_t, float, float*);
template void clip(Stream, int64_t, double, double*);

}  // namespace cuda
}  // namespace fastrnn
