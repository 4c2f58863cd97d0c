// NumPy → arguments: every array that a caller passes is checked and converted here, in one way,
// before anything large is allocated and before anything is written. TypeError for types,
// ValueError for values: argument, expected, got.
#ifndef FASTRNN_BINDINGS_ARRAYS_H_
#define FASTRNN_BINDINGS_ARRAYS_H_

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <unistd.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "core/args.h"
#include "core/interrupt.h"
#include "core/threads.h"

namespace fastrnn {

namespace py = pybind11;
using Shape = std::vector<py::ssize_t>;

inline std::string text(const Shape& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + (shape.size() == 1 ? ",)" : ")");
}

inline Shape shape_of(const py::array& a) { return Shape(a.shape(), a.shape() + a.ndim()); }

inline std::string type_name(const py::handle& value) { return Py_TYPE(value.ptr())->tp_name; }

[[noreturn]] inline void type_mismatch(const std::string& name, const std::string& expected,
                                       const std::string& got) {
  throw py::type_error(name + ": expected " + expected + ", got " + got);
}
[[noreturn]] inline void value_mismatch(const std::string& name, const std::string& expected,
                                        const std::string& got) {
  throw py::value_error(name + ": expected " + expected + ", got " + got);
}

// Any array-like; None and other non-arrays are a TypeError.
inline py::array as_array(const std::string& name, const py::handle& value) {
  if (py::isinstance<py::array>(value)) return py::reinterpret_borrow<py::array>(value);
  if (value.is_none()) type_mismatch(name, "an array", "None");
  py::array a = py::array::ensure(value);
  if (!a) {
    PyErr_Clear();
    type_mismatch(name, "an array", type_name(value));
  }
  return a;
}

inline std::string dtype_name(const py::array& a) { return py::str(a.dtype()); }

template <class T>
constexpr const char* kTypeName = sizeof(T) == 4 ? "float32" : "float64";

inline void check_shape(const std::string& name, const py::array& a, const Shape& expected) {
  if (shape_of(a) != expected) value_mismatch(name, "shape " + text(expected), text(shape_of(a)));
}

// The array's dtype is T, in either byte order; no other type is converted silently.
template <class T>
void check_dtype(const std::string& name, const py::array& a) {
  const py::dtype d = a.dtype();
  if (d.kind() == 'f' && d.itemsize() == static_cast<py::ssize_t>(sizeof(T))) return;
  const bool convertible = d.kind() == 'f' || d.kind() == 'i' || d.kind() == 'u';
  type_mismatch(
      name, std::string("an array of ") + kTypeName<T>,
      dtype_name(a) +
          (convertible ? std::string("; convert it with .astype('") + kTypeName<T> + "')" : ""));
}

// True if the memory can be read in place: native byte order, aligned, strides that are multiples
// of the element, and the last axis contiguous.
template <class T>
bool readable_in_place(const py::array& a) {
  if (a.dtype().byteorder() == (PY_BIG_ENDIAN ? '<' : '>')) return false;
  if (reinterpret_cast<uintptr_t>(a.data()) % alignof(T) != 0) return false;
  for (py::ssize_t i = 0; i < a.ndim(); ++i)
    if (a.shape(i) > 1 && a.strides(i) % static_cast<py::ssize_t>(sizeof(T)) != 0) return false;
  const py::ssize_t last = a.ndim() - 1;
  return last < 0 || a.shape(last) <= 1 || a.strides(last) == static_cast<py::ssize_t>(sizeof(T));
}

// The array as one aligned C-contiguous block of T in native byte order; a copy where it is not one
// yet, or always with kCopy. NumPy's MemoryError where there is no room for it.
constexpr int kCopy = 0x0020;  // NPY_ARRAY_ENSURECOPY
template <class T, int kFlags = 0>
py::array_t<T> block(const py::array& a) {
  constexpr int kBlock =
      py::array::c_style | py::array::forcecast | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  return py::array_t<T, kBlock | kFlags>(a);
}

// The same values, readable in place; a copy only where they are not yet.
template <class T>
py::array rows_of(const std::string& name, const py::handle& value) {
  py::array a = as_array(name, value);
  check_dtype<T>(name, a);
  if (readable_in_place<T>(a)) return a;
  return block<T>(a);
}

// The same values in one C-contiguous block.
template <class T>
py::array_t<T> dense(const std::string& name, const py::handle& value, const Shape& shape) {
  py::array a = as_array(name, value);
  check_dtype<T>(name, a);
  check_shape(name, a, shape);
  return block<T>(a);
}

// An array to be written in place, exactly as it is.
template <class T>
T* writable(const std::string& name, const py::handle& value, const Shape& shape) {
  if (!py::isinstance<py::array>(value)) type_mismatch(name, "an array", type_name(value));
  py::array a = py::reinterpret_borrow<py::array>(value);
  check_dtype<T>(name, a);
  check_shape(name, a, shape);
  const bool native = a.dtype().byteorder() != (PY_BIG_ENDIAN ? '<' : '>');
  const bool aligned = reinterpret_cast<uintptr_t>(a.data()) % alignof(T) == 0;
  if (!a.writeable()) value_mismatch(name, "a writable array", "a read-only one");
  if (!native || !aligned || !(a.flags() & py::array::c_style))
    value_mismatch(name, "a C-contiguous array in native byte order",
                   "one that is strided, misaligned or byte-swapped");
  return static_cast<T*>(a.mutable_data());
}

inline py::array integer_array(const std::string& name, const py::handle& value) {
  py::array a = as_array(name, value);
  const char kind = a.dtype().kind();
  const bool empty =
      a.size() == 0 && kind == 'f' && !py::isinstance<py::array>(value);  // an empty list
  if (kind != 'i' && kind != 'u' && !empty)
    type_mismatch(name, "integers", "an array of " + dtype_name(a));
  return a;
}

// int64 values of an integer array of any width, C-contiguous. Values past int64 come out negative,
// and are refused with the other negative ones where the range is checked.
inline py::array_t<int64_t> integers(const std::string& name, const py::handle& value) {
  return block<int64_t>(integer_array(name, value));
}

// The same in a private copy: for values that the kernels index memory with, which nothing that
// another thread does to the caller's array may change after they were checked.
inline py::array_t<int64_t> private_integers(const std::string& name, const py::handle& value,
                                             const Shape& shape) {
  const py::array a = integer_array(name, value);
  check_shape(name, a, shape);
  return block<int64_t, kCopy>(a);
}

// None or an integer from 1 to kMaxThreads.
inline int thread_count(const py::handle& value) {
  if (value.is_none()) return get_num_threads();
  const std::string expected = "None or an integer from 1 to " + std::to_string(kMaxThreads);
  const auto got = [&] { return std::string(py::repr(value)) + " (" + type_name(value) + ")"; };
  if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr()))
    type_mismatch("threads", expected, got());
  const Py_ssize_t n = PyNumber_AsSsize_t(value.ptr(), nullptr);  // clips instead of overflowing
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    type_mismatch("threads", expected, got());
  }
  if (n < 1 || n > kMaxThreads) value_mismatch("threads", expected, got());
  return static_cast<int>(n);
}

// The interpreter's lock, taken back by the thread that gave it up. A daemon thread that comes back
// while the interpreter shuts down is ended by Python (before 3.14) by unwinding its stack, which
// C++ answers with abort(); it waits here for the end of the process instead.
inline void take_lock(PyThreadState* state) {
  struct Wait {
    bool unwinding = true;
    ~Wait() {
      while (unwinding) pause();
    }
  } wait;
  PyEval_RestoreThread(state);
  wait.unwinding = false;
}

// Runs f(interrupt) without the interpreter's lock; Ctrl-C is noticed while it runs and raised when
// it has stopped.
template <class F>
void without_lock(const F& f) {
  PyThreadState* state = nullptr;
  Interrupt interrupt(
      [](void* ctx) {
        PyThreadState*& released = *static_cast<PyThreadState**>(ctx);
        take_lock(released);
        const bool stop = PyErr_CheckSignals() != 0;
        released = PyEval_SaveThread();
        return stop;
      },
      &state);
  bool interrupted = false;
  std::exception_ptr error;
  state = PyEval_SaveThread();
  try {
    f(&interrupt);
  } catch (const Interrupted&) {
    interrupted = true;
  } catch (...) {
    error = std::current_exception();
  }
  take_lock(state);
  if (interrupted) throw py::error_already_set();
  if (error) std::rethrow_exception(error);
}

}  // namespace fastrnn

#endif  // FASTRNN_BINDINGS_ARRAYS_H_
