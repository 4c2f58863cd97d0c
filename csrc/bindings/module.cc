// fastrnn._core: the table of contents of the extension.
#include <pybind11/pybind11.h>

namespace fastrnn {
void register_config(pybind11::module_& m);     // threads, instruction sets, versions
void register_recurrent(pybind11::module_& m);  // Packed: forward and training passes; Tape
void register_frozen(pybind11::module_& m);     // Stream, unpacking
void register_linear(pybind11::module_& m);     // linear layer
void register_training(pybind11::module_& m);   // optimisers, losses, embedding
}  // namespace fastrnn

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled kernels of fastrnn; the public functions are in the package above.";
  fastrnn::register_config(m);
  fastrnn::register_recurrent(m);
  fastrnn::register_frozen(m);
  fastrnn::register_linear(m);
  fastrnn::register_training(m);
}
