// Packed recurrent networks on the device: the counterpart of bindings/recurrent.cc, with the same
// names and the same checks. Arguments may be NumPy arrays, which are copied to the device and
// their results back, or Arrays of the device, which are used in place.
#include <pybind11/stl.h>

#include <atomic>
#include <memory>
#include <type_traits>
#include <utility>
#include <variant>

#include "bindings/call.h"
#include "bindings/cuda/arrays.h"
#include "cuda/plan.h"
#include "cuda/stack.h"

namespace fastrnn {

void register_device_recurrent(py::module_& m);

namespace {

using cuda::Bfloat16;
using cuda::DeviceArrayRef;
using cuda::DeviceLayout;
using cuda::Float16;
using cuda::Precision;
using cuda::Stream;

Precision precision_named(const std::string& name) {
  constexpr const char* kNames[] = {"float64", "float32", "tf32", "bfloat16", "float16"};
  for (int i = 0; i < 5; ++i)
    if (name == kNames[i]) return static_cast<Precision>(i);
  value_mismatch("precision", "'float32', 'tf32', 'bfloat16', 'float16' or 'float64'",
                 "'" + name + "'");
}

template <class S>
using Stack = std::shared_ptr<const cuda::DeviceStack<S>>;

struct DevicePacked {
  std::variant<Stack<float>, Stack<double>, Stack<Bfloat16>, Stack<Float16>> stack;

  const StackSpec& spec() const {
    return std::visit([](const auto& s) -> const StackSpec& { return s->spec(); }, stack);
  }
};

template <class S>
Stack<S> pack(const StackSpec& spec, Precision precision, const std::vector<py::object>& arrays,
              Stream stream) {
  using A = cuda::Accumulator<S>;
  std::vector<cuda::DeviceWeights<A>> weights;
  std::vector<Array> keep;
  for_parameters(
      spec, "weights", arrays, [&](int l, int d, size_t i, const ParameterShapes& shapes) {
        const auto get = [&](const char* what, size_t offset, const Shape& shape) -> const A* {
          keep.push_back(
              dense_input<A>(parameter_name(what, l, d), arrays[i + offset], shape, stream));
          return keep.back().template data<A>(stream);
        };
        cuda::DeviceWeights<A> w = {get("weight_ih", 0, shapes.w_ih),
                                    get("weight_hh", 1, shapes.w_hh), nullptr, nullptr};
        if (spec.bias) {
          w.b_ih = get("bias_ih", 2, shapes.b);
          w.b_hh = get("bias_hh", 3, shapes.b);
        }
        weights.push_back(w);
      });
  Stack<S> packed;
  without_lock([&](Interrupt*) {
    packed = std::make_shared<cuda::DeviceStack<S>>(spec, precision, weights, stream);
  });
  return packed;
}

DevicePacked make_packed(const std::string& cell, int64_t input_size, int64_t hidden_size,
                         int num_layers, int num_directions, bool bias,
                         const std::string& precision_name, const std::vector<py::object>& weights,
                         const py::object& threads, uintptr_t stream_address) {
  cuda::require_device();
  thread_count(threads);
  const StackSpec spec =
      stack_spec(cell, input_size, hidden_size, num_layers, num_directions, bias);
  const Precision precision = precision_named(precision_name);
  const Stream stream = stream_of(stream_address);
  switch (precision) {
    case Precision::kFloat64:
      return {pack<double>(spec, precision, weights, stream)};
    case Precision::kBfloat16:
      return {pack<Bfloat16>(spec, precision, weights, stream)};
    case Precision::kFloat16:
      return {pack<Float16>(spec, precision, weights, stream)};
    default:
      return {pack<float>(spec, precision, weights, stream)};
  }
}

// What a call must remember of the arrays' form, for its results and for its backward pass.
struct Form {
  Shape leading;  // of x, y, dy: without the axis of features
  Shape state_shape;
  DType dtype = DType::kFloat32;  // of x and y
  bool on_device = false;         // x was an Array, and so are the results
  py::ssize_t t = 0, b = -1;      // axes
  bool ragged = false;

  Shape with_features(py::ssize_t n) const {
    Shape shape = leading;
    shape.push_back(n);
    return shape;
  }
  DeviceLayout layout(const Array& a, const int64_t* starts) const {
    if (ragged) return {a.stride(0), 0, starts};
    return {a.stride(static_cast<size_t>(t)), b < 0 ? 0 : a.stride(static_cast<size_t>(b)),
            nullptr};
  }
  // A floating array with an axis of features.
  DeviceArrayRef ref(const Array& a, const int64_t* starts, Stream stream) const {
    return {a.data(stream), a.dtype(), layout(a, starts), a.stride(a.shape().size() - 1)};
  }
};

py::object result(const Array& a, bool on_device) {
  if (on_device) return py::cast(a);
  return to_host(a);
}

// A state argument or result: h, and c for an LSTM.
struct DeviceStates {
  std::optional<Array> h, c;

  template <class A>
  const A* h_data(Stream stream) const {
    return h ? h->data<A>(stream) : nullptr;
  }
  template <class A>
  const A* c_data(Stream stream) const {
    return c ? c->data<A>(stream) : nullptr;
  }
  py::object object(bool on_device) const {
    if (c) return py::make_tuple(result(*h, on_device), result(*c, on_device));
    return result(*h, on_device);
  }
};

template <class A>
DeviceStates read_device_states(const std::string& name, const py::handle& value, bool has_cell,
                                const Shape& shape, Stream stream) {
  DeviceStates states;
  if (value.is_none()) return states;
  if (!has_cell) {
    states.h = dense_input<A>(name, value, shape, stream);
    return states;
  }
  if (!(py::isinstance<py::tuple>(value) || py::isinstance<py::list>(value)))
    type_mismatch(name, "a pair (h, c) of arrays", type_name(value));
  const py::sequence pair = py::reinterpret_borrow<py::sequence>(value);
  if (pair.size() != 2)
    value_mismatch(name, "a pair (h, c) of arrays", std::to_string(pair.size()) + " items");
  const py::object h = pair[0], c = pair[1];
  if (!h.is_none()) states.h = dense_input<A>(name + "[0]", h, shape, stream);
  if (!c.is_none()) states.c = dense_input<A>(name + "[1]", c, shape, stream);
  return states;
}

template <class A>
DeviceStates empty_device_states(bool has_cell, const Shape& shape, Stream stream) {
  DeviceStates states;
  states.h = Array::empty(shape, kDTypeOf<A>, stream);
  if (has_cell) states.c = Array::empty(shape, kDTypeOf<A>, stream);
  return states;
}

// A floating array of a call, on the device: of A, or in 16-bit precision any of float32's and the
// 16-bit types where it is an Array.
template <class S>
Array read_values(const std::string& name, const py::handle& value, Stream stream) {
  using A = cuda::Accumulator<S>;
  if (sizeof(S) == 2) {
    const std::optional<Array> a = device_array(value);
    if (a && (a->dtype() == DType::kFloat16 || a->dtype() == DType::kBfloat16)) return *a;
  }
  return device_input<A>(name, value, stream);
}

// Where the caller names no stream: the one that its array was used on last.
Stream stream_for(uintptr_t address, const std::optional<Array>& a) {
  return address == 0 && a ? a->stream() : stream_of(address);
}

bool is_integral(DType dtype) { return dtype == DType::kInt32 || dtype == DType::kInt64; }

// The arguments of a call, checked and on the device; owns what the pointers in `call` refer to.
template <class S>
struct DeviceArguments {
  using A = cuda::Accumulator<S>;
  cuda::DeviceCall<S> call = {};
  Form form;
  std::optional<Array> y;
  DeviceStates initial, final;
  bool one_hot = false;

  DeviceArguments(const StackSpec& spec, const py::object& x, const py::object& state,
                  const py::object& lengths, const py::object& offsets, const py::object& reset,
                  bool batch_first, const py::object& threads, uintptr_t stream_address) {
    thread_count(threads);
    const std::optional<Array> given = device_array(x);
    const Stream stream = call.stream = stream_for(stream_address, given);
    const py::array host = given ? py::array() : as_array("x", x);
    form.on_device = given.has_value();
    one_hot = given ? is_integral(given->dtype())
                    : host.dtype().kind() == 'i' || host.dtype().kind() == 'u';
    if (!given && !one_hot) check_dtype<A>("x", host);
    const Shape x_shape = given ? given->shape() : shape_of(host);
    extent_.emplace(spec, x_shape, one_hot, offsets, lengths, batch_first);
    call.steps = extent_->steps;
    call.batch = extent_->batch;
    call.lengths = extent_->lengths();
    form.t = extent_->time_axis;
    form.b = extent_->batch_axis;
    form.ragged = extent_->starts() != nullptr;
    form.leading = Shape(x_shape.begin(), x_shape.end() - (one_hot ? 0 : 1));
    form.state_shape = extent_->state_shape(spec);
    const bool has_cell = cell_traits(spec.kind).has_cell;
    initial = read_device_states<A>("state", state, has_cell, form.state_shape, stream);
    upload_starts(stream);
    read_reset(reset, stream);
    if (one_hot) {
      read_ids(given ? to_host(*given) : host, spec, stream);
    } else {
      x_ = read_values<S>("x", x, stream);
      call.x = form.ref(*x_, starts(stream), stream);
    }
    form.dtype = x_ ? x_->dtype() : kDTypeOf<A>;
    y = Array::empty(form.with_features(spec.H * spec.directions), form.dtype, stream);
    call.y = form.ref(*y, starts(stream), stream);
    final = empty_device_states<A>(has_cell, form.state_shape, stream);
    call.h0 = initial.h_data<A>(stream);
    call.c0 = initial.c_data<A>(stream);
    call.hn = final.h->data<A>(stream);
    call.cn = final.c ? final.c->data<A>(stream) : nullptr;
  }

  py::tuple results() const {
    return py::make_tuple(result(*y, form.on_device), final.object(form.on_device));
  }
  // What a tape goes on reading after the call.
  const std::optional<Array>& ids() const { return ids_; }
  const std::optional<Array>& device_starts() const { return starts_; }

 private:
  const int64_t* starts(Stream stream) const {
    return starts_ ? starts_->data<int64_t>(stream) : nullptr;
  }

  void upload_starts(Stream stream) {
    if (extent_->starts() == nullptr) return;
    call.host_starts.assign(extent_->starts(), extent_->starts() + call.batch);
    starts_ = Array::empty({call.batch}, DType::kInt64, stream);
    if (call.batch > 0)
      cuda::copy_to_device(starts_->data(stream), call.host_starts.data(),
                           static_cast<size_t>(starts_->bytes()), stream);
  }

  void read_reset(const py::object& reset, Stream stream) {
    if (reset.is_none()) return;
    if (!is_device_array(reset)) {
      const py::array a = as_array("reset", reset);
      if (a.dtype().kind() != 'b') type_mismatch("reset", "an array of bool", dtype_name(a));
      check_shape("reset", a, form.leading);
    }
    reset_ = device_input<bool>("reset", reset, stream);
    check_shape("reset", *reset_, form.leading);
    call.reset = static_cast<const uint8_t*>(reset_->data(stream));
    call.reset_layout = form.layout(*reset_, starts(stream));
  }

  void read_ids(const py::array& a, const StackSpec& spec, Stream stream) {
    const py::array_t<int64_t> ids = private_integers("x", a, shape_of(a));
    for (py::ssize_t i = 0; i < ids.size(); ++i)
      if (ids.data()[i] < 0 || ids.data()[i] >= spec.I)
        value_mismatch("x", "token ids from 0 to " + std::to_string(spec.I - 1),
                       std::to_string(ids.data()[i]));
    call.host_ids.assign(ids.data(), ids.data() + ids.size());
    ids_ = to_device("x", ids, stream);
    call.ids = ids_->data<int64_t>(stream);
    call.ids_layout = form.layout(*ids_, starts(stream));
  }

  std::optional<Extent> extent_;
  std::optional<Array> x_, ids_, starts_, reset_;
};

py::tuple forward(const DevicePacked& packed, const py::object& x, const py::object& state,
                  const py::object& lengths, const py::object& offsets, const py::object& reset,
                  bool batch_first, const py::object& threads, uintptr_t stream) {
  return std::visit(
      [&](const auto& stack) -> py::tuple {
        using S = std::remove_const_t<
            std::remove_pointer_t<decltype(stack->input_weights(0, false, Stream()))>>;
        DeviceArguments<S> args(stack->spec(), x, state, lengths, offsets, reset, batch_first,
                                threads, stream);
        without_lock([&](Interrupt* interrupt) {
          args.call.interrupt = interrupt;
          cuda::device_forward(*stack, args.call);
        });
        return args.results();
      },
      packed.stack);
}

template <class S>
using TapeOf = std::unique_ptr<cuda::DeviceTape<S>>;

// What a forward pass keeps, and what its backward pass must know of the call. Used up by backward.
struct DeviceTapeHolder {
  std::variant<TapeOf<float>, TapeOf<double>, TapeOf<Bfloat16>, TapeOf<Float16>> tape;
  StackSpec spec;
  Form form;
  bool one_hot;
  std::optional<Array> ids, starts;
  std::atomic<bool> consumed{false};

  [[noreturn]] static void refuse() {
    throw std::runtime_error("tape: expected one that was not used yet; backward consumes it");
  }

  py::tuple backward(const py::object& dy, const py::object& dstate,
                     const std::vector<py::object>& into, const py::object& threads,
                     uintptr_t stream) {
    return std::visit([&](auto& t) { return run(t, dy, dstate, into, threads, stream); }, tape);
  }

  template <class S>
  py::tuple run(TapeOf<S>& tape_of, const py::object& dy, const py::object& dstate,
                const std::vector<py::object>& into, const py::object& threads,
                uintptr_t stream_address) {
    using A = cuda::Accumulator<S>;
    if (consumed) refuse();
    thread_count(threads);
    const bool has_cell = cell_traits(spec.kind).has_cell;
    const Stream stream = stream_for(stream_address, device_array(dy));
    const int64_t* const row_starts = starts ? starts->data<int64_t>(stream) : nullptr;
    if (ids) ids->data<int64_t>(stream);  // which steps that run again read
    cuda::DeviceBackwardCall<S> call = {};
    call.stream = stream;
    bool on_device = form.on_device;
    std::optional<Array> dy_array;
    if (!dy.is_none()) {
      on_device = is_device_array(dy);
      if (!on_device) {
        const py::array a = as_array("dy", dy);
        check_dtype<A>("dy", a);
        check_shape("dy", a, form.with_features(spec.H * spec.directions));
      }
      dy_array = read_values<S>("dy", dy, stream);
      check_shape("dy", *dy_array, form.with_features(spec.H * spec.directions));
      call.dy = form.ref(*dy_array, row_starts, stream);
    }
    const DeviceStates final =
        read_device_states<A>("dstate", dstate, has_cell, form.state_shape, stream);
    call.dhn = final.h_data<A>(stream);
    call.dcn = final.c_data<A>(stream);
    const std::vector<Array> gradients = read_gradients<A>(into, stream, call.gradients);
    std::optional<Array> dx;
    if (!one_hot) {
      dx = Array::empty(form.with_features(spec.I), on_device ? form.dtype : kDTypeOf<A>, stream);
      call.dx = form.ref(*dx, row_starts, stream);
    }
    const DeviceStates initial = empty_device_states<A>(has_cell, form.state_shape, stream);
    call.dh0 = initial.h->data<A>(stream);
    call.dc0 = initial.c ? initial.c->data<A>(stream) : nullptr;
    if (consumed.exchange(true)) refuse();
    TapeOf<S> owned = std::move(tape_of);  // under the lock: `nbytes` may look at the same time
    without_lock([&](Interrupt* interrupt) {
      call.interrupt = interrupt;
      const TapeOf<S> freed_here = std::move(owned);  // whatever happens
      freed_here->backward(call);
    });
    for (size_t i = 0; i < into.size(); ++i)
      if (!is_device_array(into[i])) into[i].attr("__iadd__")(to_host(gradients[i]));
    return py::make_tuple(dx ? result(*dx, on_device) : py::none(), initial.object(on_device));
  }

  // The arrays that gradients are added to: those of `into`, or zeros where these are in host
  // memory.
  template <class A>
  std::vector<Array> read_gradients(const std::vector<py::object>& into, Stream stream,
                                    std::vector<cuda::DeviceGradients<A>>& gradients) const {
    std::vector<Array> arrays;
    for_parameters(spec, "into", into, [&](int l, int d, size_t i, const ParameterShapes& shapes) {
      const auto get = [&](const char* what, size_t offset, const Shape& shape) -> A* {
        const std::string name = "into['" + parameter_name(what, l, d) + "']";
        const py::object& value = into[i + offset];
        if (is_device_array(value)) {
          arrays.push_back(device_output<A>(name, value, shape));
        } else {
          writable<A>(name, value, shape);
          arrays.push_back(Array::zeros(shape, kDTypeOf<A>, stream));
        }
        return arrays.back().template data<A>(stream);
      };
      // In the order of `into`, so that the arrays are found again by its index.
      cuda::DeviceGradients<A> g = {};
      g.w_ih = get("weight_ih", 0, shapes.w_ih);
      g.w_hh = get("weight_hh", 1, shapes.w_hh);
      if (spec.bias) {
        g.b_ih = get("bias_ih", 2, shapes.b);
        g.b_hh = get("bias_hh", 3, shapes.b);
      }
      gradients.push_back(g);
    });
    return arrays;
  }

  size_t bytes() const {
    return std::visit([](const auto& t) { return t ? t->bytes() : size_t{0}; }, tape);
  }
};

py::tuple forward_training(const DevicePacked& packed, const py::object& x, const py::object& state,
                           const py::object& lengths, const py::object& offsets,
                           const py::object& reset, bool batch_first, const py::object& threads,
                           double dropout, uint64_t dropout_key, int64_t checkpoint_every,
                           uintptr_t stream) {
  return std::visit(
      [&](const auto& stack) -> py::tuple {
        using S = std::remove_const_t<
            std::remove_pointer_t<decltype(stack->input_weights(0, false, Stream()))>>;
        if (!(dropout >= 0 && dropout < 1))
          value_mismatch("dropout", "a number in [0, 1)", std::to_string(dropout));
        DeviceArguments<S> args(stack->spec(), x, state, lengths, offsets, reset, batch_first,
                                threads, stream);
        args.call.dropout = dropout;
        args.call.dropout_key = dropout_key;
        args.call.checkpoint_every = checkpoint_every;
        TapeOf<S> tape;
        without_lock([&](Interrupt* interrupt) {
          args.call.interrupt = interrupt;
          tape = std::make_unique<cuda::DeviceTape<S>>(stack, args.call);
        });
        auto holder = std::make_unique<DeviceTapeHolder>();
        holder->tape = std::move(tape);
        holder->spec = stack->spec();
        holder->form = args.form;
        holder->one_hot = args.one_hot;
        holder->ids = args.ids();
        holder->starts = args.device_starts();
        const py::tuple y_and_state = args.results();
        return py::make_tuple(y_and_state[0], y_and_state[1], py::cast(std::move(holder)));
      },
      packed.stack);
}

py::dict plan_of(const std::string& cell, int64_t hidden_size, int64_t batch, int directions,
                 const std::string& precision) {
  cuda::require_device();
  const cuda::RecurrenceShape shape = {cell_kind(cell), precision_named(precision), hidden_size,
                                       batch, directions};
  const cuda::Plan chosen = cuda::plan(shape, cuda::device_info());
  py::dict result;
  result["family"] = cuda::family_name(chosen.family);
  result["reason"] = chosen.reason;
  return result;
}

}  // namespace

void register_device_recurrent(py::module_& m) {
  using py::literals::operator""_a;
  py::class_<DevicePacked>(
      m, "Packed", "A recurrent network's weights on the device: a private, immutable copy.")
      .def(py::init(&make_packed), "cell"_a, "input_size"_a, "hidden_size"_a, "num_layers"_a,
           "num_directions"_a, "bias"_a, "precision"_a, "weights"_a, "threads"_a = py::none(),
           "stream"_a = 0,
           "weights: for each layer and direction weight_ih, weight_hh and, with bias, bias_ih, "
           "bias_hh.")
      .def("forward", &forward, "x"_a, "state"_a, "lengths"_a, "offsets"_a, "reset"_a,
           "batch_first"_a, "threads"_a, "stream"_a = 0,
           "Inference: (y, state). With offsets (B + 1,) the rows of x, y and reset stand one "
           "after the other.")
      .def("forward_training", &forward_training, "x"_a, "state"_a, "lengths"_a, "offsets"_a,
           "reset"_a, "batch_first"_a, "threads"_a, "dropout"_a, "dropout_key"_a,
           "checkpoint_every"_a, "stream"_a = 0, "(y, state, tape).");
  py::class_<DeviceTapeHolder>(m, "Tape",
                               "What a forward pass keeps for its backward pass, which uses it up.")
      .def("backward", &DeviceTapeHolder::backward, "dy"_a, "dstate"_a, "into"_a, "threads"_a,
           "stream"_a = 0,
           "Adds the parameters' gradients to `into` and returns (dx or None, dstate).")
      .def_property_readonly("consumed",
                             [](const DeviceTapeHolder& t) { return t.consumed.load(); })
      .def_property_readonly("nbytes", &DeviceTapeHolder::bytes,
                             "Bytes of device memory that the tape holds.");
  m.def("plan", &plan_of, "cell"_a, "hidden_size"_a, "batch"_a, "directions"_a, "precision"_a,
        "Which family of kernels runs a recurrence, and why not a faster one: family, reason.");
}

}  // namespace fastrnn
