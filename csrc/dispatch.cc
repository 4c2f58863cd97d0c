// The only place that knows which instruction sets exist and asks the processor for them. The
// FASTRNN_HAVE_<NAME> definitions say what is compiled in (cmake/isa.cmake).
#include "dispatch.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastrnn {

#if defined(FASTRNN_HAVE_AVX512)
namespace avx512 {
const KernelTable& kernel_table();
}
#endif
#if defined(FASTRNN_HAVE_AVX2)
namespace avx2 {
const KernelTable& kernel_table();
}
#endif
#if defined(FASTRNN_HAVE_BASELINE)
namespace baseline {
const KernelTable& kernel_table();
}
#endif
#if defined(FASTRNN_HAVE_NEON)
namespace neon {
const KernelTable& kernel_table();
}
#endif

namespace {

// __builtin_cpu_supports asks the operating system too, which must save the wider registers.
#if defined(FASTRNN_HAVE_AVX2)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
#if defined(FASTRNN_HAVE_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
#endif

// The brand string, or what there is instead.
std::string cpu_name() {
#if defined(__x86_64__) || defined(__i386__)
  unsigned int words[12] = {};
  for (unsigned int i = 0; i < 3; ++i) {
    unsigned int* w = words + 4 * i;
    if (__get_cpuid(0x80000002U + i, w, w + 1, w + 2, w + 3) == 0) return "x86";
  }
  char text[sizeof(words) + 1] = {};
  std::memcpy(text, words, sizeof(words));
  const std::string name = text + std::strspn(text, " ");
  return name.substr(0, name.find_last_not_of(' ') + 1);
#elif defined(__APPLE__)
  char text[128] = {};
  std::size_t size = sizeof(text) - 1;
  if (sysctlbyname("machdep.cpu.brand_string", text, &size, nullptr, 0) == 0) return text;
  return "Apple";
#else
  return "AArch64";
#endif
}

const KernelTable& choose() {
  const std::vector<const KernelTable*> tables = available_kernels();
  const char* wanted = std::getenv("FASTRNN_ISA");
  if (wanted == nullptr || *wanted == '\0') return *tables.front();
  std::string names;
  for (const KernelTable* table : tables) {
    if (std::strcmp(table->isa, wanted) == 0) return *table;
    names += (names.empty() ? "'" : ", '") + std::string(table->isa) + "'";
  }
  throw std::runtime_error("FASTRNN_ISA: expected one that this build and this machine have (" +
                           names + "), got '" + wanted + "'");
}

}  // namespace

const KernelTable& dispatch() {
  static const KernelTable& chosen = choose();
  return chosen;
}

std::vector<const KernelTable*> available_kernels() {
  // A table is asked for only after its probe: the function that returns it is itself compiled for
  // the instruction set.
  std::vector<const KernelTable*> tables;
#if defined(FASTRNN_HAVE_AVX512)
  if (has_avx512()) tables.push_back(&avx512::kernel_table());
#endif
#if defined(FASTRNN_HAVE_AVX2)
  if (has_avx2()) tables.push_back(&avx2::kernel_table());
#endif
#if defined(FASTRNN_HAVE_BASELINE)
  tables.push_back(&baseline::kernel_table());
#endif
#if defined(FASTRNN_HAVE_NEON)
  tables.push_back(&neon::kernel_table());
#endif
  return tables;
}

std::string cpu_description() {
  std::string features;
#if defined(__x86_64__) || defined(__i386__)
  const auto add = [&features](const char* name, bool present) {
    if (present) features += (features.empty() ? "" : " ") + std::string(name);
  };
  // The builtin takes a literal only.
  add("sse2", __builtin_cpu_supports("sse2") != 0);
  add("avx", __builtin_cpu_supports("avx") != 0);
  add("avx2", __builtin_cpu_supports("avx2") != 0);
  add("fma", __builtin_cpu_supports("fma") != 0);
  add("avx512f", __builtin_cpu_supports("avx512f") != 0);
  add("avx512dq", __builtin_cpu_supports("avx512dq") != 0);
  add("avx512bw", __builtin_cpu_supports("avx512bw") != 0);
  add("avx512vl", __builtin_cpu_supports("avx512vl") != 0);
#elif defined(__aarch64__)
  features = "neon";
#endif
  return cpu_name() + " (" + features + ")";
}

}  // namespace fastrnn
