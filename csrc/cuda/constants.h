// Loops whose index is a constant, for what may be indexed by constants only: registers, and the
// cells' tables of slots, which have no address on the device.
#ifndef FASTRNN_CUDA_CONSTANTS_H_
#define FASTRNN_CUDA_CONSTANTS_H_

#include <type_traits>

#include "cuda/simt.h"

namespace fastrnn {
namespace cuda {

// Calls f(std::integral_constant<int, i>()) for i = 0 ... N - 1.
template <int N, int I = 0, class F>
FASTRNN_DEVICE FASTRNN_INLINE void for_constants(const F& f) {
  if constexpr (I < N) {
    f(std::integral_constant<int, I>());
    for_constants<N, I + 1>(f);
  }
}

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_CONSTANTS_H_
