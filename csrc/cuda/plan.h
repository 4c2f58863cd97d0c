// Which family of kernels runs a recurrence, and why not a faster one: the only place that decides.
#ifndef FASTRNN_CUDA_PLAN_H_
#define FASTRNN_CUDA_PLAN_H_

#include <string>

#include "cuda/recurrence.h"

namespace fastrnn {
namespace cuda {

enum class Family { kStep, kCluster, kGrid };
const char* family_name(Family family);  // "step", "cluster", "grid"

struct Plan {
  Family family;
  std::string reason;  // why not a family that stands before it; empty for the first
};

// The families from the fastest to the one that runs everything: cluster, grid, step. The first
// that does not refuse the shape on this device is taken. FASTRNN_CUDA_FAMILY, where it is set,
// names one of them: it is taken if it can run the shape, and std::invalid_argument says why not.
Plan plan(const RecurrenceShape& shape, const DeviceInfo& device);

// The family for this process's device. Asking the device takes longer than a short call, so each
// answer is kept.
Family planned_family(const RecurrenceShape& shape);

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_PLAN_H_
