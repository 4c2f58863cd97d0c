// A fiber: a call that can be left in the middle and gone on with later, on a stack of its own. For
// cuda/emulator.cc alone, which includes it once.
//
// The switch saves what the ABI says a callee must keep, and the stack pointer; the rest the caller
// has saved already. ucontext would do, but makes two system calls a switch. The sanitizers are
// told of every switch, since they keep notes on the stack.
#ifndef FASTRNN_CUDA_EMULATOR_FIBER_H_
#define FASTRNN_CUDA_EMULATOR_FIBER_H_

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define FASTRNN_FIBER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTRNN_FIBER_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define FASTRNN_FIBER_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define FASTRNN_FIBER_TSAN 1
#endif
#endif

#ifdef FASTRNN_FIBER_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef FASTRNN_FIBER_TSAN
#include <sanitizer/tsan_interface.h>
#endif

// Saves this side's registers on its stack and the stack's pointer to *save, and goes on from `to`.
extern "C" void fastrnn_switch_stack(void** save, void* to) __asm__("fastrnn_switch_stack");

#if defined(__x86_64__)
// The jump is a return, which the processor would always predict to go back to the caller.
__asm__(R"(
.text
.balign 16
.globl fastrnn_switch_stack
fastrnn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
)");
#elif defined(__aarch64__)
__asm__(R"(
.text
.balign 16
.globl fastrnn_switch_stack
fastrnn_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "the emulator's switch of stacks is written for x86-64 and AArch64"
#endif

namespace fastrnn {
namespace cuda {
namespace emulator {

// One side of a switch: a fiber, or (default-made) the host thread that runs the fibers.
class Fiber {
 public:
  Fiber() = default;
  explicit Fiber(size_t stack_bytes)
      : memory_(new unsigned char[stack_bytes]), bottom_(memory_.get()), bytes_(stack_bytes) {}
  ~Fiber() { drop_notes(); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber calls `entry`, which never returns; unless the fiber is in the
  // middle of that call already.
  void prepare(void (*entry)()) {
    if (std::exchange(prepared_, true)) return;
    drop_notes();
#ifdef FASTRNN_FIBER_ASAN
    __asan_unpoison_memory_region(bottom_, bytes_);
    fake_stack_ = nullptr;
#endif
#ifdef FASTRNN_FIBER_TSAN
    tsan_ = __tsan_create_fiber(0);
#endif
    memcpy(bottom_, &kCanary, sizeof(kCanary));
    const uintptr_t top = (reinterpret_cast<uintptr_t>(bottom_) + bytes_) & ~uintptr_t{15};
#if defined(__x86_64__)
    // Six registers and the return address, above which the stack is as after a call: 8 modulo 16.
    void** frame = reinterpret_cast<void**>(top) - 8;
    memset(frame, 0, 8 * sizeof(void*));
    frame[6] = reinterpret_cast<void*>(entry);
#else
    void** frame = reinterpret_cast<void**>(top - 160);
    memset(frame, 0, 160);
    frame[11] = reinterpret_cast<void*>(entry);  // x30
#endif
    stack_pointer_ = frame;
  }

  // Forgets the call that the fiber is in the middle of.
  void abandon() { prepared_ = false; }

  // What the entry of a fiber calls first; `from` is the host thread's side.
  static void entered(Fiber& from) {
#ifdef FASTRNN_FIBER_ASAN
    const void* bottom;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &from.bytes_);
    from.bottom_ = static_cast<unsigned char*>(const_cast<void*>(bottom));
#else
    (void)from;
#endif
  }

  // Leaves `from`, until something switches to it again, and goes on in `to`.
  static void change(Fiber& from, Fiber& to) {
#ifdef FASTRNN_FIBER_TSAN
    if (from.tsan_ == nullptr) from.tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to.tsan_, 0);
#endif
#ifdef FASTRNN_FIBER_ASAN
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.bytes_);
#endif
    fastrnn_switch_stack(&from.stack_pointer_, to.stack_pointer_);
#ifdef FASTRNN_FIBER_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
  }

  // Whether the stack's last bytes were overwritten.
  bool overflowed() const { return memcmp(bottom_, &kCanary, sizeof(kCanary)) != 0; }

 private:
  static constexpr uint64_t kCanary = 0x5AFE57ACC0FFEE11u;

  void drop_notes() {
#ifdef FASTRNN_FIBER_TSAN
    if (memory_ != nullptr && tsan_ != nullptr) __tsan_destroy_fiber(tsan_);
    tsan_ = nullptr;
#endif
  }

  std::unique_ptr<unsigned char[]> memory_;
  unsigned char* bottom_ = nullptr;
  size_t bytes_ = 0;
  bool prepared_ = false;
  void* stack_pointer_ = nullptr;
#ifdef FASTRNN_FIBER_ASAN
  void* fake_stack_ = nullptr;
#endif
#ifdef FASTRNN_FIBER_TSAN
  void* tsan_ = nullptr;
#endif
};

// Fibers that nothing runs on, to be used again.
class FiberPool {
 public:
  Fiber* take() {
    if (free_.empty()) {
      all_.push_back(std::make_unique<Fiber>(kStackBytes));
      free_.push_back(all_.back().get());
    }
    Fiber* fiber = free_.back();
    free_.pop_back();
    return fiber;
  }
  void give_back(Fiber* fiber) { free_.push_back(fiber); }

 private:
  // Not a multiple of a large power of two, or all stacks would share a few sets of the cache.
#ifdef FASTRNN_FIBER_ASAN
  static constexpr size_t kStackBytes = 260 * 1024 + 64;  // its frames are larger
#else
  static constexpr size_t kStackBytes = 66 * 1024 + 64;
#endif
  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> free_;
};

}  // namespace emulator
}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_EMULATOR_FIBER_H_
