// What the C++ tests need of a framework. CHECK(condition) and CHECK_EQ(got, expected) print file,
// line and values on failure and go on; main ends with `return check_report();`: 1 if any failed.
// Callable from several threads.
#ifndef FASTRNN_TESTS_CPP_CHECK_H_
#define FASTRNN_TESTS_CPP_CHECK_H_

#include <atomic>
#include <cstdio>
#include <limits>
#include <sstream>
#include <string>

inline std::atomic<long> checks_made{0};
inline std::atomic<long> checks_failed{0};

inline void check_that(bool ok, const char* file, int line, const std::string& what) {
  constexpr long kShown = 30;  // of a broken kernel's million failures
  ++checks_made;
  if (!ok && ++checks_failed <= kShown) {
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  }
}

template <class A, class B>
void check_equal(const A& got, const B& expected, const char* file, int line, const char* what) {
  if (got == expected) {
    ++checks_made;
    return;
  }
  std::ostringstream text;
  text.precision(std::numeric_limits<long double>::max_digits10);
  text << what << ": expected " << expected << ", got " << got;
  check_that(false, file, line, text.str());
}

inline int check_report() {
  std::printf("%ld checks, %ld failed\n", checks_made.load(), checks_failed.load());
  return checks_failed == 0 ? 0 : 1;
}

#define CHECK(condition)                                              \
  do {                                                                \
    if (condition) {                                                  \
      ++checks_made;                                                  \
    } else {                                                          \
      check_that(false, __FILE__, __LINE__, "CHECK(" #condition ")"); \
    }                                                                 \
  } while (false)
#define CHECK_EQ(got, expected) check_equal((got), (expected), __FILE__, __LINE__, #got)

#endif  // FASTRNN_TESTS_CPP_CHECK_H_
