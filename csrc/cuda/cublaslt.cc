// cuBLASLt by its own names, types and numbers, as its header cublasLt.h has them since CUDA 11:
// only what is used here. Matrices are column-major there, so c = a b is computed as cᵀ = bᵀ aᵀ.
#include "cuda/cublaslt.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

namespace fastrnn {
namespace cuda {
namespace cublaslt {

namespace {

using Status = int;  // 0: success
using Handle = void*;
using Descriptor = void*;
using MatrixLayout = void*;
using Preference = void*;

constexpr int kCompute32F = 68, kCompute32FFastTf32 = 77;    // cublasComputeType_t
constexpr int kReal32F = 0, kReal16F = 2, kReal16BF = 14;    // cudaDataType_t
constexpr int kTransB = 4, kEpilogue = 7, kBiasPointer = 8;  // …MatmulDescAttributes_t
constexpr uint32_t kEpilogueBias = 4;                        // cublasLtEpilogue_t
constexpr int32_t kOperationT = 1;                           // cublasOperation_t
constexpr int kPreferenceWorkspace = 1;                      // …PreferenceAttributes_t
constexpr uint64_t kWorkspace = uint64_t{32} << 20;          // bytes

struct Algorithm {
  uint64_t data[8];
};
struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};

// The functions of the library.
struct Functions {
  Status (*create)(Handle*);
  Status (*descriptor_create)(Descriptor*, int compute_type, int scale_type);
  Status (*descriptor_destroy)(Descriptor);
  Status (*descriptor_set)(Descriptor, int attribute, const void*, size_t);
  Status (*layout_create)(MatrixLayout*, int type, uint64_t rows, uint64_t cols, int64_t ld);
  Status (*layout_destroy)(MatrixLayout);
  Status (*preference_create)(Preference*);
  Status (*preference_destroy)(Preference);
  Status (*preference_set)(Preference, int attribute, const void*, size_t);
  Status (*heuristic)(Handle, Descriptor, MatrixLayout, MatrixLayout, MatrixLayout, MatrixLayout,
                      Preference, int, HeuristicResult*, int*);
  Status (*matmul)(Handle, Descriptor, const void* alpha, const void* a, MatrixLayout,
                   const void* b, MatrixLayout, const void* beta, const void* c, MatrixLayout,
                   void* d, MatrixLayout, const Algorithm*, void* workspace, size_t, void* stream);
  size_t (*version)();
};

template <class F>
bool find(void* library, const char* name, F& function) {
  void* const symbol = dlsym(library, name);
  std::memcpy(&function, &symbol, sizeof(symbol));  // ISO C++ has no cast between the two
  return symbol != nullptr;
}

bool find_all(void* library, Functions& f) {
  return find(library, "cublasLtCreate", f.create) &&
         find(library, "cublasLtMatmulDescCreate", f.descriptor_create) &&
         find(library, "cublasLtMatmulDescDestroy", f.descriptor_destroy) &&
         find(library, "cublasLtMatmulDescSetAttribute", f.descriptor_set) &&
         find(library, "cublasLtMatrixLayoutCreate", f.layout_create) &&
         find(library, "cublasLtMatrixLayoutDestroy", f.layout_destroy) &&
         find(library, "cublasLtMatmulPreferenceCreate", f.preference_create) &&
         find(library, "cublasLtMatmulPreferenceDestroy", f.preference_destroy) &&
         find(library, "cublasLtMatmulPreferenceSetAttribute", f.preference_set) &&
         find(library, "cublasLtMatmulAlgoGetHeuristic", f.heuristic) &&
         find(library, "cublasLtMatmul", f.matmul) &&
         find(library, "cublasLtGetVersion", f.version);
}

#if defined(FASTRNN_CUDA_EMULATED)
constexpr bool kSearch = false;  // it could not use the emulator's memory
#else
constexpr bool kSearch = true;
#endif

std::string folder_of_this_module() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&description), &info) == 0 || info.dli_fname == nullptr)
    return ".";
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

// Where the library may be, in the order of the search; names without a folder are the system's.
std::vector<std::string> places() {
  std::vector<std::string> found;
  const std::string packages = folder_of_this_module() + "/../nvidia/";
  found.push_back(packages + "cu13/lib/libcublasLt.so.13");
  found.push_back(packages + "cublas/lib/libcublasLt.so.12");
  for (const char* variable : {"CONDA_PREFIX", "CUDA_PATH", "CUDA_HOME"}) {
    const char* const folder = std::getenv(variable);
    if (folder == nullptr || *folder == '\0') continue;
    for (const char* name : {"/lib/libcublasLt.so.13", "/lib64/libcublasLt.so.13",
                             "/lib/libcublasLt.so.12", "/lib64/libcublasLt.so.12"})
      found.push_back(std::string(folder) + name);
  }
  found.push_back("libcublasLt.so.13");
  found.push_back("libcublasLt.so.12");
  return found;
}

struct Library {
  Functions f = {};
  Handle handle = nullptr;
  std::string description;  // where it is, or why there is none
  bool usable = false;
  std::mutex mutex;  // of `algorithms`
  std::map<std::tuple<int64_t, int64_t, int64_t, int, int, bool>, HeuristicResult> algorithms;

  Library() {
    const char* const wanted = std::getenv("FASTRNN_CUBLASLT");
    if (wanted != nullptr && *wanted != '\0') {
      if (std::strcmp(wanted, "0") == 0) {
        description = "not used, since FASTRNN_CUBLASLT is 0";
      } else if (!open(wanted, RTLD_NOW | RTLD_LOCAL)) {
        description = std::string("FASTRNN_CUBLASLT: ") + wanted + " cannot be used";
      }
      return;
    }
    if (!kSearch) {
      description = "not looked for by the emulator";
      return;
    }
    // What PyTorch or another library has loaded already is the best choice: a second copy would
    // take some 500 MB.
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
      if (open(name, RTLD_NOW | RTLD_NOLOAD)) return;
    for (const std::string& place : places())
      if (open(place, RTLD_NOW | RTLD_LOCAL)) return;
    description = "not found; pip install nvidia-cublas brings it";
  }

  bool open(const std::string& place, int flags) {
    void* const library = dlopen(place.c_str(), flags);
    if (library == nullptr) return false;
    if (!find_all(library, f) || f.create(&handle) != 0) {
      dlclose(library);
      return false;
    }
    usable = true;
    description = place + " (version " + std::to_string(f.version()) + ")";
    return true;
  }
};

Library& library() {
  // Never destroyed: at the end of the process the device may be gone before it.
  static Library* const found = new Library;
  return *found;
}

template <class S>
constexpr int kType = kReal32F;
template <>
constexpr int kType<Bfloat16> = kReal16BF;
template <>
constexpr int kType<Float16> = kReal16F;

// Descriptors of one product, destroyed with it.
class Problem {
 public:
  Problem(const Functions& f, int type, int64_t M, int64_t N, int64_t K, bool a_transposed,
          const float* bias)
      : f_(f) {
    // cᵀ (N, M) = bᵀ (N, K) aᵀ (K, M), column-major: bᵀ is b's memory as it is, aᵀ is a's, or its
    // transpose where a itself stands transposed in memory.
    ok_ =
        f.descriptor_create(&descriptor, type == kReal32F ? kCompute32FFastTf32 : kCompute32F,
                            kReal32F) == 0 &&
        f.layout_create(&left, type, static_cast<uint64_t>(N), static_cast<uint64_t>(K), N) == 0 &&
        f.layout_create(&right, type, static_cast<uint64_t>(a_transposed ? M : K),
                        static_cast<uint64_t>(a_transposed ? K : M), a_transposed ? M : K) == 0 &&
        f.layout_create(&out, kReal32F, static_cast<uint64_t>(N), static_cast<uint64_t>(M), N) == 0;
    if (ok_ && a_transposed)
      ok_ = f.descriptor_set(descriptor, kTransB, &kOperationT, sizeof(kOperationT)) == 0;
    if (ok_ && bias != nullptr)
      ok_ = f.descriptor_set(descriptor, kEpilogue, &kEpilogueBias, sizeof(kEpilogueBias)) == 0 &&
            f.descriptor_set(descriptor, kBiasPointer, &bias, sizeof(bias)) == 0;
  }
  ~Problem() {
    if (descriptor != nullptr) f_.descriptor_destroy(descriptor);
    for (MatrixLayout layout : {left, right, out})
      if (layout != nullptr) f_.layout_destroy(layout);
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;
  bool ok() const { return ok_; }

  Descriptor descriptor = nullptr;
  MatrixLayout left = nullptr, right = nullptr, out = nullptr;

 private:
  const Functions& f_;
  bool ok_ = false;
};

// The algorithm for this problem, the same in all calls with its sizes; false if there is none.
bool choose(Library& lt, const Problem& problem,
            const std::tuple<int64_t, int64_t, int64_t, int, int, bool>& key,
            HeuristicResult& chosen) {
  const std::lock_guard<std::mutex> lock(lt.mutex);
  const auto known = lt.algorithms.find(key);
  if (known != lt.algorithms.end()) {
    chosen = known->second;
    return chosen.state == 0;
  }
  Preference preference = nullptr;
  int count = 0;
  chosen = {};
  chosen.state = -1;
  if (lt.f.preference_create(&preference) == 0) {
    HeuristicResult best = {};
    if (lt.f.preference_set(preference, kPreferenceWorkspace, &kWorkspace, sizeof(kWorkspace)) ==
            0 &&
        lt.f.heuristic(lt.handle, problem.descriptor, problem.left, problem.right, problem.out,
                       problem.out, preference, 1, &best, &count) == 0 &&
        count == 1 && best.state == 0)
      chosen = best;
    lt.f.preference_destroy(preference);
  }
  lt.algorithms.emplace(key, chosen);
  return chosen.state == 0;
}

}  // namespace

std::string description() { return library().description; }

template <class S>
bool multiply(Stream stream, int64_t M, int64_t N, int64_t K, const S* a, bool a_transposed,
              const S* b, Start start, const float* bias, float* c) {
  Library& lt = library();
  if (!lt.usable || M == 0 || N == 0 || K == 0) return false;
  const Problem problem(lt.f, kType<S>, M, N, K, a_transposed,
                        start == Start::kBias ? bias : nullptr);
  HeuristicResult chosen;
  if (!problem.ok() ||
      !choose(lt, problem, {M, N, K, kType<S>, static_cast<int>(start), a_transposed}, chosen))
    return false;
  const Memory workspace(chosen.workspace, stream);
  const float one = 1.0f, beta = start == Start::kAccumulate ? 1.0f : 0.0f;
  const Status status = lt.f.matmul(
      lt.handle, problem.descriptor, &one, b, problem.left, a, problem.right, &beta, c, problem.out,
      c, problem.out, &chosen.algorithm, workspace.data(), chosen.workspace, stream.handle);
  if (status != 0)
    throw Error("cuBLASLt: a product of (" + std::to_string(M) + ", " + std::to_string(K) +
                ") and (" + std::to_string(K) + ", " + std::to_string(N) + ") failed with status " +
                std::to_string(status));
  return true;
}

template bool multiply<float>(Stream, int64_t, int64_t, int64_t, const float*, bool, const float*,
                              Start, const float*, float*);
template bool multiply<Bfloat16>(Stream, int64_t, int64_t, int64_t, const Bfloat16*, bool,
                                 const Bfloat16*, Start, const float*, float*);
template bool multiply<Float16>(Stream, int64_t, int64_t, int64_t, const Float16*, bool,
                                const Float16*, Start, const float*, float*);

}  // namespace cublaslt
}  // namespace cuda
}  // namespace fastrnn
