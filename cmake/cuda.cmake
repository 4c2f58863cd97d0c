# The CUDA path: which of it is built, its files, nvcc's flags, the GPUs that it is compiled for.
#
# It is a library of its own with an extension module of its own, fastrnn._cuda, which Python imports at the first use of
# device="cuda". CUDA's runtime is linked into it statically; the driver and cuBLASLt are looked up when the program
# runs, so that one build works on machines with a GPU and without.
#
# The same kernels compiled as plain C++ against csrc/cuda/emulator.h are the emulated twin (cmake/emulated), by which
# the CUDA path is tested on machines that have no GPU.

set(FASTRNN_CUDA AUTO CACHE STRING "Build the CUDA path: ON, OFF, or AUTO, which is ON where there is an nvcc that works")
set_property(CACHE FASTRNN_CUDA PROPERTY STRINGS AUTO ON OFF)
option(FASTRNN_CUDA_EMULATED "Build the CUDA path for the host's emulator of a GPU, for tests" OFF)

# In CMake's notation: <capability>-real is machine code of one GPU, -virtual is PTX, from which the driver makes the
# machine code of newer GPUs, and a bare number is both. Machine code also runs on later minor versions of its GPU.
#   80    A100
#   86    RTX 30, A10, A40; with it 8.9 (RTX 40, L4, L40)
#   90a   H100, H200 and GH200, which is all there is of 9.0. Code for a chip's own instructions ("a") fits no other
#         chip, so its PTX would be of no use.
#   100   B200, with it 10.3 (B300); and its PTX, which holds only what every later GPU has, for 11.0 and 12.x (RTX 50)
# Below 8.0 there are no matrix instructions for bfloat16.
set(FASTRNN_CUDA_ARCHITECTURES 80-real 86-real 90a-real 100
    CACHE STRING "The GPUs to compile for, as in CMAKE_CUDA_ARCHITECTURES")
set(FASTRNN_CUDA_OLDEST 12.8) # the first nvcc that knows all of these

# Kernels, and functions that launch them: compiled by nvcc, and by the C++ compiler for the emulator.
set(FASTRNN_CUDA_KERNELS
    csrc/cuda/cluster.cu
    csrc/cuda/elementwise.cu
    csrc/cuda/grid.cu
    csrc/cuda/matmul.cu
    csrc/cuda/rows.cu
    csrc/cuda/step.cu
    csrc/cuda/training.cu)
# What only the host runs, and does not know which of the two is beneath it.
set(FASTRNN_CUDA_HOST
    csrc/cuda/cublaslt.cc
    csrc/cuda/plan.cc
    csrc/cuda/stack.cc)
set(FASTRNN_CUDA_BINDINGS
    csrc/bindings/cuda/arrays.cc
    csrc/bindings/cuda/device.cc
    csrc/bindings/cuda/exchange.cc
    csrc/bindings/cuda/module.cc
    csrc/bindings/cuda/recurrent.cc
    csrc/bindings/cuda/training.cc)
# The two implementations of csrc/cuda/runtime.h.
set(FASTRNN_CUDA_DEVICE csrc/cuda/runtime.cu)
set(FASTRNN_CUDA_EMULATOR csrc/cuda/emulator.cc)
foreach(list KERNELS HOST BINDINGS DEVICE EMULATOR)
  list(TRANSFORM FASTRNN_CUDA_${list} PREPEND ${PROJECT_SOURCE_DIR}/)
endforeach()

# --- Is there an nvcc? Sets FASTRNN_HAVE_CUDA and enables the language. --------------------------------------------

set(FASTRNN_HAVE_CUDA OFF)
if(FASTRNN_CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(FASTRNN_NVCC ${CMAKE_CUDA_COMPILER})
  elseif(DEFINED ENV{CUDACXX})
    set(FASTRNN_NVCC $ENV{CUDACXX})
  else()
    find_program(FASTRNN_NVCC nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
    mark_as_advanced(FASTRNN_NVCC)
  endif()
  if(FASTRNN_NVCC)
    # The compiler of the rest also compiles the host's part of a .cu file.
    set(ENV{CUDACXX} ${FASTRNN_NVCC})
    if(NOT DEFINED ENV{CUDAHOSTCXX})
      set(ENV{CUDAHOSTCXX} ${CMAKE_CXX_COMPILER})
    endif()
    # Ours is set for each target; without a value here CMake would choose one for the targets of others.
    set(CMAKE_CUDA_ARCHITECTURES OFF)
    if(FASTRNN_CUDA STREQUAL AUTO)
      include(CheckLanguage)
      check_language(CUDA)
    endif()
    if(NOT FASTRNN_CUDA STREQUAL AUTO OR CMAKE_CUDA_COMPILER)
      enable_language(CUDA)
      if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL FASTRNN_CUDA_OLDEST)
        set(FASTRNN_HAVE_CUDA ON)
      else()
        set(why_not "${FASTRNN_NVCC} is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}, older than ${FASTRNN_CUDA_OLDEST}")
      endif()
    else()
      set(why_not "${FASTRNN_NVCC} does not work with ${CMAKE_CXX_COMPILER}; -DFASTRNN_CUDA=ON shows why")
    endif()
  else()
    set(why_not "no nvcc: it is neither on the PATH nor in CUDA_PATH, CUDA_HOME or /usr/local/cuda")
  endif()
  if(FASTRNN_HAVE_CUDA)
    message(STATUS "CUDA: built by ${FASTRNN_NVCC} ${CMAKE_CUDA_COMPILER_VERSION} for ${FASTRNN_CUDA_ARCHITECTURES}")
  elseif(FASTRNN_CUDA STREQUAL AUTO)
    message(STATUS "CUDA: not built, ${why_not}")
  else()
    message(FATAL_ERROR "FASTRNN_CUDA=${FASTRNN_CUDA}, but ${why_not}")
  endif()
endif()

# --- nvcc ----------------------------------------------------------------------------------------------------------

# Rounding as on the CPU: no contraction (-fmad), subnormals are zero (-ftz; core/fpenv.h), division and square root
# exact. relaxed-constexpr: the cells' constexpr functions may be called on the device.
set(FASTRNN_NVCC_FLAGS
    -O3
    -fmad=false
    -ftz=true
    -prec-div=true
    -prec-sqrt=true
    --expt-relaxed-constexpr
    -Xcompiler=-Wall,-Wextra,-Wshadow,-Wno-unknown-pragmas,-ffp-contract=off
    # A third of the size, for a moment's work when the module is loaded.
    --compress-mode=size
    # One GPU's code after the other, a large file would be what every build waits for.
    --threads=2)
if(FASTRNN_WERROR)
  list(APPEND FASTRNN_NVCC_FLAGS --Werror=all-warnings -Xcompiler=-Werror)
endif()

# fastrnn_add_cuda_library(): the target fastrnn_cuda, the CUDA path without Python.
function(fastrnn_add_cuda_library)
  add_library(fastrnn_cuda STATIC ${FASTRNN_CUDA_KERNELS} ${FASTRNN_CUDA_HOST} ${FASTRNN_CUDA_DEVICE})
  target_link_libraries(fastrnn_cuda PUBLIC fastrnn_core ${CMAKE_DL_LIBS})
  target_compile_options(fastrnn_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${FASTRNN_NVCC_FLAGS}>")
  set_target_properties(
    fastrnn_cuda
    PROPERTIES CUDA_ARCHITECTURES "${FASTRNN_CUDA_ARCHITECTURES}"
               CUDA_STANDARD 17
               CUDA_STANDARD_REQUIRED ON
               CUDA_EXTENSIONS OFF
               CUDA_VISIBILITY_PRESET hidden
               CUDA_RUNTIME_LIBRARY Static)
endfunction()

# fastrnn_add_cuda_module(<name> <library>): the extension module fastrnn.<name> on one of the two libraries.
function(fastrnn_add_cuda_module name library)
  pybind11_add_module(${name} MODULE NO_EXTRAS ${FASTRNN_CUDA_BINDINGS})
  target_link_libraries(${name} PRIVATE ${library})
  target_compile_definitions(${name} PRIVATE FASTRNN_CUDA_MODULE=${name} FASTRNN_VERSION="${PROJECT_VERSION}")
  # CUDA's runtime in this module is nobody else's: a program may have another one, PyTorch's for example.
  target_link_options(${name} PRIVATE LINKER:--exclude-libs,ALL)
  set_target_properties(${name} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  install(TARGETS ${name} LIBRARY DESTINATION fastrnn)
endfunction()
