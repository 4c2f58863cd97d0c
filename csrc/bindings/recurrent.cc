// Packed recurrent networks: pack, inference, training forward pass, back-propagation.
#include "bindings/recurrent.h"

#include <pybind11/stl.h>

#include <atomic>
#include <stdexcept>
#include <type_traits>

#include "bindings/call.h"

namespace fastrnn {

void register_recurrent(py::module_& m);

namespace {

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
  const StackSpec spec =
      stack_spec(cell, input_size, hidden_size, num_layers, num_directions, bias);
  if (dtype == "float32") return {pack<float>(spec, weights, thread_count(threads))};
  if (dtype == "float64") return {pack<double>(spec, weights, thread_count(threads))};
  value_mismatch("dtype", "'float32' or 'float64'", "'" + dtype + "'");
}

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
    extent.emplace(spec, shape_of(a), one_hot, offsets, lengths, batch_first);
    call.steps = extent->steps;
    call.batch = extent->batch;
    call.lengths = extent->lengths();
    call.starts = extent->starts();
    axes = {extent->time_axis, extent->batch_axis, extent->starts()};
    const Shape state_shape = extent->state_shape(spec);
    const bool has_cell = cell_traits(spec.kind).has_cell;
    initial = read_states<T>("state", state, has_cell, state_shape);
    call.h0 = initial.h_data();
    call.c0 = initial.c_data();
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
  std::optional<Extent> extent;
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
                     const std::vector<py::object>& into, const py::object& threads, bool fresh) {
    return std::visit([&](auto& t) { return run(t, dy, dstate, into, threads, fresh); }, tape);
  }

  template <class T>
  py::tuple run(std::unique_ptr<StackTape<T>>& stack_tape, const py::object& dy,
                const py::object& dstate, const std::vector<py::object>& into,
                const py::object& threads, bool fresh) {
    if (consumed)
      throw std::runtime_error("tape: expected one that was not used yet; backward consumes it");
    const bool has_cell = cell_traits(spec.kind).has_cell;
    BackwardCall<T> call = {};
    call.threads = thread_count(threads);
    call.fresh = fresh;
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
      py::array_t<T> array(x_shape);
      call.dx = array.mutable_data();
      call.dx_layout = axes.layout(array, sizeof(T));
      dx = array;
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
      .def(
          "backward", &Tape::backward, py::arg("dy"), py::arg("dstate"), py::arg("into"),
          py::arg("threads"), py::arg("fresh") = false,
          "Adds the parameters' gradients to `into`, or with `fresh` writes them there whatever it "
          "holds, and returns (dx or None, dstate).")
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
