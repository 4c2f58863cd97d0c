// fastrnn._cuda, and fastrnn._cuda_emulated, the same on the host emulator: the table of contents.
#include <pybind11/pybind11.h>

#include "cuda/runtime.h"

namespace fastrnn {
void register_device(pybind11::module_& m);            // what device there is
void register_arrays(pybind11::module_& m);            // Array
void register_device_recurrent(pybind11::module_& m);  // Packed: forward and training passes; Tape
void register_device_training(pybind11::module_& m);   // optimisers, losses, linear, embedding
}  // namespace fastrnn

PYBIND11_MODULE(FASTRNN_CUDA_MODULE, m) {
  m.doc() = "Kernels of fastrnn for CUDA devices; the public functions are in the package above.";
  pybind11::register_exception<fastrnn::cuda::Unavailable>(m, "Unavailable", PyExc_RuntimeError);
  fastrnn::register_device(m);
  fastrnn::register_arrays(m);
  fastrnn::register_device_recurrent(m);
  fastrnn::register_device_training(m);
}
