// Order between streams: events, memory that several streams use, and whole networks whose weights,
// forward and backward passes are on different streams. The emulator's streams do nothing here
// until the host waits for them, and the tests wait first for those that should come last: what is
// not ordered shows as missing values.
#include <array>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/emulator.h"
#include "cuda/runtime.h"
#include "cuda/stack.h"
#include "errors.h"

namespace {

using namespace fastrnn;
using namespace fastrnn::cuda;

void defer_streams(bool defer, uint64_t seed = 0) {
  emulator::Options options;
  options.seed = seed;
  options.defer_streams = defer;
  emulator::configure(options);
}

// Streams by any address, as other libraries bring them.
Stream stream(int i) {
  static char handles[16];
  return {&handles[i]};
}

template <class T>
Memory upload(const std::vector<T>& values, Stream on) {
  Memory memory = allocate<T>(static_cast<int64_t>(values.size()), on);
  copy_to_device(memory.data(), values.data(), memory.bytes(), on);
  synchronize(on);
  return memory;
}
template <class T>
std::vector<T> download(const Memory& memory, Stream on) {
  std::vector<T> values(memory.bytes() / sizeof(T));
  copy_to_host(values.data(), memory.data(), memory.bytes(), on);
  return values;
}

struct Set {
  int* to;
  int value;
  FASTRNN_HD void operator()(int64_t) const { *to = value; }
};

// --- Events --------------------------------------------------------------------------------------

void test_events() {
  defer_streams(true);
  const Stream a = stream(0), b = stream(1), c = stream(2);
  const Memory memory = upload(std::vector<int>{1}, c);
  const auto seen_by = [&](Stream who) { return download<int>(memory, who)[0]; };
  for_each(a, 1, Set{memory.data<int>(), 2});
  CHECK_EQ(seen_by(b), 1);  // nobody has waited for a
  Event event(a);
  for_each(a, 1, Set{memory.data<int>(), 3});
  CHECK(!event.reached());
  event.wait(b);
  CHECK_EQ(seen_by(b), 2);  // what came before the event, and no more
  CHECK(event.reached());
  Event none, moved = std::move(event);
  CHECK(none.reached() && moved.reached());
  none.wait(b);
  CHECK_EQ(seen_by(b), 2);
  // What is told to wait waits for what the event stood for then.
  moved = Event(a);
  moved.wait(b);
  moved = Event(c);
  CHECK_EQ(seen_by(b), 3);
  // By way of a third stream.
  for_each(a, 1, Set{memory.data<int>(), 4});
  wait_for(b, a);
  wait_for(c, b);
  wait_for(a, a);
  CHECK_EQ(seen_by(c), 4);
  // Copies of few bytes are in the stream's order; the host is free to change them.
  int value = 6;
  copy_to_device(memory.data(), &value, sizeof(value), a);
  value = 7;
  CHECK_EQ(seen_by(b), 4);
  wait_for(b, a);
  CHECK_EQ(seen_by(b), 6);
  const std::vector<char> large(kSmallCopy + 1, 1);
  const Memory other = allocate<char>(kSmallCopy + 1, a);
  copy_to_device(other.data(), large.data(), large.size(), a);  // waits
  CHECK(download<char>(other, b) == large);

  Event ready(a);
  const Graph graph = Graph::record([&](Stream recorded) {
    CHECK(contains(error_of([&] { Event{recorded}; }), "recorded"));
    CHECK(contains(error_of([&] { ready.wait(recorded); }), "recorded"));
    CHECK(contains(error_of([&] { wait_for(a, recorded); }), "recorded"));
    for_each(recorded, 1, Set{memory.data<int>(), 5});
  });
  graph.replay(a);
  CHECK_EQ(seen_by(b), 6);
  synchronize(a);
  CHECK_EQ(seen_by(b), 5);
}

void test_memory_that_is_given_back() {
  defer_streams(true);
  const Stream a = stream(0), b = stream(1);
  const size_t before = emulator::live_bytes();
  for (const bool ordered : {true, false}) {
    Memory memory = allocate<int>(1, a);
    for_each(b, 1, Set{memory.data<int>(), 1});
    if (ordered) wait_for(a, b);
    memory = Memory();
    CHECK_EQ(emulator::live_bytes(), before + sizeof(int));  // a has not come to it yet
    synchronize(a);
    CHECK_EQ(emulator::live_bytes(), before);
    synchronize(b);
    CHECK_EQ(contains(error_of([] { defer_streams(true); }), "given back"), !ordered);
  }
  Memory memory = allocate<int>(1, a);
  memory.give_back_on(b);
  for_each(b, 1, Set{memory.data<int>(), 1});
  memory = Memory();
  synchronize(a);
  CHECK_EQ(emulator::live_bytes(), before + sizeof(int));
  CHECK_EQ(error_of([] { defer_streams(true); }), "");
  CHECK_EQ(emulator::live_bytes(), before);
}

// --- Networks ------------------------------------------------------------------------------------

using Values = std::vector<float>;

Values random_values(int64_t n, unsigned seed) {
  std::mt19937 bits(seed);
  Values values(static_cast<size_t>(n));
  for (float& value : values) value = std::uniform_real_distribution<float>(-0.5f, 0.5f)(bits);
  return values;
}

// A network, and what one call of it takes and leaves.
struct Problem {
  StackSpec spec = {CellKind::kLstm, 3, 5, 2, 2, true};
  Precision precision = Precision::kFloat32;
  int64_t T = 70, B = 2;  // T: more than a recorded group
  int64_t checkpoint_every = 0;
  bool token_ids = false, resets = false;

  int64_t states() const { return spec.count() * B * spec.H; }
  int64_t features() const { return spec.H * spec.directions; }
  std::array<int64_t, 4> parameters(int i) const {
    const int64_t rows = 4 * spec.H;
    return {rows * spec.input_size(i / spec.directions), rows * spec.H, rows, rows};
  }
};

struct Weights {
  std::vector<std::array<Memory, 4>> memory;

  Weights(const Problem& p, Stream on, bool zero) {
    for (int i = 0; i < p.spec.count(); ++i) {
      memory.emplace_back();
      for (size_t k = 0; k < 4; ++k) {
        const int64_t n = p.parameters(i)[k];
        memory.back()[k] = upload(
            zero ? Values(static_cast<size_t>(n))
                 : random_values(n, static_cast<unsigned>(10 * i) + static_cast<unsigned>(k)),
            on);
      }
    }
  }
};

template <class S>
std::shared_ptr<const DeviceStack<S>> make_stack(const Problem& p, Stream on) {
  const Weights weights(p, on, false);
  std::vector<DeviceWeights<float>> pointers;
  for (const auto& w : weights.memory)
    pointers.push_back(
        {w[0].data<float>(), w[1].data<float>(), w[2].data<float>(), w[3].data<float>()});
  return std::make_shared<const DeviceStack<S>>(p.spec, p.precision, pointers, on);
}

template <class S>
struct Call {
  Memory x, ids, reset, y, hn, cn;
  DeviceCall<S> call = {};

  Call(const Problem& p, Stream on, unsigned seed = 1) {
    x = upload(random_values(p.T * p.B * p.spec.I, seed), on);
    std::vector<int64_t> host_ids(static_cast<size_t>(p.T * p.B));
    for (size_t i = 0; i < host_ids.size(); ++i)
      host_ids[i] = static_cast<int64_t>(i * i + seed) % p.spec.I;
    ids = upload(host_ids, on);
    std::vector<uint8_t> marks(static_cast<size_t>(p.T * p.B));
    for (size_t i = 0; i < marks.size(); ++i) marks[i] = i % 5 == 2;
    reset = upload(marks, on);
    y = allocate<float>(p.T * p.B * p.features(), on);
    hn = allocate<float>(p.states(), on);
    cn = allocate<float>(p.states(), on);
    call.steps = p.T;
    call.batch = p.B;
    if (p.token_ids) {
      call.ids = ids.data<int64_t>();
      call.ids_layout = {p.B, 1, nullptr};
      call.host_ids = host_ids;
    } else {
      call.x = {x.data(), DType::kFloat32, {p.B * p.spec.I, p.spec.I, nullptr}, 1};
    }
    if (p.resets) {
      call.reset = reset.data<uint8_t>();
      call.reset_layout = {p.B, 1, nullptr};
    }
    call.y = {y.data(), DType::kFloat32, {p.B * p.features(), p.features(), nullptr}, 1};
    call.hn = hn.data<float>();
    call.cn = cn.data<float>();
    call.stream = on;
    call.checkpoint_every = p.checkpoint_every;
  }

  std::vector<Values> results(Stream on) const {
    return {download<float>(y, on), download<float>(hn, on), download<float>(cn, on)};
  }
};

template <class S>
struct BackwardCall {
  Weights gradients;
  Memory dy, dx, dh0, dc0;
  DeviceBackwardCall<S> call = {};

  BackwardCall(const Problem& p, Stream on) : gradients(p, on, true) {
    dy = upload(random_values(p.T * p.B * p.features(), 2), on);
    dx = allocate<float>(p.T * p.B * p.spec.I, on);
    dh0 = allocate<float>(p.states(), on);
    dc0 = allocate<float>(p.states(), on);
    fill_bytes(dx.data(), 0, dx.bytes(), on);
    call.dy = {dy.data(), DType::kFloat32, {p.B * p.features(), p.features(), nullptr}, 1};
    if (!p.token_ids)
      call.dx = {dx.data(), DType::kFloat32, {p.B * p.spec.I, p.spec.I, nullptr}, 1};
    call.dh0 = dh0.data<float>();
    call.dc0 = dc0.data<float>();
    for (auto& g : gradients.memory)
      call.gradients.push_back(
          {g[0].data<float>(), g[1].data<float>(), g[2].data<float>(), g[3].data<float>()});
    call.stream = on;
  }

  std::vector<Values> results(Stream on) const {
    std::vector<Values> all = {download<float>(dx, on), download<float>(dh0, on),
                               download<float>(dc0, on)};
    for (const auto& g : gradients.memory)
      for (const Memory& memory : g) all.push_back(download<float>(memory, on));
    return all;
  }
};

void check_same(const std::vector<Values>& got, const std::vector<Values>& want) {
  CHECK_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i)
    CHECK(got[i].size() == want[i].size() &&
          std::memcmp(got[i].data(), want[i].data(), want[i].size() * sizeof(float)) == 0);
}

// The results of the forward pass, then those of the backward pass. Packed on one stream, forward
// on another and backward on a third, some of which may be the same; `first` is waited for before
// the others.
template <class S>
std::vector<Values> train(const Problem& p, Stream packed_on, Stream forward_on, Stream backward_on,
                          Stream first) {
  const Call<S> call(p, forward_on);
  BackwardCall<S> back(p, backward_on);
  auto stack = make_stack<S>(p, packed_on);
  auto tape = std::make_unique<DeviceTape<S>>(stack, call.call);
  tape->backward(back.call);
  // All is given back before anything is waited for.
  tape.reset();
  stack.reset();
  synchronize(first);
  const std::vector<Values> gradients = back.results(backward_on);
  std::vector<Values> results = call.results(forward_on);
  results.insert(results.end(), gradients.begin(), gradients.end());
  return results;
}

template <class S>
std::vector<Values> expected_training(const Problem& p) {
  defer_streams(false);
  return train<S>(p, stream(0), stream(0), stream(0), stream(0));
}

template <class S>
void check_training(const Problem& p) {
  const std::vector<Values> want = expected_training<S>(p);
  uint64_t seed = 0;
  for (const std::array<int, 3>& on :
       {std::array<int, 3>{0, 0, 0}, {0, 1, 1}, {0, 0, 1}, {0, 1, 0}, {0, 1, 2}, {2, 1, 0}}) {
    const Stream packed = stream(on[0]), forward = stream(on[1]), backward = stream(on[2]);
    for (const Stream first : {keeper(), forward, backward}) {
      defer_streams(true, seed++);
      check_same(train<S>(p, packed, forward, backward, first), want);
      // Nothing was used after its end.
      CHECK_EQ(error_of([] { defer_streams(false); }), "");
    }
  }
}

// The owners of streams destroy them as soon as a call is over.
template <class S>
void check_streams_that_are_destroyed(const Problem& p) {
  const std::vector<Values> want = expected_training<S>(p);
  defer_streams(true);
  const Stream lasting = stream(0);
  Call<S> call(p, lasting);
  BackwardCall<S> back(p, lasting);
  auto stack = make_stack<S>(p, stream(1));
  emulator::destroy(stream(1));
  call.call.stream = stream(2);
  auto tape = std::make_unique<DeviceTape<S>>(stack, call.call);
  auto without_backward = std::make_unique<DeviceTape<S>>(stack, call.call);
  emulator::destroy(stream(2));
  without_backward.reset();
  back.call.stream = stream(3);
  wait_for(stream(3), lasting);
  tape->backward(back.call);
  emulator::destroy(stream(3));
  tape.reset();
  call.call.stream = stream(4);
  device_forward<S>(*stack, call.call);
  emulator::destroy(stream(4));
  stack.reset();
  std::vector<Values> got = call.results(lasting);
  for (Values& values : back.results(lasting)) got.push_back(std::move(values));
  check_same(got, want);
  CHECK(contains(error_of([] { Event{stream(4)}; }), "destroyed"));
  CHECK_EQ(error_of([] { defer_streams(false); }), "");
}

// The weights are packed for the first call that needs them, and others on other streams use them
// at the same time. All of them use the recordings of steps, of which there are fewer.
template <class S>
void check_inference_side_by_side(const Problem& p, uint64_t seed) {
  constexpr int kCalls = 7;
  std::vector<std::vector<Values>> want;
  defer_streams(false);
  const auto reference = make_stack<S>(p, stream(0));
  for (int i = 0; i < kCalls; ++i) {
    const Call<S> call(p, stream(0), static_cast<unsigned>(i));
    device_forward<S>(*reference, call.call);
    want.push_back(call.results(stream(0)));
  }
  defer_streams(true, seed);
  std::vector<std::unique_ptr<Call<S>>> calls;
  for (int i = 0; i < kCalls; ++i)
    calls.push_back(std::make_unique<Call<S>>(p, stream(i), static_cast<unsigned>(i)));
  auto stack = make_stack<S>(p, stream(8));
  for (const auto& call : calls) device_forward<S>(*stack, call->call);
  stack.reset();
  synchronize(stream(8));                     // where the weights were made
  if (seed % 2 == 1) synchronize(stream(0));  // where they were packed
  for (int i = kCalls; i-- > 0;) {
    const auto at = static_cast<size_t>(i);
    check_same(calls[at]->results(stream(i)), want[at]);
    if (i == kCalls / 2) synchronize(keeper());
  }
  calls.clear();
  CHECK_EQ(error_of([] { defer_streams(false); }), "");
}

template <class S>
void check_weights_without_a_call(const Problem& p) {
  defer_streams(true);
  make_stack<S>(p, stream(0));
  synchronize(keeper());
  CHECK_EQ(error_of([] { defer_streams(false); }), "");
}

}  // namespace

int main() {
  test_events();
  test_memory_that_is_given_back();
  Problem plain, checkpoints, tokens, sixteen;
  checkpoints.checkpoint_every = 66;
  checkpoints.resets = true;
  tokens.token_ids = true;
  tokens.checkpoint_every = 3;
  tokens.T = 7;
  sixteen.precision = Precision::kBfloat16;  // the cluster family
  sixteen.spec = {CellKind::kLstm, 3, 16, 1, 1, true};
  sixteen.T = 4;
  for (const Problem& p : {plain, checkpoints, tokens}) {
    check_training<float>(p);
    check_streams_that_are_destroyed<float>(p);
  }
  for (uint64_t seed = 0; seed < 4; ++seed) check_inference_side_by_side<float>(plain, seed);
  check_weights_without_a_call<float>(plain);
  check_training<Bfloat16>(sixteen);
  check_inference_side_by_side<Bfloat16>(sixteen, 0);
  return check_report();
}
