// The recurrence of a layer in one launch, for H <= 512 in 16 bits: a cluster of blocks keeps W_hh
// in its registers for all steps of the chunk and passes the state on through shared memory. Which
// shapes it takes, and why not the others, says refuse().
//
// See cuda/recurrence.h for the arguments and cuda/cluster.cu for how it works. Results depend
// neither on the other rows of the batch nor on how the steps are divided into chunks.
#ifndef FASTRNN_CUDA_CLUSTER_H_
#define FASTRNN_CUDA_CLUSTER_H_

#include <string>

#include "cuda/recurrence.h"

namespace fastrnn {
namespace cuda {
namespace cluster {

// Empty: this family can run the shape on the device. Else why not. Asks the driver how many
// clusters fit on the device.
std::string refuse(const RecurrenceShape& shape, const DeviceInfo& device);

// The functions below take shapes that refuse() does not refuse; S = Bfloat16, Float16.

// Elements (of S) of the packed W_hh, for the forward or the backward pass.
int64_t packed_elements(const RecurrenceShape& shape, bool backward);

// w_hh: in (G * H, H), on the device. out: (packed_elements(shape, backward)), aligned to 16 bytes.
template <class S>
void pack(const RecurrenceShape& shape, const float* w_hh, bool backward, S* out, Stream stream);

// Steps steps.k0 ... steps.k1 - 1 of shape.directions directions, side by side. `w` is aligned to
// 16 bytes, `gates` and LSTM's `gx` to the size of one unit's entries.
template <class S>
void forward(const RecurrenceShape& shape, const Steps& steps,
             const ForwardRecurrence<S>* directions, Stream stream);
template <class S>
void backward(const RecurrenceShape& shape, const Steps& steps,
              const BackwardRecurrence<S>* directions, Stream stream);

}  // namespace cluster
}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_CLUSTER_H_
