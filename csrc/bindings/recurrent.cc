// Packed recurrent networks: pack, inference, training forward pass, back-propagation.
#include "bindings/recurrent.h"

#include <pybind11/stl.h>

#include <atomic>
#include <map>
#include <stdexcept>
#include <type_traits>

namespace fastrnn {

void register_recurrent(py::module_& m);

namespace {

CellKind cell_kind(const std::string& name) {
  static const std::map<std::string, CellKind> kinds = {
      {"rnn_tanh", CellKind::kRnnTanh},       {"rnn_relu", CellKind::kRnnRelu},
      {"rnn_sigmoid", CellKind::kRnnSigmoid}, {"lstm", CellKind::kLstm},
      {"gru_after", CellKind::kGruAfter},     {"gru_before", CellKind::kGruBefore}};
  const auto found = kinds.find(name);
  if (found == kinds.end()) value_mismatch("cell", "a cell's name", "'" + name + "'");
  return found->second;
}

// The name that PyTorch gives a parameter, for messages.
std::string parameter_name(const char* what, int layer, int direction) {
  return std::string(what) + "_l" + std::to_string(layer) + (direction ? "_reverse" : "");
}

struct ParameterShapes {
  Shape w_ih, w_hh, b;
};

ParameterShapes parameter_shapes(const StackSpec& spec, int layer) {
  const py::ssize_t rows = cell_traits(spec.kind).gates * spec.H;
  return {{rows, spec.input_size(layer)}, {rows, spec.H}, {rows}};
}

// Calls f(layer, direction, index of its first array, shapes) and checks the number of arrays.
template <class F>
void for_parameters(const StackSpec& spec, const std::string& name,
                    const std::vector<py::object>& arrays, const F& f) {
  const size_t per = spec.bias ? 4 : 2;
  const size_t expected = per * static_cast<size_t>(spec.count());
  if (arrays.size() != expected)
    value_mismatch(name, std::to_string(expected) + " arrays", std::to_string(arrays.size()));
  for (int l = 0; l < spec.layers; ++l)
    for (int d = 0; d < spec.directions; ++d)
      f(l, d, per * static_cast<size_t>(spec.index(l, d)), parameter_shapes(spec, l));
}

template <class T>
std::shared_ptr<const PackedStack<T>> pack(const StackSpec& spec,
                                           const std::vector<py::object>& arrays, int threads) {
  std::vector<LayerWeights<T>> weights;
  std::vector<py::array_t<T>> keep;
  for_parameters(
      spec, "weights", arrays, [&](int l, int d, size_t i, const ParameterShapes& shapes) {
        const auto get = [&](const char* what, size_t offset, const Shape& shape) {
          keep.push_back(dense<T>(parameter_name(what, l, d), arrays[i + offset], shape));
          return keep.back().data();
        };
        LayerWeights<T> w = {get("weight_ih", 0, shapes.w_ih), get("weight_hh", 1, shapes.w_hh),
                             nullptr, nullptr};
        if (spec.bias) {
          w.b_ih = get("bias_ih", 2, shapes.b);
          w.b_hh = get("bias_hh", 3, shapes.b);
        }
        weights.push_back(w);
      });
  std::shared_ptr<const PackedStack<T>> packed;
  without_lock(
      [&](Interrupt*) { packed = std::make_shared<PackedStack<T>>(spec, weights, threads); });
  return packed;
}

Packed make_packed(const std::string& cell, int64_t input_size, int64_t hidden_size, int num_layers,
                   int num_directions, bool bias, const std::string& dtype,
                   const std::vector<py::object>& weights, const py::object& threads) {
  if (input_size < 1 || hidden_size < 1 || num_layers < 1 || num_layers > INT32_MAX / 2 ||
      num_directions < 1 || num_directions > 2)
    throw py::value_error(
        "input_size, hidden_size, num_layers: expected at least 1, num_directions: expected 1 or "
        "2");
  const StackSpec spec = {cell_kind(cell), input_size,     hidden_size,
                          num_layers,      num_directions, bias};
  if (dtype == "float32") return {pack<float>(spec, weights, thread_count(threads))};
  if (dtype == "float64") return {pack<double>(spec, weights, thread_count(threads))};
  value_mismatch("dtype", "'float32' or 'float64'", "'" + dtype + "'");
}

// Which axes of x, y and dy are time and batch.
struct Axes {
  py::ssize_t t, b;       // b is -1 without a batch
  const int64_t* starts;  // rows one after the other: (B), their first steps; else null

  Layout layout(const py::array& a, size_t element) const {
    const auto stride = [&](py::ssize_t axis) {
      return a.strides(axis) / static_cast<py::ssize_t>(element);
    };
    if (starts != nullptr) return {stride(0), 0, starts};
    return {stride(t), b < 0 ? 0 : stride(b), nullptr};
  }
};

// The arguments of a call, checked; owns every converted array that the pointers in `call` refer
// to.
template <class T>
struct CallArguments {
  StackCall<T> call = {};
  py::array_t<T> y;
  States<T> initial, final;
  Shape y_shape;
  bool one_hot = false;

  CallArguments(const StackSpec& spec, const py::object& x, const py::object& state,
                const py::object& lengths, const py::object& offsets, const py::object& reset,
                bool batch_first, const py::object& threads) {
    py::array a = as_array("x", x);
    const char kind = a.dtype().kind();
    one_hot = kind == 'i' || kind == 'u';
    if (!one_hot) check_dtype<T>("x", a);
    call.threads = thread_count(threads);
    const bool batched = read_shape(a, spec, offsets, batch_first);
    const py::ssize_t LD = spec.count();
    const Shape state_shape = batched ? Shape{LD, call.batch, spec.H} : Shape{LD, spec.H};
    const bool has_cell = cell_traits(spec.kind).has_cell;
    initial = read_states<T>("state", state, has_cell, state_shape);
    call.h0 = initial.h_data();
    call.c0 = initial.c_data();
    read_lengths(lengths, batched);
    read_reset(reset, Shape(a.shape(), a.shape() + a.ndim() - (one_hot ? 0 : 1)));
    read_input(a, spec);

    y_shape = Shape(a.shape(), a.shape() + a.ndim() - (one_hot ? 0 : 1));
    y_shape.push_back(spec.H * spec.directions);
    y = py::array_t<T>(y_shape);
    call.y = y.mutable_data();
    call.y_layout = axes.layout(y, sizeof(T));
    final = empty_states<T>(has_cell, state_shape);
    call.hn = final.h->mutable_data();
    call.cn = final.c ? final.c->mutable_data() : nullptr;
  }

  Axes axes = {};
  py::array input;  // x as the kernels read it

 private:
  // Steps and batch from the shape of x, or from the offsets of rows that stand one after the
  // other. Returns whether there is a batch.
  bool read_shape(const py::array& x, const StackSpec& spec, const py::object& offsets,
                  bool batch_first) {
    const bool ragged = !offsets.is_none();
    const py::ssize_t most = (ragged ? 1 : 2) + (one_hot ? 0 : 1);
    const bool batched = ragged || x.ndim() == most;
    if (x.ndim() != most && (ragged || x.ndim() != most - 1)) {
      const std::string I = std::to_string(spec.I), order = batch_first ? "B, T" : "T, B";
      const std::string expected =
          ragged    ? (one_hot ? "integers of shape (steps of all rows,)"
                               : "shape (steps of all rows, " + I + ")")
          : one_hot ? "integers of shape (" + order + "), or (T,) without a batch"
                    : "shape (" + order + ", " + I + "), or (T, " + I + ") without a batch";
      value_mismatch("x", expected, text(shape_of(x)));
    }
    if (!one_hot && x.shape(x.ndim() - 1) != spec.I)
      value_mismatch("x", std::to_string(spec.I) + " features in its last axis", text(shape_of(x)));
    if (ragged) {
      read_offsets(offsets, x.shape(0));
    } else {
      axes.t = batched && batch_first ? 1 : 0;
      axes.b = batched ? 1 - axes.t : -1;
      call.steps = x.shape(axes.t);
      call.batch = batched ? x.shape(axes.b) : 1;
    }
    if (call.batch > INT32_MAX)
      value_mismatch("x", "a batch below 2**31 rows", std::to_string(call.batch));
    return batched;
  }

  void read_offsets(const py::object& offsets, int64_t total) {
    const py::array a = as_array("offsets", offsets);
    if (a.ndim() != 1 || a.shape(0) < 1)
      value_mismatch("offsets", "shape (B + 1,)", text(shape_of(a)));
    offsets_ = private_integers("offsets", a, shape_of(a));
    call.batch = a.shape(0) - 1;
    lengths_ = py::array_t<int64_t>(Shape{call.batch});
    const int64_t* const o = offsets_.data();
    bool fits = o[0] == 0 && o[call.batch] == total;
    for (int64_t b = 0; b < call.batch; ++b) fits = fits && o[b + 1] >= o[b];
    if (!fits)
      value_mismatch("offsets", "values that rise from 0 to " + std::to_string(total),
                     std::string(py::str(a)));
    for (int64_t b = 0; b < call.batch; ++b) {
      const int64_t n = o[b + 1] - o[b];
      lengths_.mutable_data()[b] = n;
      call.steps = std::max(call.steps, n);
    }
    call.lengths = lengths_.data();
    call.starts = axes.starts = o;
  }

  void read_lengths(const py::object& lengths, bool batched) {
    if (lengths.is_none()) return;
    if (!batched) value_mismatch("lengths", "None, since x has no batch axis", type_name(lengths));
    if (call.starts != nullptr)
      value_mismatch("lengths", "None, since x tells its rows' lengths", type_name(lengths));
    lengths_ = private_integers("lengths", lengths, {call.batch});
    for (int64_t b = 0; b < call.batch; ++b) {
      const int64_t n = lengths_.data()[b];
      if (n < 0 || n > call.steps)
        value_mismatch("lengths",
                       "values from 0 to " + std::to_string(call.steps) + " (the steps of x)",
                       std::to_string(n) + " at index " + std::to_string(b));
    }
    call.lengths = lengths_.data();
  }

  void read_reset(const py::object& reset, const Shape& shape) {
    if (reset.is_none()) return;
    py::array a = as_array("reset", reset);
    if (a.dtype().kind() != 'b') type_mismatch("reset", "an array of bool", dtype_name(a));
    check_shape("reset", a, shape);
    reset_ = a;
    call.reset = {static_cast<const uint8_t*>(a.data()), axes.layout(a, 1)};
  }

  void read_input(const py::array& a, const StackSpec& spec) {
    if (one_hot) {
      const py::array_t<int64_t> ids = private_integers("x", a, shape_of(a));
      for (py::ssize_t i = 0; i < ids.size(); ++i)
        if (ids.data()[i] < 0 || ids.data()[i] >= spec.I)
          value_mismatch("x", "token ids from 0 to " + std::to_string(spec.I - 1),
                         std::to_string(ids.data()[i]));
      input = ids;
      call.input.ids = ids.data();
    } else {
      input = rows_of<T>("x", a);
      call.input.x = static_cast<const T*>(input.data());
    }
    call.input.layout = axes.layout(input, one_hot ? sizeof(int64_t) : sizeof(T));
  }

  py::array reset_;
  py::array_t<int64_t> lengths_, offsets_;
};

py::tuple forward(const Packed& packed, const py::object& x, const py::object& state,
                  const py::object& lengths, const py::object& offsets, const py::object& reset,
                  bool batch_first, const py::object& threads) {
  return std::visit(
      [&](const auto& stack) -> py::tuple {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(stack->layer(0, 0).w_ih)>>;
        CallArguments<T> args(stack->spec(), x, state, lengths, offsets, reset, batch_first,
                              threads);
        without_lock([&](Interrupt* interrupt) {
          args.call.interrupt = interrupt;
          stack_forward(*stack, args.call);
        });
        return py::make_tuple(args.y, state_object(args.final, packed.has_cell()));
      },
      packed.stack);
}

// A tape of either dtype, and what its backward pass must know of the forward call. Used up by
// backward.
struct Tape {
  std::variant<std::unique_ptr<StackTape<float>>, std::unique_ptr<StackTape<double>>> tape;
  StackSpec spec;
  Shape x_shape, y_shape, state_shape;
  bool one_hot;
  Axes axes;
  std::vector<int64_t> starts;  // what axes.starts points to
  py::object x = py::none();    // with checkpoints: what the backward pass reads again
  std::atomic<bool> consumed{false};

  py::tuple backward(const py::object& dy, const py::object& dstate,
                     const std::vector<py::object>& into, const py::object& threads) {
    return std::visit([&](auto& t) { return run(t, dy, dstate, into, threads); }, tape);
  }

  template <class T>
  py::tuple run(std::unique_ptr<StackTape<T>>& stack_tape, const py::object& dy,
                const py::object& dstate, const std::vector<py::object>& into,
                const py::object& threads) {
    if (consumed)
      throw std::runtime_error("tape: expected one that was not used yet; backward consumes it");
    const bool has_cell = cell_traits(spec.kind).has_cell;
    BackwardCall<T> call = {};
    call.threads = thread_count(threads);
    py::array dy_rows;
    if (!dy.is_none()) {
      py::array a = as_array("dy", dy);
      check_dtype<T>("dy", a);
      check_shape("dy", a, y_shape);
      dy_rows = rows_of<T>("dy", a);
      call.dy = static_cast<const T*>(dy_rows.data());
      call.dy_layout = axes.layout(dy_rows, sizeof(T));
    }
    const States<T> final = read_states<T>("dstate", dstate, has_cell, state_shape);
    call.dhn = final.h_data();
    call.dcn = final.c_data();
    for_parameters(spec, "into", into, [&](int l, int d, size_t i, const ParameterShapes& shapes) {
      const auto get = [&](const char* what, size_t offset, const Shape& shape) {
        return writable<T>("into['" + parameter_name(what, l, d) + "']", into[i + offset], shape);
      };
      LayerGradients<T> g = {get("weight_ih", 0, shapes.w_ih), get("weight_hh", 1, shapes.w_hh),
                             nullptr, nullptr};
      if (spec.bias) {
        g.b_ih = get("bias_ih", 2, shapes.b);
        g.b_hh = get("bias_hh", 3, shapes.b);
      }
      call.gradients.push_back(g);
    });
    py::object dx = py::none();
    if (!one_hot) {
      py::array_t<T> zeros =
          py::module_::import("numpy").attr("zeros")(x_shape, py::dtype::of<T>());
      call.dx = zeros.mutable_data();
      call.dx_layout = axes.layout(zeros, sizeof(T));
      dx = zeros;
    }
    const States<T> initial = empty_states<T>(has_cell, state_shape);
    call.dh0 = const_cast<T*>(initial.h_data());
    call.dc0 = const_cast<T*>(initial.c_data());
    if (consumed.exchange(true))
      throw std::runtime_error("tape: expected one that was not used yet; backward consumes it");
    std::unique_ptr<StackTape<T>> owned =
        std::move(stack_tape);  // under the lock: `nbytes` may look at the same time
    without_lock([&](Interrupt* interrupt) {
      call.interrupt = interrupt;
      const std::unique_ptr<StackTape<T>> freed_here = std::move(owned);  // whatever happens
      freed_here->backward(call);
    });
    return py::make_tuple(dx, state_object(initial, has_cell));
  }
};

py::tuple forward_training(const Packed& packed, const py::object& x, const py::object& state,
                           const py::object& lengths, const py::object& offsets,
                           const py::object& reset, bool batch_first, const py::object& threads,
                           double dropout, uint64_t dropout_key, int64_t checkpoint_every) {
  return std::visit(
      [&](const auto& stack) -> py::tuple {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(stack->layer(0, 0).w_ih)>>;
        if (!(dropout >= 0 && dropout < 1))
          value_mismatch("dropout", "a number in [0, 1)", std::to_string(dropout));
        CallArguments<T> args(stack->spec(), x, state, lengths, offsets, reset, batch_first,
                              threads);
        args.call.dropout = dropout;
        args.call.dropout_key = dropout_key;
        args.call.checkpoint_every = checkpoint_every;
        std::unique_ptr<StackTape<T>> tape;
        without_lock([&](Interrupt* interrupt) {
          args.call.interrupt = interrupt;
          tape = std::make_unique<StackTape<T>>(stack, args.call);
        });
        auto result = std::make_unique<Tape>();
        result->tape = std::move(tape);
        result->spec = stack->spec();
        result->x_shape = args.y_shape;
        result->x_shape.back() = stack->spec().I;
        result->y_shape = args.y_shape;
        result->state_shape = shape_of(*args.final.h);
        result->one_hot = args.one_hot;
        if (checkpoint_every > 0) result->x = args.input;
        result->axes = args.axes;
        if (args.axes.starts != nullptr) {
          result->starts.assign(args.axes.starts, args.axes.starts + args.call.batch);
          result->axes.starts = result->starts.data();
        }
        return py::make_tuple(args.y, state_object(args.final, packed.has_cell()),
                              py::cast(std::move(result)));
      },
      packed.stack);
}

}  // namespace

void register_recurrent(py::module_& m) {
  py::class_<Packed>(
      m, "Packed",
      "A recurrent network's weights in the kernels' layout: a private, immutable copy.")
      .def(py::init(&make_packed), py::arg("cell"), py::arg("input_size"), py::arg("hidden_size"),
           py::arg("num_layers"), py::arg("num_directions"), py::arg("bias"), py::arg("dtype"),
           py::arg("weights"), py::arg("threads") = py::none(),
           "weights: for each layer and direction weight_ih, weight_hh and, with bias, bias_ih, "
           "bias_hh.")
      .def("forward", &forward, py::arg("x"), py::arg("state"), py::arg("lengths"),
           py::arg("offsets"), py::arg("reset"), py::arg("batch_first"), py::arg("threads"),
           "Inference: (y, state). With offsets (B + 1,) the rows of x, y and reset stand one "
           "after the other.")
      .def("forward_training", &forward_training, py::arg("x"), py::arg("state"),
           py::arg("lengths"), py::arg("offsets"), py::arg("reset"), py::arg("batch_first"),
           py::arg("threads"), py::arg("dropout"), py::arg("dropout_key"),
           py::arg("checkpoint_every"), "(y, state, tape).");
  py::class_<Tape>(m, "Tape", "What a forward pass keeps for its backward pass, which uses it up.")
      .def("backward", &Tape::backward, py::arg("dy"), py::arg("dstate"), py::arg("into"),
           py::arg("threads"),
           "Adds the parameters' gradients to `into` and returns (dx or None, dstate).")
      .def_property_readonly("consumed", [](const Tape& t) { return t.consumed.load(); })
      .def_property_readonly(
          "nbytes",
          [](const Tape& t) {
            return std::visit([](const auto& tape) { return tape ? tape->bytes() : size_t{0}; },
                              t.tape);
          },
          "Bytes that the tape holds.");
}

}  // namespace fastrnn
