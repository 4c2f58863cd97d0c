// Sizes that cannot wrap: every byte count that comes from a caller's dimensions is computed with
// these, so that an absurd shape is an OverflowError in Python and never a small allocation
// followed by a large write.
#ifndef FASTRNN_CORE_CHECKED_H_
#define FASTRNN_CORE_CHECKED_H_

#include <cstddef>
#include <stdexcept>

namespace fastrnn {

// a * b; throws std::overflow_error when the product does not fit.
inline std::size_t checked_mul(std::size_t a, std::size_t b) {
  std::size_t product;
  if (__builtin_mul_overflow(a, b, &product)) {
    throw std::overflow_error("a size does not fit in 64 bits");
  }
  return product;
}

// a + b; throws std::overflow_error when the sum does not fit.
inline std::size_t checked_add(std::size_t a, std::size_t b) {
  std::size_t sum;
  if (__builtin_add_overflow(a, b, &sum)) {
    throw std::overflow_error("a size does not fit in 64 bits");
  }
  return sum;
}

template <class... More>
std::size_t checked_mul(std::size_t a, std::size_t b, std::size_t c, More... more) {
  return checked_mul(checked_mul(a, b), c, more...);
}

template <class... More>
std::size_t checked_add(std::size_t a, std::size_t b, std::size_t c, More... more) {
  return checked_add(checked_add(a, b), c, more...);
}

}  // namespace fastrnn

#endif  // FASTRNN_CORE_CHECKED_H_
