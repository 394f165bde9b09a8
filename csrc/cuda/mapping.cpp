// SPDX-License-Identifier: BSD-3-Clause
#include "mapping.h"

#include <algorithm>
#include <numeric>

namespace fastbn::cuda {

namespace {

constexpr int kWarp = 32;

// Vectors side by side in a slab of channels-last data: 512 bytes at most, which a warp reads at
// once, and 64 bytes at least, which is what memory fetches.
constexpr int kWidestSlab = 32;
constexpr int kNarrowestSlab = kWidestSlab >> kNarrowest;
// A row that cannot be cut into slabs may be this wide.
constexpr int kWidestRow = 128;

// Windows are counted in 32 bits from the first of a range's first sample on: a range that does not
// begin with a sample adds few to those of one, or no memory holds the tensor.
constexpr int64_t kMostWindows = (int64_t{1} << 31) - (int64_t{1} << 27);

Divider divider(uint32_t divisor) {
  Divider by;
  by.divisor = divisor;
  while ((uint64_t{1} << by.shift) < divisor) ++by.shift;
  by.multiplier = static_cast<uint32_t>(
      ((uint64_t{1} << 32) * ((uint64_t{1} << by.shift) - divisor)) / divisor + 1);
  return by;
}

class Mapper {
 public:
  Mapper(const Request& request, int narrowed)
      : request_(request),
        problem_(request.problem),
        narrowed_(narrowed),
        width_(static_cast<int>(kVectorBytes / element_size(problem_.dtype))) {}

  Geometry map() {
    if (problem_.layout == Layout::kNSC) {
      if (!map_channels_last() && !map_folded()) map_single_columns();
    } else if (problem_.layout == Layout::kStrided || (!map_small_segments() && !map_segments())) {
      map_strided();
    }
    if (geometry_.mapping == Mapping::kColumns) {
      geometry_.matrix_columns = problem_.per_channel() * problem_.channels / geometry_.items;
    }
    geometry_.parts = 1;
    return geometry_;
  }

 private:
  bool map_channels_last() {
    if (!request_.aligned || problem_.channels % width_ != 0) return false;
    cut_into_slabs(problem_.channels / width_, width_, kWidestSlab, kNarrowestSlab);
    return true;
  }

  // Several positions to a row, so that rows are whole vectors though channels are not.
  bool map_folded() {
    const int64_t fold = width_ / std::gcd(problem_.channels, int64_t{width_});
    const int64_t vectors = problem_.channels * fold / width_;
    if (!request_.aligned || problem_.per_channel() % fold != 0 || vectors > kWidestRow) {
      return false;
    }
    Geometry& g = geometry_;
    g.mapping = Mapping::kColumns;
    g.width = width_;
    g.slabs = 1;
    g.slab_channels = static_cast<int>(problem_.channels);
    g.items = problem_.per_channel() / fold;
    g.vectors = static_cast<int>(vectors);
    g.repeats = static_cast<int>(fold);
    g.channel_step = 1;
    g.repeat_step = static_cast<int>(problem_.channels);
    return true;
  }

  void map_single_columns() { cut_into_slabs(problem_.channels, 1, kWidestRow, kWarp); }

  void cut_into_slabs(int64_t vectors, int width, int widest, int narrowest) {
    const int64_t slabs = ceil_divide(vectors, std::max(widest >> narrowed_, narrowest));
    int64_t wide = ceil_divide(vectors, slabs);
    if (slabs > 1) wide = round_up(wide, narrowest);
    Geometry& g = geometry_;
    g.mapping = Mapping::kColumns;
    g.width = width;
    g.slabs = static_cast<int>(ceil_divide(vectors, wide));
    g.slab_channels = static_cast<int>(wide * width);
    g.items = problem_.per_channel();
    g.vectors = static_cast<int>(wide);
  }

  // Segments that are no whole vectors, as many together as are.
  bool map_small_segments() {
    const int64_t spatial = problem_.spatial;
    const int64_t group = width_ / std::gcd(spatial, int64_t{width_});
    const int64_t group_vectors = group * spatial / width_;
    if (!request_.aligned || group == 1 || problem_.channels % group != 0 ||
        group_vectors > kWidestRow) {
      return false;
    }
    const int64_t groups = problem_.channels / group;
    const int64_t together =
        std::clamp<int64_t>((kWidestSlab >> narrowed_) / group_vectors, 1, groups);
    Geometry& g = geometry_;
    g.mapping = Mapping::kColumns;
    g.width = width_;
    g.slabs = static_cast<int>(ceil_divide(groups, together));
    g.slab_channels = static_cast<int>(group * together);
    g.items = problem_.batch;
    g.vectors = static_cast<int>(group_vectors * together);
    g.repeats = static_cast<int>(spatial);
    g.channel_step = static_cast<int>(spatial);
    g.repeat_step = 1;
    return true;
  }

  bool map_segments() {
    const bool whole = problem_.spatial % width_ == 0;
    const int64_t windows =
        whole ? problem_.spatial / width_ : (problem_.spatial + 2 * width_ - 2) / width_;
    if (!request_.aligned || windows > kMostWindows) return false;
    Geometry& g = geometry_;
    g.mapping = Mapping::kSegments;
    g.width = width_;
    g.slabs = static_cast<int>(problem_.channels);
    g.items = problem_.batch * windows;
    g.windows = divider(static_cast<uint32_t>(windows));
    return true;
  }

  void map_strided() {
    Geometry& g = geometry_;
    g.mapping = Mapping::kStrided;
    g.width = 1;
    g.slabs = static_cast<int>(problem_.channels);
    g.items = problem_.per_channel();
  }

  const Request& request_;
  const Problem& problem_;
  const int narrowed_;
  const int width_;  // of a vector
  Geometry geometry_;
};

}  // namespace

Geometry map_elements(const Request& request, int narrowed) {
  return Mapper(request, narrowed).map();
}

Occupancy occupancy(Mapping mapping) {
  switch (mapping) {
    case Mapping::kColumns:
      return kColumnsOccupancy;
    case Mapping::kSegments:
      return kSegmentsOccupancy;
    case Mapping::kStrided:
      break;
  }
  return kStridedOccupancy;
}

int64_t item_bytes(const Problem& problem, const Geometry& geometry) {
  return int64_t{geometry.vectors} * geometry.width * element_size(problem.dtype);
}

int64_t slab_bytes(const Problem& problem, const Geometry& geometry) {
  const bool columns = geometry.mapping == Mapping::kColumns;
  return columns ? geometry.items * item_bytes(problem, geometry)
                 : problem.per_channel() * element_size(problem.dtype);
}

int64_t run_bytes(const Problem& problem, const Geometry& geometry) {
  switch (geometry.mapping) {
    case Mapping::kColumns: {
      const int64_t row = item_bytes(problem, geometry);
      return geometry.slabs == 1 ? row * geometry.items : row;
    }
    case Mapping::kSegments:
      return problem.spatial * element_size(problem.dtype);
    case Mapping::kStrided:
      break;
  }
  return element_size(problem.dtype);
}

bool has_whole_vectors(const Problem& problem, const Geometry& geometry) {
  if (geometry.width * element_size(problem.dtype) != kVectorBytes) return false;
  return geometry.mapping != Mapping::kSegments || problem.spatial % geometry.width == 0;
}

}  // namespace fastbn::cuda
