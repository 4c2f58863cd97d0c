// Arrays that go from library to library without a copy: DLPack and the CUDA array interface.
#ifndef FASTRNN_BINDINGS_CUDA_EXCHANGE_H_
#define FASTRNN_BINDINGS_CUDA_EXCHANGE_H_

#include <string>

#include "bindings/cuda/arrays.h"

namespace fastrnn {

constexpr int kDlCuda = 2;  // DLPack's number for CUDA memory

// The array `x` of any library, by DLPack or else by the CUDA array interface: the same memory,
// kept alive, ready to be used on `stream`. With `ordered` that is the stream on which the library
// itself works now. An Array is handed back as it is. TypeError for what is no array on a device,
// ValueError for another device than CUDA's first.
Array import_array(const std::string& name, const py::object& x, cuda::Stream stream, bool ordered);

// Array.__dlpack__ and Array.__cuda_array_interface__.
py::object export_dlpack(const Array& a, const py::object& stream, const py::object& max_version,
                         const py::object& dl_device, const py::object& copy);
py::dict export_interface(const Array& a);

}  // namespace fastrnn

#endif  // FASTRNN_BINDINGS_CUDA_EXCHANGE_H_
