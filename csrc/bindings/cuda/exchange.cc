// DLPack (dmlc.github.io/dlpack, versions 0.x and 1.x) and the CUDA array interface, version 3.
#include "bindings/cuda/exchange.h"

#include <cstring>

namespace fastrnn {
namespace {

// DLPack's types, as its header lays them out in memory.
struct DlDevice {
  int32_t type, id;
};
struct DlDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: C-contiguous
  uint64_t byte_offset;
};
struct DlManaged {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManaged*);
};
struct DlVersion {
  uint32_t major, minor;
};
struct DlVersioned {
  DlVersion version;
  void* context;
  void (*deleter)(DlVersioned*);
  uint64_t flags;
  DlTensor tensor;
};
constexpr uint64_t kReadOnly = 1, kIsCopied = 2;

template <class Managed>
constexpr const char* kFresh = "dltensor";
template <>
constexpr const char* kFresh<DlVersioned> = "dltensor_versioned";
template <class Managed>
constexpr const char* kUsed = "used_dltensor";
template <>
constexpr const char* kUsed<DlVersioned> = "used_dltensor_versioned";

struct TypeCode {
  DType dtype;
  uint8_t code, bits;   // DLPack's: 0 signed, 2 float, 4 bfloat, 6 bool
  const char* typestr;  // NumPy's; null: it has none
};
constexpr TypeCode kTypes[] = {
    {DType::kFloat32, 2, 32, "<f4"}, {DType::kFloat64, 2, 64, "<f8"},
    {DType::kFloat16, 2, 16, "<f2"}, {DType::kBfloat16, 4, 16, nullptr},
    {DType::kInt32, 0, 32, "<i4"},   {DType::kInt64, 0, 64, "<i8"},
    {DType::kBool, 6, 8, "|b1"},
};
constexpr const char* kExpectedType =
    "an array of float32, float64, float16, bfloat16, int32, int64 or bool";

const TypeCode& code_of(DType dtype) { return kTypes[static_cast<size_t>(dtype)]; }

[[noreturn]] void buffer_error(const std::string& message) {
  PyErr_SetString(PyExc_BufferError, message.c_str());
  throw py::error_already_set();
}

// A stream as other libraries are told of it: the default one is 1.
uintptr_t public_address(cuda::Stream stream) {
  return stream.handle == nullptr ? 1 : reinterpret_cast<uintptr_t>(stream.handle);
}

void check_alignment(const std::string& name, const void* data, DType dtype) {
  if (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(cuda::size_of(dtype)) != 0)
    value_mismatch(name, "memory aligned to its elements", "an array that is misaligned");
}

// Import.

Array from_tensor(const std::string& name, const DlTensor& t, std::shared_ptr<void> owner,
                  cuda::Stream stream, bool ordered, bool writable) {
  if (t.device.type != kDlCuda || t.device.id != 0)
    value_mismatch(name, "an array on CUDA device 0",
                   "one on DLPack device (" + std::to_string(t.device.type) + ", " +
                       std::to_string(t.device.id) + ")");
  for (const TypeCode& type : kTypes) {
    if (t.dtype.code != type.code || t.dtype.bits != type.bits || t.dtype.lanes != 1) continue;
    const Shape shape(t.shape, t.shape + t.ndim);
    Shape strides(shape.size());
    py::ssize_t dense = 1;
    for (size_t i = shape.size(); i-- > 0; dense *= shape[i])
      strides[i] = t.strides == nullptr ? dense : t.strides[i];
    char* const data = static_cast<char*>(t.data) + t.byte_offset;
    check_alignment(name, data, type.dtype);
    return Array(std::make_shared<Storage>(std::move(owner), stream, ordered, writable), data,
                 type.dtype, shape, strides);
  }
  type_mismatch(name, kExpectedType,
                "DLPack's type code " + std::to_string(t.dtype.code) + " of " +
                    std::to_string(t.dtype.bits) + " bits");
}

// The capsule's content, which is ours from here on: freed with the last array that lies in it.
template <class Managed>
std::shared_ptr<Managed> take(const py::object& capsule) {
  auto* const managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), kFresh<Managed>));
  if (managed == nullptr || PyCapsule_SetName(capsule.ptr(), kUsed<Managed>) != 0)
    throw py::error_already_set();
  return std::shared_ptr<Managed>(managed, [](Managed* m) {
    if (m->deleter != nullptr) m->deleter(m);
  });
}

Array import_dlpack(const std::string& name, const py::object& x, cuda::Stream stream,
                    bool ordered) {
  using py::literals::operator""_a;
  const py::object producer = x.attr("__dlpack__"), address = py::int_(public_address(stream));
  py::object capsule;
  try {
    capsule = producer("stream"_a = address, "max_version"_a = py::make_tuple(1, 0));
  } catch (const py::error_already_set& error) {  // from before version 1
    if (!error.matches(PyExc_TypeError)) throw;
    capsule = producer("stream"_a = address);
  }
  if (PyCapsule_IsValid(capsule.ptr(), kFresh<DlManaged>)) {
    const std::shared_ptr<DlManaged> managed = take<DlManaged>(capsule);
    return from_tensor(name, managed->tensor, managed, stream, ordered, true);
  }
  if (!PyCapsule_IsValid(capsule.ptr(), kFresh<DlVersioned>))
    type_mismatch(name, "a DLPack capsule that was not used yet", std::string(py::repr(capsule)));
  const std::shared_ptr<DlVersioned> managed = take<DlVersioned>(capsule);
  if (managed->version.major != 1)
    buffer_error(name + ": expected DLPack version 1, got " +
                 std::to_string(managed->version.major));
  return from_tensor(name, managed->tensor, managed, stream, ordered,
                     (managed->flags & kReadOnly) == 0);
}

// Keeps a Python object alive for owners that may end without the interpreter's lock.
std::shared_ptr<void> keep(const py::object& object) {
  return std::shared_ptr<void>(py::object(object).release().ptr(), [](void* p) {
    if (!Py_IsInitialized()) return;
    const py::gil_scoped_acquire locked;
    Py_DECREF(static_cast<PyObject*>(p));
  });
}

Array import_interface(const std::string& name, const py::object& x, cuda::Stream stream,
                       bool ordered) {
  const py::dict d = x.attr("__cuda_array_interface__");
  if (d.contains("mask") && !d["mask"].is_none())
    value_mismatch(name, "an array without a mask", "one with a mask");
  const std::string typestr = py::cast<std::string>(d["typestr"]);
  for (const TypeCode& type : kTypes) {
    if (type.typestr == nullptr || typestr != type.typestr) continue;
    const Shape shape = py::cast<Shape>(d["shape"]);
    const py::tuple data = d["data"];
    void* const address = reinterpret_cast<void*>(py::cast<uintptr_t>(data[0]));
    check_alignment(name, address, type.dtype);
    Shape strides(shape.size());
    const bool dense = !d.contains("strides") || d["strides"].is_none();
    if (!dense) strides = py::cast<Shape>(d["strides"]);
    if (strides.size() != shape.size())
      value_mismatch(name, "as many strides as axes", text(strides));
    const auto element = static_cast<py::ssize_t>(cuda::size_of(type.dtype));
    py::ssize_t next = 1;
    for (size_t i = shape.size(); i-- > 0; next *= shape[i]) {
      if (!dense && strides[i] % element != 0)
        value_mismatch(name, "strides that are multiples of the element", text(strides));
      strides[i] = dense ? next : strides[i] / element;
    }
    // The producer's stream may still be writing; without one it is done.
    if (d.contains("stream") && !d["stream"].is_none()) {
      const auto producer = py::cast<uintptr_t>(d["stream"]);
      if (producer == 0) value_mismatch(name, "a stream by its address, 1 or 2", "stream 0");
      if (producer != public_address(stream)) cuda::wait_for(stream, stream_of(producer));
    }
    auto storage = std::make_shared<Storage>(keep(x), stream, ordered, !py::cast<bool>(data[1]));
    return Array(std::move(storage), address, type.dtype, shape, strides);
  }
  type_mismatch(name, kExpectedType, "typestr " + typestr);
}

}  // namespace

Array import_array(const std::string& name, const py::object& x, cuda::Stream stream,
                   bool ordered) {
  if (is_device_array(x)) return py::cast<Array>(x);
  if (py::hasattr(x, "__dlpack__") && py::hasattr(x, "__dlpack_device__")) {
    const py::tuple device = x.attr("__dlpack_device__")();
    if (py::int_(device[0]).equal(py::int_(kDlCuda)) && py::int_(device[1]).equal(py::int_(0)))
      return import_dlpack(name, x, stream, ordered);
    value_mismatch(name, "an array on CUDA device 0",
                   "one on DLPack device " + std::string(py::repr(device)));
  }
  if (py::hasattr(x, "__cuda_array_interface__")) return import_interface(name, x, stream, ordered);
  type_mismatch(name, "an array on a CUDA device", type_name(x));
}

namespace {

// Export: what a capsule holds, until its consumer is done with it.
template <class Managed>
struct Exported {
  explicit Exported(const Array& a) : array(a), shape(a.shape()), strides(a.strides()) {}
  Array array;
  std::vector<int64_t> shape, strides;
  Managed managed = {};
};

// May be called from any thread, without the interpreter's lock.
template <class Managed>
void delete_exported(Managed* managed) {
  if (!Py_IsInitialized()) return;  // nobody waits for the memory any more
  const py::gil_scoped_acquire locked;
  delete static_cast<Exported<Managed>*>(managed->context);
}

// A capsule that nobody has taken is freed with its content.
template <class Managed>
void free_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, kFresh<Managed>)) return;
  auto* const managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, kFresh<Managed>));
  managed->deleter(managed);
}

template <class Managed>
py::object capsule_of(const Array& a, bool copied) {
  auto exported = std::make_unique<Exported<Managed>>(a);
  Managed& m = exported->managed;
  const TypeCode& type = code_of(a.dtype());
  m.tensor = {a.address(),
              {kDlCuda, 0},
              static_cast<int32_t>(a.ndim()),
              {type.code, type.bits, 1},
              exported->shape.data(),
              exported->strides.data(),
              0};
  m.context = exported.get();
  m.deleter = delete_exported<Managed>;
  if constexpr (std::is_same<Managed, DlVersioned>::value) {
    m.version = {1, 0};
    m.flags = (a.writable() ? 0 : kReadOnly) | (copied ? kIsCopied : 0);
  }
  PyObject* const capsule = PyCapsule_New(&m, kFresh<Managed>, free_capsule<Managed>);
  if (capsule == nullptr) throw py::error_already_set();
  exported.release();
  return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace

py::object export_dlpack(const Array& a, const py::object& stream, const py::object& max_version,
                         const py::object& dl_device, const py::object& copy) {
  if (!dl_device.is_none() && !dl_device.equal(py::make_tuple(kDlCuda, 0)))
    buffer_error("dl_device: expected None or (2, 0), got " + std::string(py::repr(dl_device)) +
                 "; array.numpy() copies to the host");
  const bool copied = !copy.is_none() && py::cast<bool>(copy);
  const Array array = copied ? a.copy(a.dtype(), a.stream()) : a;
  // Ready for work on the consumer's stream: -1 is for those who wait themselves.
  const int64_t address = stream.is_none() ? 1 : py::cast<int64_t>(stream);
  if (address == 0 || address < -1)
    value_mismatch("stream", "None, -1, 1, 2 or the address of a stream", std::to_string(address));
  if (address != -1) array.storage()->hand_over(stream_of(static_cast<uintptr_t>(address)));
  array.storage()->known.clear();
  const bool versioned =
      !max_version.is_none() && py::cast<int64_t>(py::tuple(max_version)[0]) >= 1;
  if (versioned) return capsule_of<DlVersioned>(array, copied);
  if (!array.writable())
    buffer_error("max_version: expected (1, 0) or above for a read-only array, got " +
                 std::string(py::repr(max_version)));
  return capsule_of<DlManaged>(array, copied);
}

py::dict export_interface(const Array& a) {
  const TypeCode& type = code_of(a.dtype());
  a.storage()->known.clear();
  if (type.typestr == nullptr)
    throw py::attribute_error("__cuda_array_interface__ has no bfloat16; use DLPack");
  py::dict d;
  d["shape"] = py::tuple(py::cast(a.shape()));
  d["typestr"] = type.typestr;
  d["data"] =
      py::make_tuple(a.size() > 0 ? reinterpret_cast<uintptr_t>(a.address()) : 0, !a.writable());
  d["version"] = 3;
  d["stream"] = public_address(a.stream());
  d["strides"] = py::none();
  if (!a.contiguous()) {
    Shape strides = a.strides();
    for (py::ssize_t& stride : strides) stride *= cuda::size_of(a.dtype());
    d["strides"] = py::tuple(py::cast(strides));
  }
  return d;
}

}  // namespace fastrnn
