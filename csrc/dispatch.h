// The choice of instruction set: which kernel table this process uses.
#ifndef FASTRNN_DISPATCH_H_
#define FASTRNN_DISPATCH_H_

#include <string>
#include <vector>

#include "core/kernels.h"

namespace fastrnn {

// The kernels in use: the widest the machine has, or what FASTRNN_ISA names. Chosen at the first
// call and the same from then on. Throws std::runtime_error when FASTRNN_ISA names something that
// is not compiled in or not supported.
const KernelTable& dispatch();

// All tables that are compiled in and that this machine can run, best first; never empty.
std::vector<const KernelTable*> available_kernels();

// The processor's name and its features that matter here, for bug reports: "AMD EPYC … (sse2 avx
// avx2 fma)".
std::string cpu_description();

}  // namespace fastrnn

#endif  // FASTRNN_DISPATCH_H_
