// SPDX-License-Identifier: BSD-3-Clause
//
// The inner loops, compiled once per instruction set and chosen at run time.
//
// A "run" is `segments` stretches of `length` adjacent elements of one channel, `segment_stride`
// apart. A "tile" is `rows` rows of `columns` adjacent elements, `row_stride` apart; every column
// belongs to one channel. `acc` below is accumulate_dtype: double for float64, else float.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace fastbn::cpu {

struct Run {
  int64_t segments;
  int64_t segment_stride;
  int64_t length;
};

struct Tile {
  int64_t rows;
  int64_t row_stride;
  int64_t columns;
};

// Widest vector of any instruction set, in elements. Runs and tiles are read a whole vector at a
// time: `length` and `columns` must reach kMaxLanes, or kMaxLanes readable elements must lie in
// front of a run of one segment (their values do not matter).
constexpr int kMaxLanes = 16;
// Most columns of a tile: their sums live on the stack.
constexpr int64_t kMaxTileColumns = 2048;

// y = (x - mean) * scale + shift, and dx = dy * scale + (x - mean) * slope + offset.
struct Affine {
  double mean, scale, shift;
};
struct GradAffine {
  double mean, scale, slope, offset;
};

// The same per column: arrays of acc.
struct AffineColumns {
  const void *mean, *scale, *shift;
};
struct GradAffineColumns {
  const void *mean, *scale, *slope, *offset;
};

struct Loops {
  // Mean and sum of squared deviations of a run.
  void (*moments)(const void* x, Run run, double* mean, double* m2);
  // The same per column of a tile, merged by Chan's formula into what `mean` and `m2` hold for the
  // `count` rows seen before.
  void (*column_moments)(const void* x, Tile tile, int64_t count, double* mean, double* m2);

  // Sums of dy and of dy * (x - mean).
  void (*grad_sums)(const void* dy, const void* x, Run run, double mean, double* sum_dy,
                    double* sum_dy_xmu);
  // The same per column, added to what the sums hold. `mean` is acc.
  void (*column_grad_sums)(const void* dy, const void* x, Tile tile, const void* mean,
                           double* sum_dy, double* sum_dy_xmu);

  // Elementwise. With `stream` whole cache lines bypass the cache on their way to memory.
  // Segment i of a run takes coefficient i * step: 0 for a run of one channel, 1 for adjacent ones.
  void (*normalize)(const void* x, void* y, Run run, AffineColumns affine, int64_t step,
                    bool stream);
  void (*normalize_columns)(const void* x, void* y, Tile tile, AffineColumns affine, bool stream);
  void (*grad_input)(const void* dy, const void* x, void* dx, Run run, GradAffineColumns affine,
                     int64_t step, bool stream);
  void (*grad_input_columns)(const void* dy, const void* x, void* dx, Tile tile,
                             GradAffineColumns affine, bool stream);

  // `length` elements, `stride` apart, to and from adjacent acc.
  void (*gather)(const void* from, int64_t stride, int64_t length, void* to);
  void (*scatter)(const void* from, void* to, int64_t stride, int64_t length);
};

// For activations of `dtype`, in the widest instruction set this processor has.
const Loops& loops(DType dtype);

// Name of that instruction set: "default", "avx2" or "avx512". FASTBN_CPU_CAPABILITY in the
// environment caps it.
const char* capability();

}  // namespace fastbn::cpu
