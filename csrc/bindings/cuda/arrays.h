// Arrays on the device as the bindings see them: fastrnn._cuda.Array, what a caller may pass in its
// place, and the way to and from NumPy.
//
// Streams. Memory knows the stream that used it last. Asking for a pointer names the stream that is
// about to use it: where that is another one, it first waits for the work of the last, on the
// device. So arrays may go from stream to stream and from library to library, and the host does not
// wait.
#ifndef FASTRNN_BINDINGS_CUDA_ARRAYS_H_
#define FASTRNN_BINDINGS_CUDA_ARRAYS_H_

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "cuda/elementwise.h"
#include "cuda/half.h"
#include "cuda/runtime.h"

namespace fastrnn {

using cuda::DType;

template <class T>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
constexpr DType kDTypeOf<double> = DType::kFloat64;
template <>
constexpr DType kDTypeOf<cuda::Float16> = DType::kFloat16;
template <>
constexpr DType kDTypeOf<cuda::Bfloat16> = DType::kBfloat16;
template <>
constexpr DType kDTypeOf<int32_t> = DType::kInt32;
template <>
constexpr DType kDTypeOf<int64_t> = DType::kInt64;
template <>
constexpr DType kDTypeOf<bool> = DType::kBool;

const char* name_of(DType dtype);  // "float32", ...

// A block of device memory, its own or somebody else's, shared by the arrays that lie in it.
class Storage {
 public:
  // Memory of its own, uninitialised.
  Storage(int64_t bytes, cuda::Stream stream);
  // Somebody else's, which lives as long as `owner`; what was launched on `stream` writes it. With
  // `ordered` the owner reuses the memory in the order of that stream; else work must be done by
  // then.
  Storage(std::shared_ptr<void> owner, cuda::Stream stream, bool ordered, bool writable);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  cuda::Stream stream() const { return stream_; }
  // From here on used on `stream`, after the work of the stream that used it last. Called with the
  // interpreter's lock held.
  void hand_over(cuda::Stream stream);
  bool writable() const { return writable_; }
  void* data() const { return memory_.data(); }  // of memory of its own

  // The bytes that were copied from the host, while nobody can have changed them: so that ids which
  // were just brought here can be checked without waiting for the device.
  std::vector<char> known;

 private:
  cuda::Memory memory_;
  std::shared_ptr<void> owner_;
  cuda::Stream made_, stream_;
  bool ordered_ = true, writable_ = true;
};

// A view of a Storage. Copies share the memory.
class Array {
 public:
  static Array empty(const Shape& shape, DType dtype, cuda::Stream stream);
  static Array zeros(const Shape& shape, DType dtype, cuda::Stream stream);
  Array(std::shared_ptr<Storage> storage, void* data, DType dtype, Shape shape, Shape strides);

  const Shape& shape() const { return shape_; }
  const Shape& strides() const { return strides_; }  // in elements
  py::ssize_t shape(size_t axis) const { return shape_[axis]; }
  py::ssize_t stride(size_t axis) const { return strides_[axis]; }
  py::ssize_t ndim() const { return static_cast<py::ssize_t>(shape_.size()); }
  DType dtype() const { return dtype_; }
  int64_t size() const { return size_; }
  int64_t bytes() const { return size_ * cuda::size_of(dtype_); }
  bool contiguous() const;  // C-contiguous
  bool writable() const { return storage_->writable(); }
  bool is_view() const { return is_view_; }  // made from another one, of the same memory
  const std::shared_ptr<Storage>& storage() const { return storage_; }
  void* address() const { return data_; }

  // The stream on which the array was used last: where work on it goes on without waiting.
  cuda::Stream stream() const { return storage_->stream(); }
  // The memory, for work on `stream`; the lock is held. T must be the dtype's, or void.
  template <class T = void>
  T* data(cuda::Stream stream) const {
    storage_->hand_over(stream);
    return static_cast<T*>(data_);
  }
  cuda::View view(cuda::Stream stream) const;

  Array reshape(const Shape& shape) const;  // of a contiguous one
  // Elements begin ... end - 1 of an axis.
  Array slice(size_t axis, py::ssize_t begin, py::ssize_t end) const;
  // The values in new memory, C-contiguous, in this dtype.
  Array copy(DType dtype, cuda::Stream stream) const;
  // Itself where it is C-contiguous, else a copy.
  Array dense(cuda::Stream stream) const;

 private:
  Array part(void* data, const Shape& shape, const Shape& strides) const;

  std::shared_ptr<Storage> storage_;
  void* data_;
  DType dtype_;
  Shape shape_, strides_;
  int64_t size_;
  bool is_view_ = false;
};

// The Array that `value` is, or nothing. Other libraries' arrays come as Arrays, by Array.import_.
std::optional<Array> device_array(const py::handle& value);
bool is_device_array(const py::handle& value);

// The DType of a NumPy dtype, which may be byte-swapped; TypeError for those that have none.
DType dtype_of(const std::string& name, const py::array& a);

// A NumPy array's values on the device, and the way back (bfloat16 as float32).
Array to_device(const std::string& name, const py::array& a, cuda::Stream stream);
py::array to_host(const Array& a);

// What the kernels read: an Array or NumPy array of T, on the device; other types are a TypeError,
// other shapes a ValueError. `dense_input` has C-contiguous memory.
template <class T>
Array device_input(const std::string& name, const py::handle& value, cuda::Stream stream) {
  if (const std::optional<Array> a = device_array(value)) {
    if (a->dtype() != kDTypeOf<T>)
      type_mismatch(name, std::string("an array of ") + name_of(kDTypeOf<T>), name_of(a->dtype()));
    return *a;
  }
  const py::array host = as_array(name, value);
  if constexpr (std::is_floating_point<T>::value) check_dtype<T>(name, host);
  Array a = to_device(name, host, stream);
  if (a.dtype() != kDTypeOf<T>)
    type_mismatch(name, std::string("an array of ") + name_of(kDTypeOf<T>), dtype_name(host));
  return a;
}
inline void check_shape(const std::string& name, const Array& a, const Shape& expected) {
  if (a.shape() != expected) value_mismatch(name, "shape " + text(expected), text(a.shape()));
}
template <class T>
Array dense_input(const std::string& name, const py::handle& value, const Shape& shape,
                  cuda::Stream stream) {
  const Array a = device_input<T>(name, value, stream);
  check_shape(name, a, shape);
  return a.dense(stream);
}

// An Array of T to be written in place: writable, C-contiguous, of this shape.
template <class T>
Array device_output(const std::string& name, const py::handle& value, const Shape& shape) {
  const std::optional<Array> a = device_array(value);
  if (!a) type_mismatch(name, "an array on the device", type_name(value));
  if (a->dtype() != kDTypeOf<T>)
    type_mismatch(name, std::string("an array of ") + name_of(kDTypeOf<T>), name_of(a->dtype()));
  check_shape(name, *a, shape);
  if (!a->writable()) value_mismatch(name, "a writable array", "a read-only one");
  if (!a->contiguous()) value_mismatch(name, "a C-contiguous array", "one that is strided");
  return *a;
}

// A stream as Python names it, by its address as an integer: 0 stands for the library's own stream
// of this thread, 1 for CUDA's default stream ("legacy"), 2 for its stream of this thread.
inline cuda::Stream stream_of(uintptr_t address) {
  return address == 0 ? cuda::own_stream() : cuda::Stream{reinterpret_cast<void*>(address)};
}

}  // namespace fastrnn

#endif  // FASTRNN_BINDINGS_CUDA_ARRAYS_H_
