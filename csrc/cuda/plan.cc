#include "cuda/plan.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "cuda/cluster.h"
#include "cuda/grid.h"

namespace fastrnn {
namespace cuda {

namespace {

std::string refusal(Family family, const RecurrenceShape& shape, const DeviceInfo& device) {
  if (family == Family::kCluster) return cluster::refuse(shape, device);
  if (family == Family::kGrid) return grid::refuse(shape, device);
  return "";
}

constexpr size_t kMostKept = 4096;  // shapes, of a program whose batches differ in every call

constexpr Family kFamilies[] = {Family::kCluster, Family::kGrid, Family::kStep};

}  // namespace

const char* family_name(Family family) {
  return family == Family::kCluster ? "cluster" : family == Family::kGrid ? "grid" : "step";
}

Plan plan(const RecurrenceShape& shape, const DeviceInfo& device) {
  const char* const wanted = std::getenv("FASTRNN_CUDA_FAMILY");
  if (wanted != nullptr && *wanted != '\0') {
    for (const Family family : kFamilies) {
      if (std::string(wanted) != family_name(family)) continue;
      const std::string why_not = refusal(family, shape, device);
      if (!why_not.empty())
        throw std::invalid_argument(
            "FASTRNN_CUDA_FAMILY: expected a family that can run this, got '" +
            std::string(wanted) + "': " + why_not);
      return {family, "FASTRNN_CUDA_FAMILY"};
    }
    throw std::invalid_argument("FASTRNN_CUDA_FAMILY: expected 'cluster', 'grid' or 'step', got '" +
                                std::string(wanted) + "'");
  }
  std::string reason;
  for (const Family family : kFamilies) {
    const std::string why_not = refusal(family, shape, device);
    if (why_not.empty()) return {family, reason};
    reason += (reason.empty() ? "" : "; ") + std::string(family_name(family)) + ": " + why_not;
  }
  return {Family::kStep, reason};  // never refused
}

Family planned_family(const RecurrenceShape& shape) {
  using Key = std::tuple<CellKind, Precision, int64_t, int64_t, int, std::string>;
  static std::mutex* const mutex = new std::mutex;  // like the map, also there when others end
  static auto* const known = new std::map<Key, Family>;
  const char* const wanted = std::getenv("FASTRNN_CUDA_FAMILY");
  const Key key(shape.kind, shape.precision, shape.H, shape.B, shape.directions,
                wanted == nullptr ? "" : wanted);
  const std::lock_guard<std::mutex> lock(*mutex);
  const auto found = known->find(key);
  if (found != known->end()) return found->second;
  const Family family = plan(shape, device_info()).family;
  if (known->size() >= kMostKept) known->clear();
  known->emplace(key, family);
  return family;
}

}  // namespace cuda
}  // namespace fastrnn
