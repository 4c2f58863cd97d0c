// The emulator of cuda/emulator.h, and cuda/runtime.h on the host.
//
// A launch is a Machine: blocks that run together (a "gang": one block, one cluster, or a whole
// cooperative grid), whose threads are fibers. The host's side takes a thread that can go on,
// switches to it, and gets back when the thread waits, yields or returns. Threads that wait for
// each other are counted per warp, and warps per block or cluster; the last to arrive lets all go
// on.
#include "cuda/emulator.h"

#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "core/fpenv.h"
#include "cuda/emulator_fiber.h"
#include "cuda/half.h"

namespace fastrnn {
namespace cuda {
namespace emulator {

__thread Running running = {nullptr, 0};

namespace {

constexpr unsigned kWarp = 32;
constexpr int kPoison = 0xFF;
constexpr unsigned kNamedBarriers = 16;
constexpr size_t kReservedShared = 1024;  // that CUDA takes of each block
// SMs that a cluster can spread over. An H200's differ (16 or 18), and its 132 hold about 7
// clusters of 16.
constexpr int kGpc = 18;
constexpr unsigned kLargestCluster = 16;

// splitmix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  size_t below(size_t n) { return static_cast<size_t>(next() % n); }
  bool one_in(size_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

// The work of a stream that waits for its turn, in pieces. One without work waits itself: for the
// first `end` pieces of another stream.
struct Piece {
  std::function<void()> work;
  const void* other = nullptr;
  uint64_t end = 0;
};
struct Queue {
  std::deque<Piece> pieces;
  uint64_t done = 0;  // pieces that are gone
  bool destroyed = false;
  uint64_t end() const { return done + pieces.size(); }
};

// What the process shares. Never destroyed: device memory may be given back by static objects.
struct Process {
  std::mutex mutex;  // of all but what has its own
  Options options;
  uint64_t launches = 0;
  std::map<uintptr_t, size_t> memory;  // first address -> bytes, of what is allocated
  size_t live_bytes = 0;
  std::vector<std::pair<void*, size_t>> given_back;  // of deferred streams
  std::atomic<pid_t> owner{0};
  std::recursive_mutex turn;  // of the deferred streams; locked before `mutex`
  std::map<const void*, Queue> queues;
  std::atomic<bool> defer{false};

  Process() {
    const char* const wanted = getenv("FASTRNN_CUDA_DEFER");
    defer = options.defer_streams = wanted != nullptr && *wanted == '1';
  }
};
Process& process() {
  static Process* const state = new Process;
  return *state;
}

Options current_options() {
  const std::lock_guard<std::mutex> lock(process().mutex);
  return process().options;
}

// The randomness of the next launch; {.., false} where there is to be none.
std::pair<Random, bool> next_random() {
  const std::lock_guard<std::mutex> lock(process().mutex);
  Random mix(process().options.seed + 0x632BE59BD9B4E019u * ++process().launches);
  return {Random(mix.next()), process().options.seed != 0};
}

Order order_of(int64_t n, Random& random, bool is_random) {
  if (!is_random || n < 2) return {0, 1};
  const size_t size = static_cast<size_t>(n);
  int64_t step;
  do step = static_cast<int64_t>(random.below(size));
  while (std::gcd(step, n) != 1);
  return {static_cast<int64_t>(random.below(size)), step};
}

std::string text(const Site& site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}
std::string text(const Index3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

// ---------------------------------------------------------------------------------------------------
// What a launch consists of
// ---------------------------------------------------------------------------------------------------

// What a thread waits for.
enum class Wait : uint8_t {
  kNothing,
  kSyncThreads,
  kNamedBarrier,
  kClusterSync,
  kShuffleXor,
  kShuffleDown,
  kMma,
  kLdmatrix,
  kMbarrier
};
const char* text(Wait wait) {
  constexpr const char* kNames[] = {"nothing",      "sync_threads", "named_barrier",
                                    "cluster_sync", "shuffle_xor",  "shuffle_down",
                                    "mma_16x8x16",  "ldmatrix_x4",  "mbarrier_wait"};
  return kNames[static_cast<int>(wait)];
}

struct Block;

struct Thread {
  Block* block;
  unsigned index;
  Fiber* fiber = nullptr;  // none before its first and after its last turn
  Wait wait = Wait::kNothing;
  Site site = {"", 0};       // of `wait`
  void* operands = nullptr;  // of the collective of its warp that it waits at
};

struct Warp {
  unsigned lanes, live;  // threads; those that have not returned
  // The collective that `waiting` of its lanes have come to.
  unsigned waiting = 0;
  Wait wait = Wait::kNothing;
  Site site = {"", 0};
  int id = 0, threads = 0;  // of a named barrier
  bool counted = false;     // at the barrier of the block or cluster
};

// See the words' description in cuda/ptx.h; the counts and their limits are PTX's.
struct Mbarrier {
  static constexpr int64_t kMost = (1 << 20) - 1;
  Site site;        // of its initialisation
  uint32_t offset;  // in the block's shared memory
  int64_t count;
  int64_t pending;     // arrivals that the phase still waits for
  int64_t bytes = 0;   // expected, less those that came
  uint64_t phase = 0;  // those that ended
  std::vector<Thread*> waiters = {};

  // What the word in shared memory reads, so that overwriting it is noticed.
  uint64_t word() const {
    return (phase & 1u) << 63 | uint64_t{1} << 62 | static_cast<uint64_t>(bytes & 0x1FFFFF) << 40 |
           static_cast<uint64_t>(pending) << 20 | static_cast<uint64_t>(count);
  }
};

struct Cluster {
  std::vector<Block*> blocks;
  unsigned live = 0;     // threads that have not returned
  unsigned arrived = 0;  // threads at cluster_sync
};

struct Block {
  BlockView view;
  Cluster* cluster;
  unsigned live;  // threads that have not returned
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  struct Barrier {
    unsigned arrived = 0;
    int threads = 0;
  } barriers[kNamedBarriers];  // 0: sync_threads
  std::vector<Mbarrier> mbarriers;

  Warp& warp_of(const Thread& thread) { return warps[thread.index / kWarp]; }
};

// A store_async under way.
struct Transaction {
  Block* to;
  uint32_t offset, mbarrier;  // in its shared memory
  unsigned words;
  uint32_t data[4];
  bool landed;  // and not yet counted
  Site site;
};

// A relaxed store that only its thread knows of.
struct DelayedStore {
  const Thread* by;
  unsigned char* to;
  uint32_t data[4];
};

struct FreeShared {
  void operator()(unsigned char* p) const { free(p); }
};
using SharedMemory = std::unique_ptr<unsigned char, FreeShared>;

// Of exactly that size, for the address sanitizer.
SharedMemory allocate_shared(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 128, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  return SharedMemory(static_cast<unsigned char*>(p));
}

// Of this host thread.
Fiber& host_fiber() {
  static thread_local Fiber host;
  return host;
}
FiberPool& fiber_pool() {
  static thread_local FiberPool pool;
  return pool;
}

// ---------------------------------------------------------------------------------------------------
// The machine
// ---------------------------------------------------------------------------------------------------

class Machine {
 public:
  Machine(const Launch& how, const std::function<void()>& kernel, const Options& options,
          std::pair<Random, bool> random)
      : how_(how),
        kernel_(kernel),
        random_(random.first),
        is_random_(random.second),
        delay_stores_(random.second && options.delay_stores),
        host_(host_fiber()) {
    constexpr size_t kDeliveryOdds[] = {2, 8, 32};
    delivery_odds_ = kDeliveryOdds[random_.below(3)];
  }
  ~Machine();

  void run();

  // The words, called by the thread that runs.
  void barrier(Wait wait, int id, int threads, Site site);
  void collective(Wait wait, void* operands, void (*complete)(Thread* lanes), Site site);
  void mbarrier_init(uint64_t* word, int count, Site site);
  void mbarrier_expect(uint64_t* word, uint32_t bytes, Site site);
  void mbarrier_wait(uint64_t* word, unsigned parity, Site site);
  uint32_t remote(const void* mine, unsigned rank, Site site);
  void store_async(uint32_t to, const uint32_t* words, unsigned count, uint32_t mbarrier,
                   Site site);
  void load_relaxed(uint32_t* words, const void* from, Site site);
  void store_relaxed(void* to, const uint32_t* words, Site site);
  // Throws unless `bytes` at p lie in the running block's shared memory, aligned to `alignment`;
  // returns their offset.
  uint32_t shared_offset(const void* p, size_t bytes, size_t alignment, const char* what,
                         Site site) const;
  [[noreturn]] void fail(Site site, const std::string& what) const;

 private:
  void build_gang(size_t blocks);
  void start_gang(size_t first_block);
  void run_gang();

  // The host's side.
  Thread* choose();
  void choose_starved();
  void resume(Thread* thread);
  static void fiber_main();
  [[noreturn]] void report_deadlock() const;

  // The thread's side.
  void suspend();
  void yield();
  void returned();
  void block_returned(const Block& block) const;
  void join_warp(Warp& warp, Wait wait, int id, int threads, Site site);
  void count_warp(Block& block, Warp& warp);
  void release(Block& block, Warp& warp);
  void release_block(Block& block, Wait wait, int id);
  void release_cluster_if_complete(Cluster& cluster);
  void make_runnable(Thread* thread);
  void progress() { polls_ = 0; }

  Mbarrier& find_mbarrier(Block& block, uint32_t offset, Site site) const;
  void update(Block& block, Mbarrier& mbarrier, Site site);
  void land(Transaction& transaction) const;
  void count(const Transaction& transaction);
  void deliver_one();
  template <class Match>
  void make_visible(const Match& match);

  const Launch how_;
  const std::function<void()>& kernel_;
  Random random_;
  const bool is_random_, delay_stores_;
  size_t delivery_odds_;  // one turn in so many goes to a delivery

  std::vector<std::unique_ptr<Block>> gang_;
  std::vector<SharedMemory> shared_;
  std::vector<Cluster> clusters_;
  unsigned live_ = 0;

  Fiber& host_;
  Thread* current_ = nullptr;
  std::exception_ptr failure_;
  // A ring of the threads that can go on; its size is a power of two.
  Thread*& ring(size_t i) { return runnable_[(first_runnable_ + i) & (runnable_.size() - 1)]; }
  std::vector<Thread*> runnable_;
  size_t first_runnable_ = 0, runnable_count_ = 0;
  // The warp, or the block, that rarely gets a turn at present.
  const Block* starved_block_ = nullptr;
  const Warp* starved_warp_ = nullptr;
  size_t turns_ = 0;  // until that changes

  std::vector<Transaction> transactions_;
  std::vector<DelayedStore> stores_;
  uint64_t polls_ = 0;  // relaxed loads since anything else happened
};

thread_local Machine* machine = nullptr;

Machine::~Machine() {
  for (const std::unique_ptr<Block>& block : gang_) {
    for (const Thread& thread : block->threads) {
      if (thread.fiber == nullptr) continue;
      thread.fiber->abandon();
      fiber_pool().give_back(thread.fiber);
    }
  }
}

void Machine::fail(Site site, const std::string& what) const {
  throw Error(text(site) + ": block " + text(current_->block->view.index) + ", thread " +
              std::to_string(current_->index) + ": " + what);
}

void Machine::run() {
  const size_t blocks = size_t{how_.grid.x} * how_.grid.y * how_.grid.z;
  const size_t gang = how_.cooperative ? blocks : static_cast<size_t>(how_.cluster);
  build_gang(gang);
  const int64_t gangs = static_cast<int64_t>(blocks / gang);
  const Order order = order_of(gangs, random_, is_random_);
  int64_t which = order.first;
  for (int64_t done = 0; done < gangs; ++done) {
    start_gang(static_cast<size_t>(which) * gang);
    run_gang();
    which = (which + order.step) % gangs;
  }
}

void Machine::build_gang(size_t blocks) {
  const size_t threads = static_cast<size_t>(how_.block);
  size_t ring = 1;
  while (ring < blocks * threads) ring *= 2;
  runnable_.resize(ring);
  clusters_.resize(blocks / static_cast<size_t>(how_.cluster));
  for (size_t b = 0; b < blocks; ++b) {
    gang_.push_back(std::make_unique<Block>());
    shared_.push_back(allocate_shared(how_.shared));
    Block& block = *gang_.back();
    block.cluster = &clusters_[b / static_cast<size_t>(how_.cluster)];
    block.cluster->blocks.push_back(&block);
    block.view.threads = static_cast<unsigned>(threads);
    block.view.grid = how_.grid;
    block.view.cluster_rank = static_cast<unsigned>(b % static_cast<size_t>(how_.cluster));
    block.view.shared = shared_.back().get();
  }
}

// The gang's blocks become those from first_block on, in the order x, y, z.
void Machine::start_gang(size_t first_block) {
  const unsigned threads = static_cast<unsigned>(how_.block);
  live_ = 0;
  for (Cluster& cluster : clusters_) cluster.live = cluster.arrived = 0;
  for (size_t b = 0; b < gang_.size(); ++b) {
    Block& block = *gang_[b];
    const size_t at = first_block + b;
    block.view.index.x = static_cast<unsigned>(at % how_.grid.x);
    block.view.index.y = static_cast<unsigned>(at / how_.grid.x % how_.grid.y);
    block.view.index.z = static_cast<unsigned>(at / how_.grid.x / how_.grid.y);
    block.mbarriers.clear();
    std::fill(std::begin(block.barriers), std::end(block.barriers), Block::Barrier());
    memset(block.view.shared, kPoison, how_.shared);
    block.threads.clear();
    block.warps.clear();
    for (unsigned i = 0; i < threads; ++i) {
      if (i % kWarp == 0) {
        const unsigned lanes = std::min(kWarp, threads - i);
        block.warps.push_back(Warp{lanes, lanes});
      }
      block.threads.push_back(Thread{&block, i});
    }
    block.live = threads;
    block.cluster->live += threads;
    live_ += threads;
    for (Thread& thread : block.threads) make_runnable(&thread);
  }
}

void Machine::run_gang() {
  while (live_ > 0) {
    const bool pending = !transactions_.empty() || !stores_.empty();
    if (pending && (runnable_count_ == 0 || random_.one_in(delivery_odds_))) {
      deliver_one();
    } else if (runnable_count_ > 0) {
      resume(choose());
      if (failure_ != nullptr) std::rethrow_exception(failure_);
    } else {
      report_deadlock();
    }
  }
  make_visible([](const DelayedStore&) { return true; });
}

// ---------------------------------------------------------------------------------------------------
// Turns
// ---------------------------------------------------------------------------------------------------

void Machine::make_runnable(Thread* thread) {
  thread->wait = Wait::kNothing;
  ring(runnable_count_++) = thread;
}

// For 8 to 131072 turns one warp or block, or none, rarely gets one: the longest are more than a
// step, so that others get ahead as far as their synchronisation lets them.
void Machine::choose_starved() {
  turns_ = size_t{8} << random_.below(15);
  const Block& block = *gang_[random_.below(gang_.size())];
  starved_block_ = random_.one_in(2) ? nullptr : &block;
  starved_warp_ = random_.one_in(2) ? nullptr : &block.warps[random_.below(block.warps.size())];
}

// The next of the ring or, at random, any of it: that one changes places with the next.
Thread* Machine::choose() {
  Thread*& next = ring(0);
  if (is_random_) {
    if (turns_-- == 0) choose_starved();
    for (int tries = 0; tries < 8; ++tries) {
      std::swap(next, ring(random_.below(runnable_count_)));
      const bool starved =
          next->block == starved_block_ &&
          (starved_warp_ == nullptr || &next->block->warp_of(*next) == starved_warp_);
      if (!starved) break;
    }
  }
  Thread* const thread = next;
  ++first_runnable_;
  --runnable_count_;
  return thread;
}

void Machine::resume(Thread* thread) {
  if (thread->fiber == nullptr) {
    thread->fiber = fiber_pool().take();
    thread->fiber->prepare(&Machine::fiber_main);
    progress();
  }
  current_ = thread;
  running = {&thread->block->view, thread->index};
  Fiber::change(host_, *thread->fiber);
  running = {nullptr, 0};
  if (thread->wait == Wait::kNothing && current_ == nullptr) {  // it has returned
    if (thread->fiber->overflowed()) throw Error("a kernel's thread has overflowed its stack");
    fiber_pool().give_back(thread->fiber);
    thread->fiber = nullptr;
  }
}

// One thread after the other, of this machine and of those to come: whoever is current_ when the
// host switches here.
void Machine::fiber_main() {
  Fiber::entered(host_fiber());
  for (;;) {
    Machine& m = *machine;
    Fiber& fiber = *m.current_->fiber;
    try {
      m.kernel_();
      m.returned();
    } catch (...) {
      m.failure_ = std::current_exception();
    }
    m.current_ = nullptr;
    Fiber::change(fiber, m.host_);
  }
}

void Machine::suspend() {
  Thread* const thread = current_;
  Fiber::change(*thread->fiber, host_);
}

// Lets others go first.
void Machine::yield() {
  make_runnable(current_);
  suspend();
}

// The running thread has come to its end.
void Machine::returned() {
  Thread& thread = *current_;
  Block& block = *thread.block;
  Warp& warp = block.warp_of(thread);
  progress();
  --live_;
  --warp.live;
  --block.live;
  --block.cluster->live;
  if (warp.waiting > 0) {
    if (warp.wait != Wait::kSyncThreads && warp.wait != Wait::kClusterSync) {
      fail(warp.site, std::string("returns while lanes of its warp wait at ") + text(warp.wait));
    }
    if (warp.waiting == warp.live) count_warp(block, warp);
  }
  if (block.barriers[0].arrived > 0 && block.barriers[0].arrived == block.live) {
    release_block(block, Wait::kSyncThreads, 0);
  }
  release_cluster_if_complete(*block.cluster);
  if (block.live == 0) block_returned(block);
}

// The last thread of the block has returned.
void Machine::block_returned(const Block& block) const {
  for (const Transaction& transaction : transactions_) {
    if (transaction.to == &block) {
      fail(transaction.site, "its block returns before this store_async to it has arrived");
    }
  }
  for (const Mbarrier& mbarrier : block.mbarriers) {
    if (mbarrier.bytes < 0) {
      fail(mbarrier.site, "its block returns after this mbarrier got " +
                              std::to_string(-mbarrier.bytes) + " bytes more than were expected");
    }
  }
}

void Machine::report_deadlock() const {
  std::string report = "deadlock:";
  constexpr int kShown = 16;
  int lines = 0;
  for (const std::unique_ptr<Block>& block : gang_) {
    for (size_t i = 0; i < block->threads.size();) {  // runs of threads that wait for the same
      const Thread& thread = block->threads[i];
      size_t end = i + 1;
      while (end < block->threads.size() && block->threads[end].wait == thread.wait &&
             block->threads[end].site.line == thread.site.line) {
        ++end;
      }
      if (thread.wait != Wait::kNothing && lines++ < kShown) {
        report += "\n  block " + text(block->view.index) + ", threads " + std::to_string(i) +
                  " to " + std::to_string(end - 1) + " wait at " + text(thread.wait) + " (" +
                  text(thread.site) + ")";
      }
      i = end;
    }
    for (const Mbarrier& mbarrier : block->mbarriers) {
      if (!mbarrier.waiters.empty() && lines++ < kShown) {
        report += "\n  block " + text(block->view.index) + ", mbarrier at " +
                  std::to_string(mbarrier.offset) + ": phase " + std::to_string(mbarrier.phase) +
                  ", arrivals missing " + std::to_string(mbarrier.pending) + ", bytes missing " +
                  std::to_string(mbarrier.bytes);
      }
    }
  }
  throw Error(report + (lines > kShown ? "\n  ..." : ""));
}

// ---------------------------------------------------------------------------------------------------
// Collectives
// ---------------------------------------------------------------------------------------------------

// The running thread is at a collective, as are `waiting` lanes of its warp, itself included.
void Machine::join_warp(Warp& warp, Wait wait, int id, int threads, Site site) {
  progress();
  if (warp.waiting == 0) {
    warp.wait = wait;
    warp.site = site;
    warp.id = id;
    warp.threads = threads;
  } else if (warp.wait != wait || warp.site.line != site.line || warp.id != id ||
             warp.threads != threads ||
             (warp.site.file != site.file && strcmp(warp.site.file, site.file) != 0)) {
    fail(site, std::string("is at ") + text(wait) + " while lanes of its warp are at " +
                   text(warp.wait) + " (" + text(warp.site) +
                   "), or at it with other arguments: the warp has diverged");
  }
  ++warp.waiting;
  current_->wait = wait;
  current_->site = site;
}

void Machine::release(Block& block, Warp& warp) {
  const size_t first = static_cast<size_t>(&warp - block.warps.data()) * kWarp;
  for (size_t i = first; i < first + warp.lanes; ++i) {
    Thread& thread = block.threads[i];
    if (thread.wait != Wait::kNothing && thread.wait != Wait::kMbarrier) make_runnable(&thread);
  }
  warp.waiting = 0;
  warp.counted = false;
}

void Machine::collective(Wait wait, void* operands, void (*complete)(Thread* lanes), Site site) {
  Thread& thread = *current_;
  Block& block = *thread.block;
  Warp& warp = block.warp_of(thread);
  if (warp.live != kWarp) {
    fail(site, std::string(text(wait)) + " needs all 32 lanes of the warp, which has " +
                   std::to_string(warp.live) + " threads (that have not returned)");
  }
  thread.operands = operands;
  join_warp(warp, wait, 0, 0, site);
  if (warp.waiting == kWarp) {
    complete(&block.threads[thread.index / kWarp * kWarp]);
    release(block, warp);
  }
  suspend();
}

void Machine::barrier(Wait wait, int id, int threads, Site site) {
  Block& block = *current_->block;
  Warp& warp = block.warp_of(*current_);
  if (wait == Wait::kNamedBarrier &&
      (id < 1 || id >= static_cast<int>(kNamedBarriers) || threads < static_cast<int>(kWarp) ||
       threads % static_cast<int>(kWarp) != 0 || threads > how_.block || warp.live != kWarp)) {
    fail(site, "named_barrier(" + std::to_string(id) + ", " + std::to_string(threads) +
                   "): it takes an id of 1 to 15 and whole warps");
  }
  join_warp(warp, wait, id, threads, site);
  if (warp.waiting == warp.live) count_warp(block, warp);
  suspend();
}

// All lanes of the warp have come to a barrier: they count there, and if they are the last, all go
// on.
void Machine::count_warp(Block& block, Warp& warp) {
  warp.counted = true;
  if (warp.wait == Wait::kClusterSync) {
    block.cluster->arrived += warp.waiting;
    release_cluster_if_complete(*block.cluster);
    return;
  }
  Block::Barrier& barrier = block.barriers[warp.id];
  if (barrier.arrived > 0 && barrier.threads != warp.threads) {
    fail(warp.site, "named_barrier(" + std::to_string(warp.id) + ", " +
                        std::to_string(warp.threads) + "): others of this round gave " +
                        std::to_string(barrier.threads) + " threads");
  }
  barrier.threads = warp.threads;
  barrier.arrived += warp.waiting;
  const unsigned all =
      warp.wait == Wait::kSyncThreads ? block.live : static_cast<unsigned>(warp.threads);
  if (barrier.arrived == all) release_block(block, warp.wait, warp.id);
}

void Machine::release_block(Block& block, Wait wait, int id) {
  make_visible([&](const DelayedStore& store) { return store.by->block == &block; });
  block.barriers[id].arrived = 0;
  for (Warp& warp : block.warps) {
    if (warp.counted && warp.wait == wait && warp.id == id) release(block, warp);
  }
}

void Machine::release_cluster_if_complete(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived != cluster.live) return;
  make_visible([&](const DelayedStore& store) { return store.by->block->cluster == &cluster; });
  cluster.arrived = 0;
  for (Block* block : cluster.blocks) {
    for (Warp& warp : block->warps) {
      if (warp.counted && warp.wait == Wait::kClusterSync) release(*block, warp);
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// Shared memory of the cluster
// ---------------------------------------------------------------------------------------------------

// A SharedAddress is the block's rank and the offset in its shared memory.
constexpr unsigned kOffsetBits = 20;
constexpr uint32_t kOffsetMask = (1u << kOffsetBits) - 1;

uint32_t Machine::shared_offset(const void* p, size_t bytes, size_t alignment, const char* what,
                                Site site) const {
  const uintptr_t base = reinterpret_cast<uintptr_t>(current_->block->view.shared);
  const uintptr_t offset = reinterpret_cast<uintptr_t>(p) - base;
  if (offset > how_.shared || how_.shared - offset < bytes) {
    fail(site, std::string(what) + " is not in the block's " + std::to_string(how_.shared) +
                   " bytes of shared memory");
  }
  if (offset % alignment != 0) {
    fail(site, std::string(what) + " is not aligned to " + std::to_string(alignment) + " bytes");
  }
  return static_cast<uint32_t>(offset);
}

Mbarrier& Machine::find_mbarrier(Block& block, uint32_t offset, Site site) const {
  for (Mbarrier& mbarrier : block.mbarriers) {
    if (mbarrier.offset != offset) continue;
    uint64_t word;
    memcpy(&word, block.view.shared + offset, sizeof(word));
    if (word != mbarrier.word()) fail(site, "the mbarrier was overwritten");
    return mbarrier;
  }
  fail(site, "there is no mbarrier at " + std::to_string(offset) +
                 " of the shared memory of block " + text(block.view.index) + ": not initialised");
}

// After a change of the counts: ends the phase if nothing is missing.
void Machine::update(Block& block, Mbarrier& mbarrier, Site site) {
  progress();
  if (mbarrier.pending < 0) fail(site, "the mbarrier's phase has all its arrivals already");
  if (mbarrier.bytes > Mbarrier::kMost || mbarrier.bytes < -Mbarrier::kMost) {
    fail(site, "the mbarrier counts at most 2^20 - 1 bytes");
  }
  if (mbarrier.pending == 0 && mbarrier.bytes < 0) {
    fail(site,
         "the mbarrier got " + std::to_string(-mbarrier.bytes) + " bytes more than were expected");
  }
  if (mbarrier.pending == 0 && mbarrier.bytes == 0) {
    ++mbarrier.phase;
    mbarrier.pending = mbarrier.count;
    for (Thread* waiter : mbarrier.waiters) make_runnable(waiter);
    mbarrier.waiters.clear();
  }
  const uint64_t word = mbarrier.word();
  memcpy(block.view.shared + mbarrier.offset, &word, sizeof(word));
}

void Machine::mbarrier_init(uint64_t* word, int count, Site site) {
  Block& block = *current_->block;
  const uint32_t offset = shared_offset(word, sizeof(*word), sizeof(*word), "the mbarrier", site);
  if (count < 1 || count > Mbarrier::kMost) fail(site, "an mbarrier counts 1 to 2^20 - 1 arrivals");
  for (const Mbarrier& other : block.mbarriers) {
    if (other.offset == offset) fail(site, "the mbarrier is initialised already");
  }
  block.mbarriers.push_back(Mbarrier{site, offset, count, count});
  *word = block.mbarriers.back().word();
  progress();
}

void Machine::mbarrier_expect(uint64_t* word, uint32_t bytes, Site site) {
  if (is_random_) yield();
  Block& block = *current_->block;
  const uint32_t offset = shared_offset(word, sizeof(*word), sizeof(*word), "the mbarrier", site);
  make_visible([this](const DelayedStore& store) { return store.by == current_; });
  Mbarrier& mbarrier = find_mbarrier(block, offset, site);
  mbarrier.bytes += bytes;
  mbarrier.pending -= 1;
  update(block, mbarrier, site);
}

// A thread that is woken looks again, as the device's loop does: by then the phase after may be
// over, and then it waits for one that looks the same.
void Machine::mbarrier_wait(uint64_t* word, unsigned parity, Site site) {
  Thread& thread = *current_;
  const uint32_t offset = shared_offset(word, sizeof(*word), sizeof(*word), "the mbarrier", site);
  if (parity > 1) fail(site, "a parity is 0 or 1");
  for (;;) {
    Mbarrier& mbarrier = find_mbarrier(*thread.block, offset, site);
    if ((mbarrier.phase & 1u) != parity) break;
    mbarrier.waiters.push_back(&thread);
    thread.wait = Wait::kMbarrier;
    thread.site = site;
    suspend();
  }
  progress();
  if (is_random_) yield();
}

uint32_t Machine::remote(const void* mine, unsigned rank, Site site) {
  const uint32_t offset = shared_offset(mine, 0, 1, "the address", site);
  if (rank >= static_cast<unsigned>(how_.cluster)) {
    fail(site, "the cluster has no block of rank " + std::to_string(rank));
  }
  return rank << kOffsetBits | offset;
}

void Machine::store_async(uint32_t to, const uint32_t* words, unsigned count_words,
                          uint32_t mbarrier, Site site) {
  if (is_random_) yield();
  progress();
  const uint32_t rank = to >> kOffsetBits, offset = to & kOffsetMask;
  const size_t bytes = 4 * count_words;
  if (rank >= static_cast<unsigned>(how_.cluster) || how_.shared < bytes ||
      offset > how_.shared - bytes) {
    fail(site, "store_async to outside of the shared memory of the cluster's blocks");
  }
  if (offset % bytes != 0) fail(site, "store_async to an address that is not aligned to its bytes");
  if (mbarrier >> kOffsetBits != rank) fail(site, "store_async with an mbarrier of another block");
  Block& block = *current_->block->cluster->blocks[rank];
  if (block.live == 0) fail(site, "store_async to a block that has returned");
  find_mbarrier(block, mbarrier & kOffsetMask, site);
  Transaction transaction = {&block, offset, mbarrier & kOffsetMask, count_words, {}, false, site};
  std::copy(words, words + count_words, transaction.data);
  if (is_random_) {
    transactions_.push_back(transaction);
  } else {
    land(transaction);
    count(transaction);
  }
}

void Machine::land(Transaction& transaction) const {
  memcpy(transaction.to->view.shared + transaction.offset, transaction.data, 4 * transaction.words);
  transaction.landed = true;
}

void Machine::count(const Transaction& transaction) {
  Mbarrier& mbarrier = find_mbarrier(*transaction.to, transaction.mbarrier, transaction.site);
  mbarrier.bytes -= 4 * transaction.words;
  update(*transaction.to, mbarrier, transaction.site);
}

// ---------------------------------------------------------------------------------------------------
// Global memory
// ---------------------------------------------------------------------------------------------------

// One of what is under way, any of them, comes further: data sent lands, or is counted after it has
// landed; a store becomes visible, after those of its thread to the same address.
void Machine::deliver_one() {
  progress();
  const size_t which = random_.below(transactions_.size() + stores_.size());
  if (which < transactions_.size()) {
    Transaction& transaction = transactions_[which];
    if (!transaction.landed) {
      land(transaction);
      if (random_.one_in(2)) return;
    }
    const Transaction done = transaction;
    transaction = transactions_.back();
    transactions_.pop_back();
    if (current_ == nullptr) current_ = &done.to->threads[0];  // to blame
    count(done);
    return;
  }
  const DelayedStore chosen = stores_[which - transactions_.size()];
  bool first = true;
  make_visible([&](const DelayedStore& store) {
    return store.by == chosen.by && store.to == chosen.to && std::exchange(first, false);
  });
}

// In the order in which they were made.
template <class Match>
void Machine::make_visible(const Match& match) {
  const auto done = [&](const DelayedStore& store) {
    if (!match(store)) return false;
    memcpy(store.to, store.data, sizeof(store.data));
    return true;
  };
  size_t kept = 0;
  for (size_t i = 0; i < stores_.size(); ++i) {
    if (!done(stores_[i])) stores_[kept++] = stores_[i];
  }
  stores_.resize(kept);
}

void Machine::load_relaxed(uint32_t* words, const void* from, Site site) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail(site, "load_relaxed needs 16-byte alignment");
  make_visible([&](const DelayedStore& store) { return store.by == current_ && store.to == from; });
  const uint64_t limit = (uint64_t{1} << 20) + uint64_t{4096} * live_;
  if (++polls_ > limit) {
    fail(site, "the kernel does nothing but load_relaxed: what it polls for does not come");
  }
  yield();
  memcpy(words, from, 16);
}

void Machine::store_relaxed(void* to, const uint32_t* words, Site site) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0)
    fail(site, "store_relaxed needs 16-byte alignment");
  if (is_random_) yield();
  progress();
  if (delay_stores_) {
    DelayedStore store = {current_, static_cast<unsigned char*>(to), {}};
    std::copy(words, words + 4, store.data);
    stores_.push_back(store);
  } else {
    memcpy(to, words, 16);
  }
}

// ---------------------------------------------------------------------------------------------------
// Matrices and shuffles: what the last lane to arrive does for all
// ---------------------------------------------------------------------------------------------------

struct ShuffleOperands {
  uint32_t value, result;
  int distance;
};

template <bool kXor>
void complete_shuffle(Thread* lanes) {
  const auto operands = [lanes](unsigned l) -> ShuffleOperands& {
    return *static_cast<ShuffleOperands*>(lanes[l].operands);
  };
  for (unsigned l = 0; l < kWarp; ++l) {
    const unsigned distance = static_cast<unsigned>(operands(l).distance);
    const unsigned from = kXor ? l ^ distance : l + distance;
    operands(l).result = operands(from < kWarp ? from : l).value;
  }
}

struct MmaOperands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// The product by the layout of cuda/ptx.h. Each element is summed in double and rounded once; the
// device's own order and rounding are not specified, and no worse than float's.
template <class S>
void complete_mma(Thread* lanes) {
  const auto half = [](uint32_t word, unsigned i) {
    return static_cast<double>(to_float(S{static_cast<uint16_t>(word >> (16 * i))}));
  };
  double a[16][16], b[16][8], d[16][8];
  for (unsigned l = 0; l < kWarp; ++l) {
    const MmaOperands& own = *static_cast<MmaOperands*>(lanes[l].operands);
    const unsigned g = l / 4, t = l % 4;
    for (unsigned i = 0; i < 2; ++i) {
      for (unsigned r = 0; r < 4; ++r)
        a[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + i] = half(own.a[r], i);
      for (unsigned r = 0; r < 2; ++r) b[2 * t + 8 * r + i][g] = half(own.b[r], i);
      for (unsigned r = 0; r < 2; ++r)
        d[g + 8 * r][2 * t + i] = static_cast<double>(own.d[2 * r + i]);
    }
  }
  for (unsigned row = 0; row < 16; ++row) {
    for (unsigned k = 0; k < 16; ++k) {
      for (unsigned column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (unsigned l = 0; l < kWarp; ++l) {
    const MmaOperands& own = *static_cast<MmaOperands*>(lanes[l].operands);
    for (unsigned i = 0; i < 4; ++i) {
      own.d[i] = static_cast<float>(d[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2]);
    }
  }
}

struct LdmatrixOperands {
  uint32_t* r;
  const unsigned char* row;
};

void complete_ldmatrix(Thread* lanes) {
  for (unsigned l = 0; l < kWarp; ++l) {
    for (unsigned m = 0; m < 4; ++m) {
      const auto& row = *static_cast<LdmatrixOperands*>(lanes[8 * m + l / 4].operands);
      const auto& own = *static_cast<LdmatrixOperands*>(lanes[l].operands);
      memcpy(&own.r[m], row.row + 4 * (l % 4), 4);
    }
  }
}

Machine& running_machine() {
  if (running.block == nullptr) outside_kernel();
  return *machine;
}

// Makes a Machine the one that runs on this host thread.
class MachineScope {
 public:
  explicit MachineScope(Machine& m) {
    if (machine != nullptr) throw Error("a launch from within a kernel");
    machine = &m;
  }
  ~MachineScope() { machine = nullptr; }
  MachineScope(const MachineScope&) = delete;
  MachineScope& operator=(const MachineScope&) = delete;
};

int threads_per_multiprocessor(const Options& options) {
  const int version = 10 * options.major + options.minor;
  return version == 86 || version == 87 || version == 89 || version >= 120 ? 1536 : 2048;
}

void check_launch(const Launch& how, const Options& options) {
  const auto require = [](bool ok, const char* what) {
    if (!ok) throw Error(std::string("launch: ") + what);
  };
  require(how.block >= 1 && how.block <= 1024, "a block has 1 to 1024 threads");
  require(how.grid.x >= 1 && how.grid.x <= 0x7FFFFFFFu && how.grid.y >= 1 && how.grid.y <= 65535 &&
              how.grid.z >= 1 && how.grid.z <= 65535,
          "the grid has 1 to 2^31 - 1, 65535, 65535 blocks");
  require(how.shared <= options.shared_per_block, "more shared memory than a block can have");
  require(how.cluster >= 1 && how.grid.x % static_cast<unsigned>(how.cluster) == 0,
          "the grid is not a whole number of clusters");
  if (how.cluster > 1) {
    require(options.major >= 9, "clusters need compute capability 9.0");
    require(how.cluster <= static_cast<int>(kLargestCluster), "a cluster has at most 16 blocks");
    require(resident_clusters(how) >= 1, "no cluster fits on the device");
  }
  if (how.cooperative) {
    const uint64_t blocks = uint64_t{how.grid.x} * how.grid.y * how.grid.z;
    const uint64_t resident =
        how.cluster > 1
            ? static_cast<uint64_t>(resident_clusters(how)) * static_cast<uint64_t>(how.cluster)
            : static_cast<uint64_t>(options.multiprocessors) *
                  static_cast<uint64_t>(resident_blocks(how.block, how.shared));
    require(blocks <= resident, "too many blocks for a cooperative launch");
  }
}

bool can_go_on(const Queue& queue) {
  if (queue.pieces.empty()) return false;
  const Piece& next = queue.pieces.front();
  return next.work || process().queues[next.other].done >= next.end;
}

// The queue whose next piece is to be done, so that `wanted` gets on: the one that it waits for,
// or at random any that can go on. `turn` is locked.
Queue& choose_queue(Queue& wanted) {
  std::pair<Random, bool> random = next_random();
  if (random.second && random.first.one_in(2)) {
    std::vector<Queue*> others;
    for (auto& queue : process().queues)
      if (can_go_on(queue.second)) others.push_back(&queue.second);
    if (!others.empty()) return *others[random.first.below(others.size())];
  }
  Queue* queue = &wanted;
  while (!can_go_on(*queue)) queue = &process().queues[queue->pieces.front().other];
  return *queue;
}

// Does the first `end` pieces of the stream, and what they wait for. `turn` is locked.
void run_until(const void* stream, uint64_t end) {
  Queue& wanted = process().queues[stream];
  while (wanted.done < end) {
    Queue& queue = choose_queue(wanted);
    const Piece piece = std::move(queue.pieces.front());
    queue.pieces.pop_front();
    ++queue.done;
    if (piece.work) piece.work();
  }
}

// `turn` is locked.
Queue& queue_of(Stream stream) {
  Queue& queue = process().queues[stream.handle];
  if (queue.destroyed) throw Error("a stream was used that its owner has destroyed");
  return queue;
}

// The host waits for the stream.
void finish(Stream stream) {
  if (!process().defer) return;
  const std::lock_guard<std::recursive_mutex> turn(process().turn);
  run_until(stream.handle, queue_of(stream).end());
}

// Now, or when it is the stream's turn.
void enqueue(Stream stream, std::function<void()> work) {
  if (!process().defer) return work();
  const std::lock_guard<std::recursive_mutex> turn(process().turn);
  queue_of(stream).pieces.push_back({std::move(work), nullptr, 0});
}

}  // namespace

void configure(const Options& options) {
  const std::lock_guard<std::recursive_mutex> turn(process().turn);
  for (auto& queue : process().queues) {
    run_until(queue.first, queue.second.end());
    queue.second.destroyed = false;
  }
  const std::lock_guard<std::mutex> lock(process().mutex);
  bool written = false;
  for (const auto& [data, bytes] : process().given_back) {
    const unsigned char* const first = static_cast<unsigned char*>(data);
    written |= std::any_of(first, first + bytes, [](unsigned char c) { return c != kPoison; });
    free(data);
  }
  process().given_back.clear();
  process().options = options;
  process().defer = options.defer_streams;
  process().launches = 0;
  if (written) throw Error("memory was written after it had been given back");
}

void destroy(Stream stream) {
  finish(stream);
  const std::lock_guard<std::recursive_mutex> turn(process().turn);
  process().queues[stream.handle].destroyed = true;
}

size_t live_bytes() {
  const std::lock_guard<std::mutex> lock(process().mutex);
  return process().live_bytes;
}

void outside_kernel() { throw Error("a word of cuda/simt.h was used outside a kernel"); }

void sync_threads(Site site) { running_machine().barrier(Wait::kSyncThreads, 0, 0, site); }
void named_barrier(int id, int threads, Site site) {
  running_machine().barrier(Wait::kNamedBarrier, id, threads, site);
}
void cluster_sync(Site site) { running_machine().barrier(Wait::kClusterSync, 0, 0, site); }

uint32_t shuffle_xor(uint32_t value, int distance, Site site) {
  ShuffleOperands operands = {value, 0, distance};
  running_machine().collective(Wait::kShuffleXor, &operands, complete_shuffle<true>, site);
  return operands.result;
}
uint32_t shuffle_down(uint32_t value, int distance, Site site) {
  ShuffleOperands operands = {value, 0, distance};
  running_machine().collective(Wait::kShuffleDown, &operands, complete_shuffle<false>, site);
  return operands.result;
}

void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat16, Site site) {
  MmaOperands operands = {d, a, {b0, b1}};
  running_machine().collective(Wait::kMma, &operands,
                               bfloat16 ? complete_mma<Bfloat16> : complete_mma<Float16>, site);
}

void ldmatrix(uint32_t* r, const void* shared_row, Site site) {
  running_machine().shared_offset(shared_row, 16, 16, "the row", site);
  LdmatrixOperands operands = {r, static_cast<const unsigned char*>(shared_row)};
  running_machine().collective(Wait::kLdmatrix, &operands, complete_ldmatrix, site);
}

void mbarrier_init(uint64_t* mbarrier, int count, Site site) {
  running_machine().mbarrier_init(mbarrier, count, site);
}
void mbarrier_expect(uint64_t* mbarrier, uint32_t bytes, Site site) {
  running_machine().mbarrier_expect(mbarrier, bytes, site);
}
void mbarrier_wait(uint64_t* mbarrier, unsigned parity, Site site) {
  running_machine().mbarrier_wait(mbarrier, parity, site);
}
uint32_t remote(const void* mine, unsigned rank, Site site) {
  return running_machine().remote(mine, rank, site);
}
void store_async(uint32_t to, const uint32_t* words, int count, uint32_t mbarrier, Site site) {
  running_machine().store_async(to, words, static_cast<unsigned>(count), mbarrier, site);
}
void load_relaxed(uint32_t* words, const void* from, Site site) {
  running_machine().load_relaxed(words, from, site);
}
void store_relaxed(void* to, const uint32_t* words, Site site) {
  running_machine().store_relaxed(to, words, site);
}

int resident_blocks(int block, size_t shared) {
  const Options options = current_options();
  if (block < 1 || block > 1024 || shared > options.shared_per_block) return 0;
  const int warps = (block + 31) / 32;
  const size_t by_shared =
      (options.shared_per_block + kReservedShared) / (shared + kReservedShared);
  const int by_threads = threads_per_multiprocessor(options) / (32 * warps);
  return static_cast<int>(
      std::min<size_t>({by_shared, static_cast<size_t>(by_threads), size_t{32}}));
}

int resident_clusters(const Launch& how) {
  const Options options = current_options();
  if (options.major < 9) throw Error("clusters need compute capability 9.0");
  const int blocks = resident_blocks(how.block, how.shared);
  const int whole = options.multiprocessors / kGpc, rest = options.multiprocessors % kGpc;
  return whole * (kGpc * blocks / how.cluster) + rest * blocks / how.cluster;
}

Order any_order(int64_t n) {
  std::pair<Random, bool> random = next_random();
  return order_of(n, random.first, random.second);
}

void launch(Stream stream, const Launch& how, std::function<void()> thread) {
  require_device();
  check_launch(how, current_options());
  submit(stream, [how, thread = std::move(thread)] {
    Machine m(how, thread, current_options(), next_random());
    const MachineScope scope(m);
    m.run();
  });
}

// ---------------------------------------------------------------------------------------------------
// cuda/runtime.h
// ---------------------------------------------------------------------------------------------------

namespace {

using Recording = std::vector<std::function<void()>>;
using SharedRecording = std::shared_ptr<const Recording>;  // also by replays that have not run yet

// What this thread records now, and the stream it does that on. Handles are compared and never
// followed: other libraries may name streams by anything.
struct NowRecording {
  const void* handle = nullptr;
  Recording* to = nullptr;
};
thread_local NowRecording now_recording;

Recording* recording_of(Stream stream) {
  return stream.handle != nullptr && stream.handle == now_recording.handle ? now_recording.to
                                                                           : nullptr;
}

void refuse_while_recording(Stream stream, const char* what) {
  if (recording_of(stream) != nullptr) {
    throw Error(std::string(what) + ": not on a stream that is being recorded");
  }
}

bool overlaps_device_memory(const void* p, size_t bytes) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(p);
  const std::lock_guard<std::mutex> lock(process().mutex);
  const auto after = process().memory.lower_bound(from + bytes);
  if (after == process().memory.begin()) return false;
  const auto block = std::prev(after);
  return block->first + block->second > from;
}

// Throws unless the bytes lie in one block of device memory.
void require_device_memory(const void* p, size_t bytes, const char* what) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(p);
  const std::lock_guard<std::mutex> lock(process().mutex);
  const auto after = process().memory.upper_bound(from);
  const auto block = after == process().memory.begin() ? after : std::prev(after);
  if (block == process().memory.end() || block->first > from ||
      block->second < from - block->first || block->second - (from - block->first) < bytes) {
    throw Error(std::string(what) + ": " + std::to_string(bytes) +
                " bytes that do not lie in one block of device memory");
  }
}
void require_host_memory(const void* p, size_t bytes, const char* what) {
  if (overlaps_device_memory(p, bytes)) {
    throw Error(std::string(what) + ": device memory where host memory is due");
  }
}

}  // namespace

void submit(Stream stream, std::function<void()> work) {
  require_device();
  if (Recording* recording = recording_of(stream)) {
    recording->push_back(std::move(work));
  } else {
    enqueue(stream, [work = std::move(work)] {
      const FpEnv environment;  // subnormals are zero, as nvcc is told to make them (-ftz=true)
      work();
    });
  }
}

}  // namespace emulator

using emulator::process;

void require_device() {
  const pid_t self = getpid();
  pid_t owner = 0;
  if (!process().owner.compare_exchange_strong(owner, self) && owner != self) {
    throw Unavailable(
        "CUDA cannot be used in a process forked from one that has used it; start processes with "
        "'spawn'");
  }
}

DeviceInfo device_info() {
  require_device();
  const emulator::Options options = emulator::current_options();
  DeviceInfo info;
  info.name = "emulator";
  info.major = options.major;
  info.minor = options.minor;
  info.multiprocessors = options.multiprocessors;
  info.shared_per_block = options.shared_per_block;
  info.registers_per_multiprocessor = 65536;
  info.memory = options.memory;
  info.l2_bytes = size_t{50} << 20;
  info.driver = info.runtime = "emulated";
  return info;
}

size_t free_memory() {
  require_device();
  const size_t memory = emulator::current_options().memory;
  return memory - std::min(memory, emulator::live_bytes());
}

Stream own_stream() {
  static thread_local char stream;  // its address is the handle
  require_device();
  return {&stream};
}

void synchronize(Stream stream) {
  require_device();
  emulator::refuse_while_recording(stream, "synchronize");
  emulator::finish(stream);
}

Stream keeper() {
  static char stream;  // its address is the handle
  require_device();
  return {&stream};
}

// An Event's handle is a piece that waits for it.
Event::Event(Stream stream) {
  require_device();
  emulator::refuse_while_recording(stream, "Event");
  if (!process().defer) return;  // it has been reached
  const std::lock_guard<std::recursive_mutex> turn(process().turn);
  handle_ = new emulator::Piece{{}, stream.handle, emulator::queue_of(stream).end()};
}

Event::~Event() { delete static_cast<emulator::Piece*>(handle_); }

bool Event::reached() {
  if (handle_ == nullptr) return true;
  const auto* const piece = static_cast<const emulator::Piece*>(handle_);
  const std::lock_guard<std::recursive_mutex> turn(process().turn);
  return process().queues[piece->other].done >= piece->end;
}

void Event::wait(Stream stream) {
  require_device();
  emulator::refuse_while_recording(stream, "wait");
  if (reached()) return;
  const std::lock_guard<std::recursive_mutex> turn(process().turn);
  emulator::queue_of(stream).pieces.push_back(*static_cast<const emulator::Piece*>(handle_));
}

Memory::Memory(size_t bytes, Stream stream) : stream_(stream) {
  require_device();
  emulator::refuse_while_recording(stream, "taking memory");
  if (bytes == 0) return;
  const std::lock_guard<std::mutex> lock(process().mutex);
  const size_t limit = process().options.memory;
  if (process().live_bytes > limit || bytes > limit - process().live_bytes) throw std::bad_alloc();
  if (posix_memalign(&data_, 256, bytes) != 0) throw std::bad_alloc();
  bytes_ = bytes;
  memset(data_, emulator::kPoison, bytes);
  process().memory.emplace(reinterpret_cast<uintptr_t>(data_), bytes);
  process().live_bytes += bytes;
}

Memory::~Memory() {
  if (data_ == nullptr) return;
  emulator::enqueue(stream_, [data = data_, bytes = bytes_] {
    const std::lock_guard<std::mutex> lock(process().mutex);
    process().memory.erase(reinterpret_cast<uintptr_t>(data));
    process().live_bytes -= bytes;
    if (!process().defer) return free(data);
    memset(data, emulator::kPoison, bytes);
    process().given_back.emplace_back(data, bytes);
  });
}

void copy_to_device(void* to, const void* from, size_t bytes, Stream stream) {
  require_device();
  emulator::refuse_while_recording(stream, "copy_to_device");
  if (bytes == 0) return;
  emulator::require_device_memory(to, bytes, "copy_to_device to");
  emulator::require_host_memory(from, bytes, "copy_to_device from");
  const auto* const first = static_cast<const unsigned char*>(from);
  emulator::enqueue(stream, [to, values = std::vector<unsigned char>(first, first + bytes)] {
    memcpy(to, values.data(), values.size());
  });
  if (bytes > kSmallCopy) emulator::finish(stream);
}

void copy_to_host(void* to, const void* from, size_t bytes, Stream stream) {
  require_device();
  emulator::refuse_while_recording(stream, "copy_to_host");
  if (bytes == 0) return;
  emulator::require_host_memory(to, bytes, "copy_to_host to");
  emulator::require_device_memory(from, bytes, "copy_to_host from");
  emulator::finish(stream);
  memcpy(to, from, bytes);
}

void copy_on_device(void* to, const void* from, size_t bytes, Stream stream) {
  emulator::submit(stream, [=] {
    if (bytes == 0) return;
    emulator::require_device_memory(to, bytes, "copy_on_device to");
    emulator::require_device_memory(from, bytes, "copy_on_device from");
    const uintptr_t a = reinterpret_cast<uintptr_t>(to), b = reinterpret_cast<uintptr_t>(from);
    if (std::max(a, b) - std::min(a, b) < bytes) throw Error("copy_on_device: the ranges overlap");
    memcpy(to, from, bytes);
  });
}

void fill_bytes(void* to, int byte, size_t bytes, Stream stream) {
  emulator::submit(stream, [=] {
    if (bytes == 0) return;
    emulator::require_device_memory(to, bytes, "fill_bytes");
    memset(to, byte, bytes);
  });
}

Graph Graph::record(const std::function<void(Stream)>& work) {
  require_device();
  auto recording = std::make_unique<emulator::Recording>();
  char stream;  // its address is the handle
  struct Restore {
    emulator::NowRecording before = emulator::now_recording;
    ~Restore() { emulator::now_recording = before; }
  } restore;
  emulator::now_recording = {&stream, recording.get()};
  work(Stream{&stream});
  Graph graph;
  graph.handle_ = new emulator::SharedRecording(std::move(recording));
  return graph;
}

Graph::~Graph() { delete static_cast<emulator::SharedRecording*>(handle_); }

void Graph::replay(Stream stream) const {
  if (handle_ == nullptr) throw Error("replay of a Graph that was not recorded");
  const emulator::SharedRecording recording =
      *static_cast<const emulator::SharedRecording*>(handle_);
  emulator::submit(stream, [recording] {
    for (const std::function<void()>& work : *recording) work();
  });
}

}  // namespace cuda
}  // namespace fastrnn
