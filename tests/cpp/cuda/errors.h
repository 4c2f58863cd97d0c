// What the device's functions throw, as text for the CUDA tests to look into.
#ifndef FASTRNN_TESTS_CPP_CUDA_ERRORS_H_
#define FASTRNN_TESTS_CPP_CUDA_ERRORS_H_

#include <cstdio>
#include <string>

#include "cuda/runtime.h"

// The message of the Error that f throws; empty if it throws none.
template <class F>
std::string error_of(const F& f) {
  try {
    f();
  } catch (const fastrnn::cuda::Error& error) {
    return error.what();
  }
  return "";
}

inline bool contains(const std::string& text, const char* part) {
  const bool found = text.find(part) != std::string::npos;
  if (!found) std::fprintf(stderr, "no '%s' in '%s'\n", part, text.c_str());
  return found;
}

#endif  // FASTRNN_TESTS_CPP_CUDA_ERRORS_H_
