// run_on_isa <isa> <program>: runs the program if this machine has the ISA, else says so and exits
// with 77, which ctest reports as "skipped". A separate program, compiled for the plain
// architecture, because one compiled for the ISA could die on its first instruction.
#include <unistd.h>

#include <cstdio>
#include <cstring>

namespace {

bool machine_has(const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  if (std::strcmp(isa, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
  }
#else
  (void)isa;
#endif
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: run_on_isa <isa> <program>\n");
    return 2;
  }
  if (!machine_has(argv[1])) {
    std::printf("SKIP: this machine has no %s\n", argv[1]);
    return 77;
  }
  execl(argv[2], argv[2], static_cast<char*>(nullptr));
  std::perror(argv[2]);
  return 1;
}
