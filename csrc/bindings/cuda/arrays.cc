// fastrnn._cuda.Array: an array in the device's memory.
#include "bindings/cuda/arrays.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "bindings/cuda/exchange.h"

namespace fastrnn {

void register_arrays(py::module_& m);

namespace {

constexpr std::array<const char*, 7> kNames = {"float32", "float64", "float16", "bfloat16",
                                               "int32",   "int64",   "bool"};

int64_t count(const Shape& shape) {
  int64_t n = 1;
  for (const py::ssize_t extent : shape) {
    if (extent < 0) value_mismatch("shape", "extents of at least 0", text(shape));
    if (__builtin_mul_overflow(n, extent, &n)) throw std::bad_alloc();
  }
  if (n > INT64_MAX / 8) throw std::bad_alloc();
  return n;
}

Shape dense_strides(const Shape& shape) {
  Shape strides(shape.size());
  py::ssize_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= shape[i]) strides[i] = stride;
  return strides;
}

DType dtype_named(const std::string& name) {
  for (size_t i = 0; i < kNames.size(); ++i)
    if (name == kNames[i]) return static_cast<DType>(i);
  value_mismatch("dtype", "'float32', 'float64', 'float16', 'bfloat16', 'int32', 'int64' or 'bool'",
                 "'" + name + "'");
}

// The dtype that an argument names: one of kNames, or anything that numpy.dtype takes.
DType dtype_argument(const py::object& dtype) {
  if (py::isinstance<py::str>(dtype)) return dtype_named(py::cast<std::string>(dtype));
  return dtype_named(py::str(py::dtype::from_args(dtype)));
}

// NumPy's dtype for the values of an Array; float32 stands in for bfloat16, which NumPy lacks.
py::dtype host_dtype(DType dtype) {
  return py::dtype(name_of(dtype == DType::kBfloat16 ? DType::kFloat32 : dtype));
}

}  // namespace

const char* name_of(DType dtype) { return kNames[static_cast<size_t>(dtype)]; }

Storage::Storage(int64_t bytes, cuda::Stream stream)
    : memory_(static_cast<size_t>(bytes), stream), made_(stream), stream_(stream) {}

Storage::Storage(std::shared_ptr<void> owner, cuda::Stream stream, bool ordered, bool is_writable)
    : owner_(std::move(owner)),
      made_(stream),
      stream_(stream),
      ordered_(ordered),
      writable_(is_writable) {}

// Memory goes back in the order of the stream it was taken on. Where its owner knows no streams,
// its last work must be done by then.
Storage::~Storage() {
  try {
    if (ordered_) {
      cuda::wait_for(made_, stream_);
    } else {
      cuda::synchronize(stream_);
    }
  } catch (...) {  // the work has failed, or the process ends: nothing waits for it any more
  }
}

void Storage::hand_over(cuda::Stream stream) {
  cuda::wait_for(stream, stream_);
  stream_ = stream;
}

Array::Array(std::shared_ptr<Storage> storage, void* data, DType dtype, Shape shape, Shape strides)
    : storage_(std::move(storage)),
      data_(data),
      dtype_(dtype),
      shape_(std::move(shape)),
      strides_(std::move(strides)),
      size_(count(shape_)) {
  if (shape_.size() > static_cast<size_t>(cuda::kMaxDimensions))
    value_mismatch("shape", "at most " + std::to_string(cuda::kMaxDimensions) + " dimensions",
                   text(shape_));
}

Array Array::empty(const Shape& shape, DType dtype, cuda::Stream stream) {
  auto storage = std::make_shared<Storage>(count(shape) * cuda::size_of(dtype), stream);
  void* const data = storage->data();
  return Array(std::move(storage), data, dtype, shape, dense_strides(shape));
}

Array Array::zeros(const Shape& shape, DType dtype, cuda::Stream stream) {
  Array a = empty(shape, dtype, stream);
  if (a.size() > 0) cuda::fill_bytes(a.data(stream), 0, static_cast<size_t>(a.bytes()), stream);
  return a;
}

bool Array::contiguous() const {
  py::ssize_t expected = 1;
  for (size_t i = shape_.size(); i-- > 0; expected *= shape_[i])
    if (shape_[i] > 1 && strides_[i] != expected) return size_ == 0;
  return true;
}

cuda::View Array::view(cuda::Stream stream) const {
  cuda::View v = {data(stream), dtype_, static_cast<int>(shape_.size()), {}, {}};
  std::copy(shape_.begin(), shape_.end(), v.shape);
  std::copy(strides_.begin(), strides_.end(), v.strides);
  return v;
}

Array Array::reshape(const Shape& shape) const {
  if (!contiguous()) value_mismatch("reshape", "a C-contiguous array", "one that is strided");
  Shape full = shape;
  const auto open = std::find(full.begin(), full.end(), -1);
  if (open != full.end()) {
    *open = 1;
    const int64_t rest = count(full);
    *open = rest > 0 ? size_ / rest : 0;
  }
  if (count(full) != size_)
    value_mismatch("reshape", "a shape of " + std::to_string(size_) + " elements", text(shape));
  return part(data_, full, dense_strides(full));
}

Array Array::slice(size_t axis, py::ssize_t begin, py::ssize_t end) const {
  Shape shape = shape_;
  shape[axis] = end - begin;
  const int64_t offset = begin * strides_[axis] * cuda::size_of(dtype_);
  return part(static_cast<char*>(data_) + offset, shape, strides_);
}

Array Array::part(void* data, const Shape& shape, const Shape& strides) const {
  Array a(storage_, data, dtype_, shape, strides);
  a.is_view_ = true;
  return a;
}

Array Array::copy(DType dtype, cuda::Stream stream) const {
  Array to = empty(shape_, dtype, stream);
  cuda::copy(stream, view(stream), to.view(stream));
  return to;
}

Array Array::dense(cuda::Stream stream) const {
  return contiguous() ? *this : copy(dtype_, stream);
}

std::optional<Array> device_array(const py::handle& value) {
  if (!is_device_array(value)) return std::nullopt;
  return py::cast<Array>(value);
}

bool is_device_array(const py::handle& value) { return py::isinstance<Array>(value); }

DType dtype_of(const std::string& name, const py::array& a) {
  const py::dtype d = a.dtype();
  const char kind = d.kind();
  const py::ssize_t size = d.itemsize();
  if (kind == 'f' && size == 4) return DType::kFloat32;
  if (kind == 'f' && size == 8) return DType::kFloat64;
  if (kind == 'f' && size == 2) return DType::kFloat16;
  if (kind == 'i' && size == 4) return DType::kInt32;
  if (kind == 'i' && size == 8) return DType::kInt64;
  if (kind == 'b') return DType::kBool;
  type_mismatch(name, "an array of float32, float64, float16, int32, int64 or bool", dtype_name(a));
}

Array to_device(const std::string& name, const py::array& a, cuda::Stream stream) {
  const DType dtype = dtype_of(name, a);
  const py::array host = py::array::ensure(
      py::module_::import("numpy").attr("require")(a, host_dtype(dtype), py::make_tuple("C", "A")));
  if (!host) throw py::error_already_set();
  const Array to = Array::empty(shape_of(a), dtype, stream);
  if (to.size() > 0) {
    void* const data = to.data(stream);
    const void* const from = host.data();
    if (!cuda::is_floating(dtype))
      to.storage()->known.assign(static_cast<const char*>(from),
                                 static_cast<const char*>(from) + to.bytes());
    const py::gil_scoped_release unlocked;
    cuda::copy_to_device(data, from, static_cast<size_t>(to.bytes()), stream);
  }
  return to;
}

py::array to_host(const Array& a) {
  const cuda::Stream stream = a.stream();
  const std::vector<char>& known = a.storage()->known;
  if (!known.empty() && known.size() == static_cast<size_t>(a.bytes()) && a.contiguous()) {
    py::array whole(host_dtype(a.dtype()), a.shape());
    std::memcpy(whole.mutable_data(), known.data(), known.size());
    return whole;
  }
  const Array from =
      a.dtype() == DType::kBfloat16 ? a.copy(DType::kFloat32, stream) : a.dense(stream);
  py::array to(host_dtype(a.dtype()), a.shape());
  if (a.size() > 0) {
    const void* const data = from.data(stream);
    void* const host = to.mutable_data();
    const py::gil_scoped_release unlocked;
    cuda::copy_to_host(host, data, static_cast<size_t>(from.bytes()), stream);
  }
  return to;
}

namespace {

// a[key] for ..., begin:end, and tuples of these for the first axes: a view.
Array index(const Array& a, const py::object& key) {
  const py::tuple keys =
      py::isinstance<py::tuple>(key) ? py::reinterpret_borrow<py::tuple>(key) : py::make_tuple(key);
  Array result = a;
  size_t axis = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    const py::object k = keys[i];
    if (k.is(py::ellipsis()) && i + 1 == keys.size()) break;
    if (!py::isinstance<py::slice>(k))
      type_mismatch("index", "begin:end for each of the first axes, or ...", type_name(k));
    if (axis == a.shape().size())
      throw py::index_error("index: expected at most " + std::to_string(a.ndim()) + " axes, got " +
                            std::to_string(keys.size()));
    py::ssize_t begin = 0, end = 0, step = 0, length = 0;
    if (!py::reinterpret_borrow<py::slice>(k).compute(a.shape(axis), &begin, &end, &step, &length))
      throw py::error_already_set();
    if (step != 1) value_mismatch("index", "a step of 1", std::to_string(step));
    result = result.slice(axis++, begin, begin + length);
  }
  return result;
}

// a[key] = value: an Array of the same shape, a number, or what NumPy can broadcast to the shape.
void assign(const Array& a, const py::object& key, const py::object& value) {
  const Array to = index(a, key);
  if (!a.writable()) value_mismatch("array", "a writable one", "a read-only one");
  a.storage()->known.clear();
  const cuda::Stream stream = a.stream();
  if (const std::optional<Array> given = device_array(value)) {
    check_shape("value", *given, to.shape());
    const bool same = given->address() == to.address() && given->strides() == to.strides();
    const bool apart = same || given->storage() != to.storage();  // else by way of a copy
    const Array from = apart ? *given : given->copy(given->dtype(), stream);
    cuda::copy(stream, from.view(stream), to.view(stream));
    return;
  }
  if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())) {
    cuda::fill(stream, to.view(stream), py::cast<double>(value));
    return;
  }
  const py::module_ numpy = py::module_::import("numpy");
  const py::object host = numpy.attr("broadcast_to")(
      numpy.attr("asarray")(value, host_dtype(to.dtype())), py::tuple(py::cast(to.shape())));
  const Array from = to_device("value", py::reinterpret_borrow<py::array>(host), stream);
  cuda::copy(stream, from.view(stream), to.view(stream));
}

Shape shape_argument(const py::args& args) {
  if (args.size() == 1 && !py::isinstance<py::int_>(args[0])) return py::cast<Shape>(args[0]);
  return py::cast<Shape>(py::tuple(args));
}

py::object to_numpy(const Array& a, const py::object& dtype, const py::object& copy) {
  if (py::isinstance<py::bool_>(copy) && !py::cast<bool>(copy))
    value_mismatch("copy", "None or True, since the memory is the device's", "False");
  py::array host = to_host(a);
  if (dtype.is_none()) return std::move(host);
  return host.attr("astype")(dtype, py::arg("copy") = false);
}

// The 1-D array that `arrays` divide among themselves, in order and without gaps, or None.
std::optional<Array> joined(const std::vector<Array>& arrays) {
  if (arrays.empty()) return std::nullopt;
  const Array& first = arrays.front();
  const char* next = static_cast<const char*>(first.address());
  int64_t size = 0;
  for (const Array& a : arrays) {
    const bool follows = a.size() == 0 || a.address() == next;
    if (a.storage() != first.storage() || a.dtype() != first.dtype() || !a.contiguous() || !follows)
      return std::nullopt;
    next += a.bytes();
    size += a.size();
  }
  return Array(first.storage(), first.address(), first.dtype(), {size}, {1});
}

std::string repr(const Array& a) {
  return "DeviceArray(shape=" + text(a.shape()) + ", dtype=" + name_of(a.dtype()) + ")";
}

}  // namespace

void register_arrays(py::module_& m) {
  using py::literals::operator""_a;
  py::class_<Array> type(m, "Array", py::module_local(),
                         "An array in the device's memory: fastrnn.DeviceArray.\n\n"
                         "Slices and reshaped arrays are views. Any library with DLPack or\n"
                         "__cuda_array_interface__ takes it without a copy.");
  type.def_static(
          "from_numpy",
          [](const py::object& x, const std::string& name) {
            return to_device(name, as_array(name, x), cuda::own_stream());
          },
          "x"_a, "name"_a = "x", "A copy on the device.")
      .def_static(
          "zeros",
          [](const Shape& shape, const py::object& dtype) {
            return Array::zeros(shape, dtype_argument(dtype), cuda::own_stream());
          },
          "shape"_a, "dtype"_a)
      .def_static(
          "empty",
          [](const Shape& shape, const py::object& dtype) {
            return Array::empty(shape, dtype_argument(dtype), cuda::own_stream());
          },
          "shape"_a, "dtype"_a, "Uninitialised.")
      .def_static("joined", &joined, "arrays"_a,
                  "The 1-D array that `arrays` divide among themselves, in order; or None.")
      .def_property_readonly("shape", [](const Array& a) { return py::tuple(py::cast(a.shape())); })
      .def_property_readonly("dtype", [](const Array& a) { return name_of(a.dtype()); })
      .def_property_readonly("ndim", &Array::ndim)
      .def_property_readonly("size", &Array::size)
      .def_property_readonly("nbytes", &Array::bytes)
      .def_property_readonly("device", [](const Array&) { return "cuda"; })
      .def_property_readonly("contiguous", &Array::contiguous)
      .def_property_readonly("writable", &Array::writable)
      .def_property_readonly("is_view", &Array::is_view, "Whether it lies in a larger array.")
      .def_property_readonly(
          "stream", [](const Array& a) { return reinterpret_cast<uintptr_t>(a.stream().handle); },
          "The address of the stream that used the memory last.")
      .def("__len__",
           [](const Array& a) {
             if (a.ndim() == 0) throw py::type_error("len() of an array without axes");
             return a.shape(0);
           })
      .def("__repr__", &repr)
      .def("__getitem__", &index, "key"_a)
      .def("__setitem__", &assign, "key"_a, "value"_a)
      .def("reshape",
           [](const Array& a, const py::args& shape) { return a.reshape(shape_argument(shape)); })
      .def(
          "copy", [](const Array& a) { return a.copy(a.dtype(), a.stream()); },
          "The same values in C-contiguous memory of its own.")
      .def(
          "astype",
          [](const Array& a, const py::object& dtype) {
            return a.copy(dtype_argument(dtype), a.stream());
          },
          "dtype"_a, "A copy in another dtype.")
      .def(
          "numpy", [](const Array& a) -> py::object { return to_host(a); },
          "A copy as a NumPy array; bfloat16 becomes float32.")
      .def("__array__", &to_numpy, "dtype"_a = py::none(), "copy"_a = py::none())
      .def("__copy__", [](const Array& a) { return a.copy(a.dtype(), a.stream()); })
      .def(
          "__deepcopy__",
          [](const Array& a, const py::dict&) { return a.copy(a.dtype(), a.stream()); }, "memo"_a);
  type.def_static(
          "import_",
          [](const py::object& x, uintptr_t stream, const std::string& name) {
            return import_array(name, x, stream_of(stream), stream != 0);
          },
          "x"_a, "stream"_a = 0, "name"_a = "x",
          "The memory of another library's array, without a copy, for work on `stream`.")
      .def("__dlpack__", &export_dlpack, py::kw_only(), "stream"_a = py::none(),
           "max_version"_a = py::none(), "dl_device"_a = py::none(), "copy"_a = py::none())
      .def("__dlpack_device__", [](const Array&) { return py::make_tuple(kDlCuda, 0); })
      .def_property_readonly("__cuda_array_interface__", &export_interface);
}

}  // namespace fastrnn
