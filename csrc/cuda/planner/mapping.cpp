// SPDX-License-Identifier: BSD-3-Clause
#include "mapping.h"

#include <algorithm>
#include <numeric>

#include "../../core/mask.h"

namespace fastbn::cuda {

namespace {

// Vectors side by side in a channel tile of channels-last data: 512 bytes at most, which a warp
// reads at once, and 64 bytes at least, which is what memory fetches.
constexpr int kMaxTileVectors = 32;
constexpr int kMinTileVectors = kMaxTileVectors >> kMaxNarrowing;
// Vectors of a row that cannot be cut into channel tiles.
constexpr int kMaxRowVectors = 128;

// Vectors of an activation, which are numbered in 32 bits: 64 GiB of them, or 4 Gi elements where
// those are taken one by one.
constexpr int64_t kMaxVectors = int64_t{1} << 32;
// Those of a segment, of the next one and of a step further are counted in 31 bits.
constexpr int64_t kMaxSegmentVectors = (int64_t{1} << 30) - kMaxThreads;
// An activation that has a mask is mapped in the vectors that the mask's bytes are for.
static_assert(kMaskedBytes == kVectorBytes && kMaxMaskBytes <= kMaxSegmentVectors);

FastDivmod fast_divmod(uint32_t divisor) {
  FastDivmod by;
  by.divisor = divisor;
  while ((uint64_t{1} << by.shift) < divisor) ++by.shift;
  by.multiplier = static_cast<uint32_t>(
      ((uint64_t{1} << 32) * ((uint64_t{1} << by.shift) - divisor)) / divisor + 1);
  return by;
}

class Mapper {
 public:
  Mapper(const Request& request, int narrowing)
      : request_(request),
        problem_(request.problem),
        narrowing_(narrowing),
        width_(static_cast<int>(kVectorBytes / element_size(problem_.dtype))) {}

  Geometry map() {
    if (problem_.layout == Layout::kChannelsLast) {
      if (!map_channels_last() && !map_folded()) map_single_columns();
    } else if (problem_.layout == Layout::kGeneric ||
               (!map_small_segments() && !map_contiguous())) {
      map_generic();
    }
    const int64_t vectors = problem_.per_channel() * problem_.channels / geometry_.width;
    if (vectors >= kMaxVectors) {
      geometry_ = {};
      map_generic();
    }
    if (geometry_.mapping == Mapping::kMatrixColumns) {
      geometry_.row_vectors = vectors / geometry_.extent;
    }
    geometry_.splits = 1;
    return geometry_;
  }

 private:
  bool map_channels_last() {
    if (!request_.aligned || problem_.channels % width_ != 0) return false;
    cut_into_channel_tiles(problem_.channels / width_, width_, kMaxTileVectors, kMinTileVectors);
    return true;
  }

  // Several positions to a row, so that rows are whole vectors though channels are not.
  bool map_folded() {
    const int64_t fold = width_ / std::gcd(problem_.channels, int64_t{width_});
    const int64_t vectors = problem_.channels * fold / width_;
    if (!request_.aligned || problem_.per_channel() % fold != 0 || vectors > kMaxRowVectors) {
      return false;
    }
    Geometry& g = geometry_;
    g.mapping = Mapping::kMatrixColumns;
    g.width = width_;
    g.channel_tiles = 1;
    g.tile_channels = static_cast<int>(problem_.channels);
    g.extent = problem_.per_channel() / fold;
    g.vectors = static_cast<int>(vectors);
    g.repeats = static_cast<int>(fold);
    g.channel_step = 1;
    g.repeat_step = static_cast<int>(problem_.channels);
    return true;
  }

  void map_single_columns() {
    cut_into_channel_tiles(problem_.channels, 1, kMaxRowVectors, kWarpThreads);
  }

  void cut_into_channel_tiles(int64_t vectors, int width, int widest, int narrowest) {
    const int64_t channel_tiles = ceil_divide(vectors, std::max(widest >> narrowing_, narrowest));
    int64_t wide = ceil_divide(vectors, channel_tiles);
    if (channel_tiles > 1) wide = round_up(wide, narrowest);
    Geometry& g = geometry_;
    g.mapping = Mapping::kMatrixColumns;
    g.width = width;
    g.channel_tiles = static_cast<int>(ceil_divide(vectors, wide));
    g.tile_channels = static_cast<int>(wide * width);
    g.extent = problem_.per_channel();
    g.vectors = static_cast<int>(wide);
  }

  // Segments that are no whole vectors, as many together as are.
  bool map_small_segments() {
    const int64_t spatial = problem_.spatial;
    const int64_t group = width_ / std::gcd(spatial, int64_t{width_});
    const int64_t group_vectors = group * spatial / width_;
    if (!request_.aligned || group == 1 || problem_.channels % group != 0 ||
        group_vectors > kMaxRowVectors) {
      return false;
    }
    const int64_t groups = problem_.channels / group;
    const int64_t together =
        std::clamp<int64_t>((kMaxTileVectors >> narrowing_) / group_vectors, 1, groups);
    Geometry& g = geometry_;
    g.mapping = Mapping::kMatrixColumns;
    g.width = width_;
    g.channel_tiles = static_cast<int>(ceil_divide(groups, together));
    g.tile_channels = static_cast<int>(group * together);
    g.extent = problem_.batch;
    g.vectors = static_cast<int>(group_vectors * together);
    g.repeats = static_cast<int>(spatial);
    g.channel_step = static_cast<int>(spatial);
    g.repeat_step = 1;
    return true;
  }

  bool map_contiguous() {
    const bool whole = problem_.spatial % width_ == 0;
    const int64_t segment_vectors =
        whole ? problem_.spatial / width_ : (problem_.spatial + 2 * width_ - 2) / width_;
    if (!request_.aligned || segment_vectors > kMaxSegmentVectors) return false;
    Geometry& g = geometry_;
    g.mapping = Mapping::kContiguous;
    g.width = width_;
    g.channel_tiles = static_cast<int>(problem_.channels);
    g.extent = problem_.batch * segment_vectors;
    g.segment_vectors = fast_divmod(static_cast<uint32_t>(segment_vectors));
    return true;
  }

  void map_generic() {
    Geometry& g = geometry_;
    g.mapping = Mapping::kGeneric;
    g.width = 1;
    g.channel_tiles = static_cast<int>(problem_.channels);
    g.extent = problem_.per_channel();
  }

  const Request& request_;
  const Problem& problem_;
  const int narrowing_;
  const int width_;  // of a vector
  Geometry geometry_;
};

}  // namespace

Geometry map_elements(const Request& request, int narrowing) {
  return Mapper(request, narrowing).map();
}

ThreadStep thread_step(const Geometry& geometry) {
  const int threads = geometry.threads;
  ThreadStep step;
  if (geometry.mapping == Mapping::kMatrixColumns) step.rows = threads / geometry.vectors;
  if (geometry.mapping == Mapping::kContiguous) {
    const int segment_vectors = static_cast<int>(geometry.segment_vectors.divisor);
    step.vectors = threads % segment_vectors;
    step.samples = threads / segment_vectors;
  }
  return step;
}

Occupancy occupancy(Mapping mapping) {
  switch (mapping) {
    case Mapping::kMatrixColumns:
      return kMatrixColumnsOccupancy;
    case Mapping::kContiguous:
      return kContiguousOccupancy;
    case Mapping::kGeneric:
      break;
  }
  return kGenericOccupancy;
}

int64_t row_bytes(const Problem& problem, const Geometry& geometry) {
  return int64_t{geometry.vectors} * geometry.width * element_size(problem.dtype);
}

int64_t channel_tile_bytes(const Problem& problem, const Geometry& geometry) {
  const bool columns = geometry.mapping == Mapping::kMatrixColumns;
  return columns ? geometry.extent * row_bytes(problem, geometry)
                 : problem.per_channel() * element_size(problem.dtype);
}

int64_t contiguous_bytes(const Problem& problem, const Geometry& geometry) {
  switch (geometry.mapping) {
    case Mapping::kMatrixColumns: {
      const int64_t row = row_bytes(problem, geometry);
      return geometry.channel_tiles == 1 ? row * geometry.extent : row;
    }
    case Mapping::kContiguous:
      return problem.spatial * element_size(problem.dtype);
    case Mapping::kGeneric:
      break;
  }
  return element_size(problem.dtype);
}

bool has_whole_vectors(const Problem& problem, const Geometry& geometry) {
  if (geometry.width * element_size(problem.dtype) != kVectorBytes) return false;
  return geometry.mapping != Mapping::kContiguous || problem.spatial % geometry.width == 0;
}

}  // namespace fastbn::cuda
