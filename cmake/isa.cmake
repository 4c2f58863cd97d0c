# The only list of instruction sets (ISAs) and their compiler flags.
#
# csrc/cpu/kernels.cc is compiled once for each name in FASTRNN_ISAS, with -DFASTRNN_ISA=<name> and the flags below;
# csrc/dispatch.cc learns by FASTRNN_HAVE_<NAME> which of them exist and picks one at run time. The rest of the library
# is compiled for the plain architecture, so that a wheel built here runs on every machine of that architecture.
#
# Adding an ISA: one line here, its vector in csrc/cpu/vec.h, its run-time probe in csrc/dispatch.cc and, for the C++
# tests, in tests/cpp/run_on_isa.cc.

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(FASTRNN_ISAS baseline avx2 avx512)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  set(FASTRNN_ISAS neon)
else()
  message(FATAL_ERROR "fastrnn has kernels for x86-64 and AArch64, not for '${CMAKE_SYSTEM_PROCESSOR}'")
endif()

# For builds whose purpose is the same on every ISA, such as looking for races between threads.
option(FASTRNN_ONE_ISA "Compile the kernels for the plain architecture only" OFF)
if(FASTRNN_ONE_ISA)
  list(GET FASTRNN_ISAS 0 FASTRNN_ISAS)
endif()

set(FASTRNN_FLAGS_baseline -msse2)
set(FASTRNN_FLAGS_avx2 -mavx2 -mfma)
# prefer-vector-width: without it GCC and Clang would still split plain loops into 256-bit halves.
set(FASTRNN_FLAGS_avx512 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # GCC's own header declares "undefined" vectors by initialising them with themselves, and warns about it (PR 105593).
  list(APPEND FASTRNN_FLAGS_avx512 -Wno-maybe-uninitialized -Wno-uninitialized)
endif()
set(FASTRNN_FLAGS_neon) # part of every AArch64

# Every ISA: no contraction, since a fused multiply-add is written out where it is meant, so that AVX2, AVX-512 and NEON
# give the same bits; no errno, so that sqrt and friends are one instruction. Never -ffast-math: it breaks NaN and Inf.
set(FASTRNN_KERNEL_FLAGS -ffp-contract=off -fno-math-errno)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
  # Predictive commoning would carry the left operand's loads of several k in registers, of which the tile leaves none.
  list(APPEND FASTRNN_KERNEL_FLAGS -fno-predictive-commoning)
endif()
# Last on the command line, so that it wins over CMake's own level. A debug build stays readable in the debugger, and
# sanitizers at -O3 take many minutes for what they find at the level that their presets choose.
if(NOT CMAKE_CXX_FLAGS MATCHES "-fsanitize")
  list(APPEND FASTRNN_KERNEL_FLAGS $<$<NOT:$<CONFIG:Debug>>:-O3>)
endif()

# fastrnn_compile_for_isa(<target> <isa>): the flags and the definition that make a target one ISA's.
function(fastrnn_compile_for_isa target isa)
  target_compile_definitions(${target} PRIVATE FASTRNN_ISA=${isa})
  target_compile_options(${target} PRIVATE ${FASTRNN_FLAGS_${isa}} ${FASTRNN_KERNEL_FLAGS})
endfunction()
