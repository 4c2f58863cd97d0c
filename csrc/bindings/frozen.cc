// Streams: one step at a time through packed weights, at the price of the kernels and little else;
// and the way back from packed weights to arrays, so that a frozen model can be pickled.
#include "bindings/recurrent.h"

#include <pybind11/stl.h>

#include <atomic>
#include <cstring>

namespace fastrnn {

void register_frozen(py::module_& m);

namespace {

// The parameters that were packed, by gate rows. The two biases were added when they were packed:
// their sum comes back as bias_ih with bias_hh -0 (x + -0 has the bits of x, whatever x is), except
// for n of a GRU with the reset gate after the product, which keeps both.
template <class T>
py::list unpack(const PackedStack<T>& stack) {
  const StackSpec& spec = stack.spec();
  const CellTraits traits = cell_traits(spec.kind);
  const int64_t W = stack.kernels().width, H = spec.H, G = traits.gates;
  py::list result;
  for (int l = 0; l < spec.layers; ++l)
    for (int d = 0; d < spec.directions; ++d) {
      const PackedLayer<T> packed = stack.layer(l, d);
      const auto matrix = [&](const T* panels, int64_t K) {
        py::array_t<T> w(Shape{G * H, K});
        T* const out = w.mutable_data();
        for (int64_t row = 0; row < G * H; ++row) {
          const int64_t g = row / H, u = row % H;
          for (int64_t k = 0; k < K; ++k)
            out[row * K + k] = panels[((u / W * G + g) * K + k) * W + u % W];
        }
        return w;
      };
      result.append(matrix(packed.w_ih, spec.input_size(l)));
      result.append(matrix(packed.w_hh, H));
      if (!spec.bias) continue;
      py::array_t<T> in(Shape{G * H}), hidden(Shape{G * H});
      for (int64_t row = 0; row < G * H; ++row) {
        const int64_t g = row / H, u = row % H;
        const T* const lane = packed.bias + u / W * traits.slots * W + u % W;
        const bool apart = spec.kind == CellKind::kGruAfter && g == 2;
        in.mutable_data()[row] = lane[(apart ? 3 : g) * W];
        hidden.mutable_data()[row] = apart ? lane[2 * W] : -T(0);
      }
      result.append(in);
      result.append(hidden);
    }
  return result;
}

// A step shorter than this many multiply-adds (some 10 µs) keeps the interpreter's lock: handing it
// over would cost a good part of the step.
constexpr double kShortStep = 1 << 19;

template <class T>
bool overlap(const T* a, int64_t n, const T* b, int64_t m) {
  return a < b + m && b < a + n;
}

class Stream {
 public:
  Stream(const Packed& packed, int64_t batch_size)
      : batch_(batch_size), has_cell_(packed.has_cell()) {
    if (batch_size < 1 || batch_size > INT32_MAX)
      value_mismatch("batch_size", "an integer from 1 to 2**31 - 1", std::to_string(batch_size));
    if (packed.spec().directions != 1)
      throw py::value_error(
          "stream: expected a network of one direction, got a bidirectional one, which needs the "
          "whole "
          "sequence before its first output");
    spec_ = packed.spec();
    double work = 0;
    for (int l = 0; l < spec_.layers; ++l)
      work += static_cast<double>(batch_) * cell_traits(spec_.kind).gates *
              static_cast<double>(spec_.H) * static_cast<double>(spec_.input_size(l) + spec_.H);
    short_ = work < kShortStep;
    std::visit(
        [&](const auto& stack) {
          using T = std::remove_const_t<std::remove_pointer_t<decltype(stack->layer(0, 0).w_ih)>>;
          stream_ = std::make_unique<StackStream<T>>(stack, batch_size);
        },
        packed.stack);
  }

  py::object step(const py::object& x, const py::object& out) {
    const Turn turn(busy_);
    return std::visit([&](auto& stream) { return run(*stream, x, out); }, stream_);
  }

  py::object state() {
    const Turn turn(busy_);
    return std::visit(
        [&](auto& stream) {
          using T = typename std::remove_reference_t<decltype(*stream)>::Scalar;
          const States<T> states = empty_states<T>(has_cell_, state_shape());
          stream->get_state(const_cast<T*>(states.h_data()), const_cast<T*>(states.c_data()));
          return state_object(states, has_cell_);
        },
        stream_);
  }

  void set_state(const py::object& value) {
    const Turn turn(busy_);
    std::visit(
        [&](auto& stream) {
          using T = typename std::remove_reference_t<decltype(*stream)>::Scalar;
          const States<T> states = read_states<T>("state", value, has_cell_, state_shape());
          stream->set_state(states.h_data(), states.c_data());
        },
        stream_);
  }

  // rows: None for all, or integers, or a bool per row.
  void reset(const py::object& rows) {
    const Turn turn(busy_);
    std::vector<int64_t> chosen;
    if (rows.is_none()) {
      for (int64_t b = 0; b < batch_; ++b) chosen.push_back(b);
    } else {
      py::array a = as_array("rows", rows);
      if (a.dtype().kind() == 'b') {
        check_shape("rows", a, {batch_});
        for (int64_t b = 0; b < batch_; ++b)
          if (*static_cast<const bool*>(a.data(b))) chosen.push_back(b);
      } else {
        const py::array_t<int64_t> ids = integers("rows", rows);
        if (ids.ndim() > 1)
          value_mismatch("rows", "one row or a list of rows", text(shape_of(ids)));
        for (py::ssize_t i = 0; i < ids.size(); ++i) {
          const int64_t b = ids.data()[i];
          if (b < 0 || b >= batch_)
            value_mismatch("rows", "rows from 0 to " + std::to_string(batch_ - 1),
                           std::to_string(b));
          chosen.push_back(b);
        }
      }
    }
    std::visit(
        [&](auto& stream) {
          for (int64_t b : chosen) stream->reset_row(b);
        },
        stream_);
  }

  int64_t batch_size() const { return batch_; }

 private:
  // One call at a time: a second thread gets an error, never a torn state.
  class Turn {
   public:
    explicit Turn(std::atomic<bool>& busy) : busy_(busy) {
      if (busy_.exchange(true))
        throw std::runtime_error(
            "stream: expected one caller at a time, got a call while another thread's is running");
    }
    ~Turn() { busy_ = false; }

   private:
    std::atomic<bool>& busy_;
  };

  Shape state_shape() const { return {spec_.count(), batch_, spec_.H}; }

  template <class T>
  py::object run(StackStream<T>& stream, const py::object& x, const py::object& out) {
    py::array a = as_array("x_t", x);
    const char kind = a.dtype().kind();
    const T* values = nullptr;
    const int64_t* ids = nullptr;
    int64_t stride = 0;
    py::array rows;
    if (kind == 'i' || kind == 'u') {
      check_shape("x_t", a, {batch_});
      const py::array_t<int64_t> given = integers("x_t", a);
      ids_.assign(given.data(),
                  given.data() + batch_);  // a private copy: kernels index memory with it
      for (int64_t id : ids_)
        if (id < 0 || id >= spec_.I)
          value_mismatch("x_t", "token ids from 0 to " + std::to_string(spec_.I - 1),
                         std::to_string(id));
      ids = ids_.data();
      stride = 1;
    } else {
      check_dtype<T>("x_t", a);
      if (a.ndim() != 2 || a.shape(0) != batch_ || a.shape(1) != spec_.I)
        value_mismatch("x_t", "shape " + text({batch_, spec_.I}), text(shape_of(a)));
      rows = rows_of<T>("x_t", a);
      values = static_cast<const T*>(rows.data());
      stride = rows.strides(0) / static_cast<py::ssize_t>(sizeof(T));
    }
    py::object y = out;
    T* y_data;
    if (out.is_none()) {
      py::array_t<T> fresh(Shape{batch_, spec_.H});
      y_data = fresh.mutable_data();
      y = fresh;
    } else {
      y_data = writable<T>("out", out, {batch_, spec_.H});
      const int64_t bytes = batch_ * spec_.H * static_cast<int64_t>(sizeof(T));
      const char* const y_bytes = reinterpret_cast<const char*>(y_data);
      if (overlaps(a, y_bytes, bytes))
        value_mismatch("out", "an array apart from x_t", "one that overlaps it");
    }
    // Not interruptible: a step is done whole or not at all, so that all layers stand at the same
    // time.
    if (short_) {
      stream.step(values, ids, stride, y_data, nullptr);
    } else {
      without_lock([&](Interrupt*) { stream.step(values, ids, stride, y_data, nullptr); });
    }
    return y;
  }

  // Whether any element of `a` may lie in the n bytes at p: its extent in memory, negative strides
  // included.
  static bool overlaps(const py::array& a, const char* p, int64_t n) {
    const char* low = static_cast<const char*>(a.data());
    const char* high = low + a.itemsize();
    for (py::ssize_t i = 0; i < a.ndim(); ++i) {
      if (a.shape(i) == 0) return false;
      const py::ssize_t span = (a.shape(i) - 1) * a.strides(i);
      (span < 0 ? low : high) += span;
    }
    return overlap(low, high - low, p, n);
  }

  int64_t batch_;
  bool has_cell_, short_ = false;
  StackSpec spec_ = {};
  std::vector<int64_t> ids_;
  std::variant<std::unique_ptr<StackStream<float>>, std::unique_ptr<StackStream<double>>> stream_;
  std::atomic<bool> busy_{false};
};

}  // namespace

void register_frozen(py::module_& m) {
  m.def(
      "unpack",
      [](const Packed& packed) {
        return std::visit([](const auto& s) { return unpack(*s); }, packed.stack);
      },
      py::arg("packed"),
      "The weights of a Packed as a list of arrays, in the order its constructor takes.");
  py::class_<Stream>(
      m, "Stream",
      "The state of `batch_size` sequences that advance one step at a time.\n\n"
      "Made by ``Frozen.stream``. A step gives the same bits as the whole sequence in one call.")
      .def(py::init<const Packed&, int64_t>(), py::arg("packed"), py::arg("batch_size") = 1)
      .def("step", &Stream::step, py::arg("x_t"), py::arg("out") = py::none(),
           "One step: x_t (B, I), or (B,) integers for one-hot rows, to y_t (B, H).\n\n"
           "With `out`, a C-contiguous (B, H) array apart from x_t, nothing is allocated. "
           "RuntimeError when another\n"
           "thread is in the middle of a step; TypeError or ValueError for anything that does not "
           "fit.")
      .def("reset", &Stream::reset, py::arg("rows") = py::none(),
           "Zeroes the state of all rows, or of those given by index or by a mask of bool.")
      .def_property("state", &Stream::state, &Stream::set_state,
                    "A copy of the state: h (L, B, H), or (h, c) for an LSTM. Assign to replace "
                    "it; None zeroes it.")
      .def_property_readonly("batch_size", &Stream::batch_size);
}

}  // namespace fastrnn
