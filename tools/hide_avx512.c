// A processor without AVX-512, for comparisons: preloaded, the process's CPUID instructions trap,
// and are answered without the bits of AVX-512, AMX and AVX10. So libraries that offer no setting
// choose what they would on an AVX2 machine.
//
// Not reached: what the dynamic loader has asked before (the C library's own memcpy and the like),
// and threads that block SIGSEGV or a program that installs a handler of its own for it, which end
// at their next CPUID instruction. Not for anything but measuring.
//
//   cc -O2 -shared -fPIC -o build/hide_avx512.so tools/hide_avx512.c
//   LD_PRELOAD=$PWD/build/hide_avx512.so python -m benchmarks --full --name as-avx2
//
// Linux on x86-64, where /proc/cpuinfo lists cpuid_fault.
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

static int allow(unsigned long on) { return (int)syscall(SYS_arch_prctl, ARCH_SET_CPUID, on); }

static void on_fault(int number, siginfo_t* info, void* context) {
  (void)info;
  greg_t* r = ((ucontext_t*)context)->uc_mcontext.gregs;
  const unsigned char* at = (const unsigned char*)r[REG_RIP];
  if (at[0] != 0x0f || at[1] != 0xa2) {  // a real fault: again, without us
    signal(number, SIG_DFL);
    return;
  }
  const unsigned leaf = (unsigned)r[REG_RAX], sub = (unsigned)r[REG_RCX];
  unsigned a, b, c, d;
  allow(1);
  __cpuid_count(leaf, sub, a, b, c, d);
  allow(0);
  if (leaf == 7 && sub == 0) {
    // F, DQ, IFMA, PF, ER, CD, BW, VL
    b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
    // VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
    c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);
    // 4VNNIW, 4FMAPS, VP2INTERSECT, AMX-BF16, FP16, AMX-TILE, AMX-INT8
    d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
  }
  if (leaf == 7 && sub == 1) {
    a &= ~(1u << 5 | 1u << 21);  // AVX512-BF16, AMX-FP16
    d &= ~(1u << 8 | 1u << 19);  // AMX-COMPLEX, AVX10
  }
  if (leaf == 0xd && sub == 0) a &= ~(7u << 5 | 3u << 17);              // their registers' state
  if (leaf == 0x1d || leaf == 0x1e || leaf == 0x24) a = b = c = d = 0;  // AMX's tiles, AVX10
  r[REG_RAX] = a;
  r[REG_RBX] = b;
  r[REG_RCX] = c;
  r[REG_RDX] = d;
  r[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  if (sigaction(SIGSEGV, &action, NULL) != 0 || allow(0) != 0) {
    perror("hide_avx512: this machine's CPUID cannot be made to trap");
    _exit(1);
  }
}
