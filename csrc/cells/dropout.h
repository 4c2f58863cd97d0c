// Dropout's mask as a pure function of a key and an element's index: the same on every device, for
// any number of threads, and recomputed in back-propagation instead of being stored.
#ifndef FASTRNN_CELLS_DROPOUT_H_
#define FASTRNN_CELLS_DROPOUT_H_

#include <stdint.h>

#include "cells/scalar.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// The finalizer of SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64-bit words that passes
// as random.
FASTRNN_HD FASTRNN_INLINE uint64_t splitmix64(uint64_t z) {
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// threshold = p * 2^53: element e is kept with probability 1 - p.
FASTRNN_HD FASTRNN_INLINE bool dropout_keeps(uint64_t key, uint64_t e, uint64_t threshold) {
  return (splitmix64(key + e) >> 11) >= threshold;
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CELLS_DROPOUT_H_
