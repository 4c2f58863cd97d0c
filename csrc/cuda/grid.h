// The recurrence of a layer in one launch, for large H in 16 bits: blocks spread over the whole
// chip keep W_hh in their registers and shared memory for all steps of the chunk, each the rows of
// some hidden units, and pass the state on through the L2 cache. Which shapes it takes, and why not
// the others, says refuse().
//
// See cuda/recurrence.h for the arguments and cuda/grid.cu for how it works. Results depend neither
// on the other rows of the batch, nor on how the steps are divided into chunks, nor on the device.
#ifndef FASTRNN_CUDA_GRID_H_
#define FASTRNN_CUDA_GRID_H_

#include <stdint.h>

#include <string>

#include "cuda/recurrence.h"

namespace fastrnn {
namespace cuda {
namespace grid {

// Empty: this family can run the shape on the device, forward and backward. Else why not.
std::string refuse(const RecurrenceShape& shape, const DeviceInfo& device);

// The functions below take shapes that refuse() does not refuse; S = Bfloat16, Float16.

// Elements (of S) of the packed W_hh, for the forward or the backward pass. How W_hh is packed
// depends on the cell and H alone, not on the batch, the directions or the device.
int64_t packed_elements(const RecurrenceShape& shape, bool backward);

// w_hh: in (G * H, H), on the device. out: (packed_elements(shape, backward)), aligned to 16 bytes.
template <class S>
void pack(const RecurrenceShape& shape, const float* w_hh, bool backward, S* out, Stream stream);

// Steps steps.k0 ... steps.k1 - 1 of shape.directions directions: side by side where the device
// holds the blocks of both, else one after the other. gx, w and gates begin at 16 bytes' alignment,
// or at a row of an array that does; h_rows, gates and c_rows overlap with nothing. Takes memory of
// the stream: rows of h for the first step, and where H is not a multiple of 8 (or h_rows not at 16
// bytes' alignment) as much as h_rows.
template <class S>
void forward(const RecurrenceShape& shape, const Steps& steps,
             const ForwardRecurrence<S>* directions, Stream stream);

// The same for the gradients. Takes memory of the stream for all rows of the chunk: G * H, H
// rounded up to 16, 2 bytes each.
template <class S>
void backward(const RecurrenceShape& shape, const Steps& steps,
              const BackwardRecurrence<S>* directions, Stream stream);

}  // namespace grid
}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_GRID_H_
