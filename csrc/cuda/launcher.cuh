// SPDX-License-Identifier: BSD-3-Clause
//
// Turns the dtype and mapping of a plan into the types that kernels are compiled for, and launches
// kernels as planned.
#pragma once

#include <stdexcept>
#include <string>

#include "gpu/encode_tensor_map.cuh"
#include "gpu/launch.cuh"
#include "layouts/contiguous.cuh"
#include "layouts/generic.cuh"
#include "layouts/matrix_columns.cuh"
#include "planner/plan.h"
#include "primitives/pipeline.cuh"

namespace fastbn::cuda {

template <typename T>
struct TypeTag {
  using Type = T;
};

template <typename scalar_t, typename Body>
void with_mapping_of(const Geometry& geometry, const Body& body) {
  constexpr int kWidth = kVectorBytes / sizeof(scalar_t);
  switch (geometry.mapping) {
    case Mapping::kMatrixColumns:
      if (geometry.width == 1) return body(TypeTag<MatrixColumns<scalar_t, 1>>());
      return body(TypeTag<MatrixColumns<scalar_t, kWidth>>());
    case Mapping::kContiguous:
      return body(TypeTag<Contiguous<scalar_t, kWidth>>());
    case Mapping::kGeneric:
      return body(TypeTag<Generic<scalar_t>>());
  }
}

// Calls body(TypeTag<Mapping>()) with the class of layouts/ that the geometry is for.
template <typename Body>
void with_mapping(DType dtype, const Geometry& geometry, const Body& body) {
  switch (dtype) {
    case DType::kFloat64:
      return with_mapping_of<double>(geometry, body);
    case DType::kFloat32:
      return with_mapping_of<float>(geometry, body);
    case DType::kBFloat16:
      return with_mapping_of<BFloat16>(geometry, body);
    case DType::kFloat16:
      return with_mapping_of<Float16>(geometry, body);
  }
}

// Launches the kernels of one plan.
class Launcher {
 public:
  Launcher(const Problem& problem, const Plan& plan, gpu::Stream stream)
      : problem_(problem), plan_(plan), stream_(stream) {}

  template <typename... Parameters>
  void operator()(const char* name, void (*kernel)(Parameters...),
                  const Parameters&... arguments) const {
    launch(name, /*overlaps_previous=*/false, kernel, arguments...);
  }

  // The second of two kernels, which calls wait_for_previous_kernel().
  template <typename... Parameters>
  void then(const char* name, void (*kernel)(Parameters...), const Parameters&... arguments) const {
    launch(name, plan_.overlap_launches, kernel, arguments...);
  }

  // The boxes of what a persistent kernel reads and writes, if its plan has any.
  template <int kTensors>
  TileMaps<kTensors> tile_maps(const Inputs<kTensors>& in, const OutputActivation& out) const {
    TileMaps<kTensors> maps = {};
    if (plan_.geometry.persistence.copies != TileCopies::kBoxes) return maps;
    for (int i = 0; i < kTensors; ++i) encode(in.tensors[i]->data, &maps.in[i]);
    encode(out.data, &maps.out);
    return maps;
  }

 private:
  template <typename... Parameters>
  void launch(const char* name, bool overlaps_previous, void (*kernel)(Parameters...),
              const Parameters&... arguments) const {
    gpu::LaunchShape shape{plan_.grid, plan_.block, plan_.shared_bytes};
    shape.overlaps_previous = overlaps_previous;
    shape.cluster_blocks = plan_.cluster;
    shape.cooperative = plan_.algorithm == Algorithm::kPersistentGrid;
    const char* error = gpu::launch(stream_, shape, kernel, arguments...);
    if (error != nullptr) fail("launching " + std::string(name), error);
  }

  void encode(const void* data, gpu::TensorMap* map) const {
    const Geometry& g = plan_.geometry;
    gpu::TensorMapShape shape;
    shape.data = data;
    shape.element_bytes = kVectorBytes / g.width;
    shape.rows = g.extent;
    shape.columns = g.row_vectors * g.width;
    shape.row_bytes = g.row_vectors * kVectorBytes;
    shape.box_rows = g.persistence.box_rows;
    shape.box_columns = g.vectors * g.width;
    const char* error = gpu::encode_tensor_map(shape, map);
    if (error != nullptr) fail("encoding a tensor map", error);
  }

  [[noreturn]] void fail(const std::string& what, const char* error) const {
    throw std::runtime_error("fastbn: " + what + " for " + describe(problem_, plan_) +
                             " failed: " + error);
  }

  const Problem& problem_;
  const Plan& plan_;
  gpu::Stream stream_;
};

// Thrown where a plan asks for a kernel that is not compiled for its mapping: the planner's
// mistake.
inline std::logic_error not_persistent(const Plan& plan) {
  return std::logic_error(std::string("fastbn: no persistent kernels over ") +
                          name(plan.geometry.mapping));
}

}  // namespace fastbn::cuda
