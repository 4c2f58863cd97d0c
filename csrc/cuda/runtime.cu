// cuda/runtime.h and the launches of cuda/simt_device.h by CUDA's runtime, which is linked
// statically: a program that never uses a device needs neither it nor a driver.
//
// fastrnn uses device 0. The functions here make it the current one and put back what was current
// before, since other libraries in the process may be in the middle of work on another.
#include "cuda/runtime.h"

#include <cuda_runtime.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <mutex>
#include <new>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/simt.h"

namespace fastrnn {
namespace cuda {
namespace {

constexpr int kDevice = 0;
constexpr int kOldestCapability = 80;       // 10 * major + minor that there is code for
constexpr size_t kPlainShared = 48 * 1024;  // a block gets without asking for more
constexpr int kLargestPortableCluster = 8;

std::string describe(cudaError_t status) {
  return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

// CUDA's 12040 as "12.4".
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Throws if the call failed. The runtime also keeps the status for cudaGetLastError; taken from
// there, it cannot be mistaken for the failure of a later call, ours or another library's.
void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw Error(std::string(what) + ": " + describe(status));
}

// Makes our device the current one of this thread, for as long as it lives.
class OnDevice {
 public:
  OnDevice() {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != kDevice) check(cudaSetDevice(kDevice), "cudaSetDevice");
  }
  ~OnDevice() {
    if (before_ != kDevice) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = kDevice;
};

// Of the process. Never destroyed: device memory may be given back by static objects, and CUDA
// itself cannot be relied on while the process ends.
struct Process {
  std::atomic<pid_t> owner{0};  // who has used the device; 0: nobody yet
  std::mutex mutex;             // of what follows, where it changes after the first use
  cudaMemPool_t pool = nullptr;
  cudaDeviceProp properties;
  std::string driver;  // its version
  cudaStream_t keeper = nullptr;
  std::vector<cudaStream_t> free_streams;  // own_stream's, of threads that have ended
  std::vector<cudaEvent_t> free_events;
  std::set<std::pair<const void*, cudaFuncAttribute>>
      raised;  // limits of kernels, as far as it goes
};
Process& process() {
  static Process* const state = new Process;
  return *state;
}

void unavailable_unless(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw Unavailable(std::string("CUDA cannot be used: ") + what + ": " + describe(status));
}

// Throws Unavailable unless there is a driver, new enough, and a device. The driver's version.
std::string find_device() {
  constexpr int kNeeded =
      CUDART_VERSION / 1000 * 1000;  // later drivers of one major version will do
  int driver = 0, devices = 0;
  unavailable_unless(cudaDriverGetVersion(&driver), "asking for the driver's version");
  if (driver == 0) throw Unavailable("no NVIDIA driver (libcuda.so.1) was found");
  const std::string driver_text = "CUDA " + version_text(driver);
  if (driver < kNeeded) {
    throw Unavailable("the NVIDIA driver is too old: it is for " + driver_text +
                      ", fastrnn needs one for " + version_text(kNeeded) + " or later");
  }
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaErrorNoDevice || (status == cudaSuccess && devices == 0)) {
    cudaGetLastError();
    throw Unavailable("no device: the NVIDIA driver (" + driver_text +
                      ") finds no GPU that this process may use");
  }
  unavailable_unless(status, "counting the devices");
  return version_text(driver);
}

// A pool of our own: what is given back to it stays for the next to ask, whatever other users of
// the device's default pool prefer.
cudaMemPool_t make_pool() {
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = kDevice;
  cudaMemPool_t pool = nullptr;
  unavailable_unless(cudaMemPoolCreate(&pool, &properties), "making a memory pool");
  uint64_t threshold = std::numeric_limits<uint64_t>::max();
  unavailable_unless(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &threshold),
                     "setting up the memory pool");
  return pool;
}

void open_device(Process& state) {
  state.driver = find_device();
  unavailable_unless(cudaGetDeviceProperties(&state.properties, kDevice), "looking at the device");
  const int major = state.properties.major, minor = state.properties.minor;
  if (10 * major + minor < kOldestCapability) {
    throw Unavailable(std::string(state.properties.name) + " has compute capability " +
                      std::to_string(major) + "." + std::to_string(minor) +
                      ", fastrnn needs 8.0 or later");
  }
  const OnDevice on_device;
  if (state.keeper == nullptr)
    unavailable_unless(cudaStreamCreateWithFlags(&state.keeper, cudaStreamNonBlocking),
                       "making a stream");
  state.pool = make_pool();
}

bool is_forked_child() {
  const pid_t owner = process().owner.load(std::memory_order_acquire);
  return owner != 0 && owner != getpid();
}

cudaStream_t raw(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

// CUDA would record memory as part of the graph, and cannot record what the host waits for.
void refuse_while_recording(Stream stream, const char* what) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(raw(stream), &status), what);
  if (status != cudaStreamCaptureStatusNone) {
    throw Error(std::string(what) + ": not on a stream that is being recorded");
  }
}

}  // namespace

void require_device() {
  Process& state = process();
  const pid_t self = getpid();
  if (state.owner.load(std::memory_order_acquire) == self) return;
  if (is_forked_child()) {
    throw Unavailable(
        "CUDA cannot be used in a process forked from one that has used it; start processes with "
        "'spawn'");
  }
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (state.owner.load(std::memory_order_acquire) == self) return;
  open_device(state);
  state.owner.store(self, std::memory_order_release);
}

DeviceInfo device_info() {
  require_device();
  const cudaDeviceProp& properties = process().properties;
  DeviceInfo info;
  info.name = properties.name;
  info.major = properties.major;
  info.minor = properties.minor;
  info.multiprocessors = properties.multiProcessorCount;
  info.shared_per_block = properties.sharedMemPerBlockOptin;
  info.registers_per_multiprocessor = properties.regsPerMultiprocessor;
  info.memory = properties.totalGlobalMem;
  info.l2_bytes = static_cast<size_t>(properties.l2CacheSize);
  info.driver = process().driver;
  info.runtime = version_text(CUDART_VERSION);
  return info;
}

size_t free_memory() {
  require_device();
  const OnDevice on_device;
  size_t free = 0, all = 0;
  check(cudaMemGetInfo(&free, &all), "cudaMemGetInfo");
  uint64_t reserved = 0, used = 0;  // what the pool keeps is free, too
  check(cudaMemPoolGetAttribute(process().pool, cudaMemPoolAttrReservedMemCurrent, &reserved),
        "cudaMemPoolGetAttribute");
  check(cudaMemPoolGetAttribute(process().pool, cudaMemPoolAttrUsedMemCurrent, &used),
        "cudaMemPoolGetAttribute");
  return free + reserved - used;
}

// ---------------------------------------------------------------------------------------------------
// Streams
// ---------------------------------------------------------------------------------------------------

namespace {

// A thread's stream. It outlives the thread, since memory that was taken on it may, and goes to the
// next thread that asks for one.
class OwnStream {
 public:
  ~OwnStream() {
    if (stream_ == nullptr || is_forked_child()) return;
    const std::lock_guard<std::mutex> lock(process().mutex);
    process().free_streams.push_back(stream_);
  }
  cudaStream_t get() {
    if (stream_ != nullptr) return stream_;
    {
      const std::lock_guard<std::mutex> lock(process().mutex);
      std::vector<cudaStream_t>& streams = process().free_streams;
      if (!streams.empty()) {
        stream_ = streams.back();
        streams.pop_back();
        return stream_;
      }
    }
    const OnDevice on_device;
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    return stream_;
  }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace

Stream own_stream() {
  static thread_local OwnStream stream;
  require_device();
  return {stream.get()};
}

void synchronize(Stream stream) {
  require_device();
  const OnDevice on_device;
  refuse_while_recording(stream, "synchronize");
  check(cudaStreamSynchronize(raw(stream)), "synchronize");
}

Stream keeper() {
  require_device();
  return {process().keeper};
}

// ---------------------------------------------------------------------------------------------------
// Events
// ---------------------------------------------------------------------------------------------------

namespace {

// One that nobody waits at any more may be recorded anew at once: who was told to wait for it waits
// for what it stood for then.
cudaEvent_t take_event() {
  {
    const std::lock_guard<std::mutex> lock(process().mutex);
    std::vector<cudaEvent_t>& events = process().free_events;
    if (!events.empty()) {
      const cudaEvent_t event = events.back();
      events.pop_back();
      return event;
    }
  }
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return event;
}

void give_event_back(void* event) noexcept {
  if (event == nullptr || is_forked_child()) return;
  try {
    const std::lock_guard<std::mutex> lock(process().mutex);
    process().free_events.push_back(static_cast<cudaEvent_t>(event));
  } catch (const std::bad_alloc&) {  // one event less
  }
}

}  // namespace

Event::Event(Stream stream) {
  require_device();
  const OnDevice on_device;
  refuse_while_recording(stream, "Event");
  const cudaEvent_t event = take_event();
  const cudaError_t status = cudaEventRecord(event, raw(stream));
  if (status != cudaSuccess) give_event_back(event);
  check(status, "cudaEventRecord");
  handle_ = event;
}

Event::~Event() { give_event_back(handle_); }

bool Event::reached() {
  if (handle_ == nullptr) return true;
  const OnDevice on_device;
  const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(handle_));
  if (status == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  check(status, "cudaEventQuery");
  give_event_back(handle_);
  handle_ = nullptr;
  return true;
}

void Event::wait(Stream stream) {
  require_device();
  const OnDevice on_device;
  refuse_while_recording(stream, "wait");
  if (reached()) return;
  check(cudaStreamWaitEvent(raw(stream), static_cast<cudaEvent_t>(handle_), 0),
        "cudaStreamWaitEvent");
}

// ---------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------

Memory::Memory(size_t bytes, Stream stream) : stream_(stream) {
  require_device();
  const OnDevice on_device;
  refuse_while_recording(stream, "taking memory");
  if (bytes == 0) return;
  const cudaMemPool_t pool = process().pool;
  const auto take = [&] { return cudaMallocFromPoolAsync(&data_, bytes, pool, raw(stream)); };
  cudaError_t status = take();
  if (status == cudaErrorMemoryAllocation) {
    // The pool may hold enough in pieces that are too small: give them back to the device.
    cudaGetLastError();
    check(cudaStreamSynchronize(raw(stream)), "waiting for memory");
    check(cudaMemPoolTrimTo(pool, 0), "cudaMemPoolTrimTo");
    status = take();
  }
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    data_ = nullptr;
    throw std::bad_alloc();
  }
  check(status, "taking memory");
  bytes_ = bytes;
}

// What fails here cannot be helped: the process is ending, or the device has failed, which the next
// call reports.
Memory::~Memory() {
  if (data_ == nullptr || is_forked_child()) return;
  try {
    const OnDevice on_device;
    check(cudaFreeAsync(data_, raw(stream_)), "cudaFreeAsync");
  } catch (const Error&) {
  }
}

namespace {

// Bytes that come with a launch, as its argument.
struct Parcel {
  static constexpr size_t kMost = 2048;
  unsigned char* to;
  unsigned char bytes[kMost];
  FASTRNN_HD void operator()(int64_t i) const { to[i] = bytes[i]; }
};

}  // namespace

void copy_to_device(void* to, const void* from, size_t bytes, Stream stream) {
  require_device();
  const OnDevice on_device;
  refuse_while_recording(stream, "copy_to_device");
  if (bytes <= kSmallCopy) {
    for (size_t done = 0; done < bytes; done += Parcel::kMost) {
      const size_t n = std::min(bytes - done, Parcel::kMost);
      Parcel parcel;
      parcel.to = static_cast<unsigned char*>(to) + done;
      memcpy(parcel.bytes, static_cast<const unsigned char*>(from) + done, n);
      for_each(stream, static_cast<int64_t>(n), parcel);
    }
    return;
  }
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, raw(stream)), "copy_to_device");
  check(cudaStreamSynchronize(raw(stream)), "copy_to_device");  // `from` may be pinned memory
}

void copy_to_host(void* to, const void* from, size_t bytes, Stream stream) {
  require_device();
  const OnDevice on_device;
  refuse_while_recording(stream, "copy_to_host");
  if (bytes == 0) return;
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, raw(stream)), "copy_to_host");
  check(cudaStreamSynchronize(raw(stream)), "copy_to_host");
}

void copy_on_device(void* to, const void* from, size_t bytes, Stream stream) {
  require_device();
  const OnDevice on_device;
  if (bytes == 0) return;
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, raw(stream)), "copy_on_device");
}

void fill_bytes(void* to, int byte, size_t bytes, Stream stream) {
  require_device();
  const OnDevice on_device;
  if (bytes == 0) return;
  check(cudaMemsetAsync(to, byte, bytes, raw(stream)), "fill_bytes");
}

// ---------------------------------------------------------------------------------------------------
// Graphs
// ---------------------------------------------------------------------------------------------------

namespace {

// A stream for one recording; ends the recording whatever happens, or the thread's calls would be
// refused from then on.
class Recorder {
 public:
  Recorder() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    // Relaxed: what this or other threads do meanwhile on other streams is their business.
    const cudaError_t status = cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed);
    if (status != cudaSuccess) {
      cudaStreamDestroy(stream_);
      check(status, "cudaStreamBeginCapture");
    }
    recording_ = true;
  }
  ~Recorder() {
    if (recording_) cudaStreamEndCapture(stream_, &graph_);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
    cudaStreamDestroy(stream_);
    cudaGetLastError();
  }
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  cudaStream_t stream() const { return stream_; }
  cudaGraphExec_t finish() {
    recording_ = false;
    check(cudaStreamEndCapture(stream_, &graph_), "cudaStreamEndCapture");
    cudaGraphExec_t executable = nullptr;
    check(cudaGraphInstantiate(&executable, graph_, 0), "cudaGraphInstantiate");
    return executable;
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  bool recording_ = false;
};

}  // namespace

Graph Graph::record(const std::function<void(Stream)>& work) {
  require_device();
  const OnDevice on_device;
  Recorder recorder;
  work(Stream{recorder.stream()});
  Graph graph;
  graph.handle_ = recorder.finish();
  return graph;
}

// CUDA keeps what a replay that still runs needs.
Graph::~Graph() {
  if (handle_ == nullptr || is_forked_child()) return;
  try {
    const OnDevice on_device;
    check(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(handle_)), "cudaGraphExecDestroy");
  } catch (const Error&) {
  }
}

void Graph::replay(Stream stream) const {
  if (handle_ == nullptr) throw Error("replay of a Graph that was not recorded");
  require_device();
  const OnDevice on_device;
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(handle_), raw(stream)), "cudaGraphLaunch");
}

// ---------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------

namespace {

// Raises a limit of the kernel, once: to the most there is, so that launches of other threads,
// which may need more or less, do not matter.
void raise(const void* kernel, cudaFuncAttribute attribute) {
  Process& state = process();
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (state.raised.count({kernel, attribute}) != 0) return;
  int value = 1;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    value = static_cast<int>(state.properties.sharedMemPerBlockOptin - attributes.sharedSizeBytes);
  }
  check(cudaFuncSetAttribute(kernel, attribute, value), "cudaFuncSetAttribute");
  state.raised.insert({kernel, attribute});
}

void raise_limits(const void* kernel, size_t shared, int cluster) {
  if (shared > kPlainShared) raise(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize);
  if (cluster > kLargestPortableCluster) {
    raise(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed);
  }
}

// A Launch as CUDA wants it. Not to be copied: the configuration points to the attributes.
struct Configuration {
  Configuration(Stream stream, const Launch& how) {
    config.gridDim = dim3(how.grid.x, how.grid.y, how.grid.z);
    config.blockDim = dim3(static_cast<unsigned>(how.block));
    config.dynamicSmemBytes = how.shared;
    config.stream = raw(stream);
    config.attrs = attributes;
    if (how.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(how.cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (how.cooperative) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;

  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};
};

}  // namespace

namespace detail {

void launch(Stream stream, const Launch& how, const void* kernel, void** arguments) {
  require_device();
  const OnDevice on_device;
  raise_limits(kernel, how.shared, how.cluster);
  const Configuration configuration(stream, how);
  check(cudaLaunchKernelExC(&configuration.config, kernel, arguments), "launch");
}

int resident_blocks(const void* kernel, int block, size_t shared) {
  require_device();
  const OnDevice on_device;
  if (shared > process().properties.sharedMemPerBlockOptin) return 0;
  raise_limits(kernel, shared, 1);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, block, shared),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks;
}

int resident_clusters(const void* kernel, const Launch& how) {
  require_device();
  const OnDevice on_device;
  raise_limits(kernel, how.shared, how.cluster);
  const Configuration configuration(Stream(), how);
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration.config),
        "cudaOccupancyMaxActiveClusters");
  return clusters;
}

}  // namespace detail
}  // namespace cuda
}  // namespace fastrnn
