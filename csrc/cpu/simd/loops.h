// SPDX-License-Identifier: BSD-3-Clause
//
// The inner loops, compiled once per instruction set and chosen at run time.
//
// Loops walk blocks. `moments`, `grad_sums`, `normalize` and `grad_input` take blocks whose rows
// each belong to one channel; those called *_columns take blocks whose columns do. `acc_t` is
// accumulate_dtype: double for float64, else float. Pointers to activations are of the dtype that
// the loops were asked for.
#pragma once

#include <cstdint>

#include "../../core/activation_table.h"
#include "../../core/dtype.h"
#include "../../core/mask.h"

namespace fastbn::cpu {

// `rows` rows of `columns` adjacent elements, `row_stride` elements apart.
struct Block2d {
  int64_t rows;
  int64_t row_stride;
  int64_t columns;

  int64_t elements() const { return rows * columns; }
};

// Widest vector of any instruction set, in elements.
constexpr int kMaxLanes = 16;
// Most columns of a block whose columns are channels: their sums live on the stack.
constexpr int64_t kMaxBlockColumns = 2048;

// The demand of loops on a block: rows are read a whole vector at a time, and one that is shorter
// than the widest vector is read from before its beginning. It must then be the only row, and
// kMaxLanes elements in front of it must be readable; their values do not matter.
constexpr bool fills_vectors(const Block2d& block) { return block.columns >= kMaxLanes; }

// The demand of loops on two activations, one written and one read, is that they are disjoint();
// see problem.h. Or, without `stream`, the same; but what is left in `dz` is read nowhere.

// Coefficients of struct Affine and GradAffine (core/finalize.h), in arrays of acc_t.
struct AffineColumns {
  const void *mean, *scale, *shift;
};
struct GradAffineColumns {
  const void *mean, *scale, *slope, *offset;
};

// Those of the gradient through an epilogue: `affine` gives the pre-activation.
struct ActivatedGradColumns {
  AffineColumns affine;
  const void *slope, *offset;
};

// struct Epilogue of problem.h; the residual, if any, begins with the block and lies like x, and so
// do masks: the block and each of its rows begin with a byte, and rows end with one. `dtype` is
// that of the problem's activations, which the block may be a wider copy of unless it has a mask.
struct EpilogueLoop {
  ActivationFunction function;
  double parameter;
  DType dtype;
  const void* residual = nullptr;
  uint8_t* mask_out = nullptr;
  const uint8_t* mask = nullptr;
};

struct Loops {
  // Mean and sum of squared deviations of all elements of a block.
  void (*moments)(const void* x, Block2d block, double* mean, double* m2);
  // The same per column of at least kMaxLanes, merged by Chan's formula into what `mean` and `m2`
  // hold for the `count` rows seen before.
  void (*column_moments)(const void* x, Block2d block, int64_t count, double* mean, double* m2);

  // Sums of dy and of dy * (x - mean) over all elements of a block.
  void (*grad_sums)(const void* dy, const void* x, Block2d block, double mean, double* sum_dy,
                    double* sum_dy_xmu);
  // The same per column, added to what the sums hold. `mean` is an array of acc_t.
  void (*column_grad_sums)(const void* dy, const void* x, Block2d block, const void* mean,
                           double* sum_dy, double* sum_dy_xmu);

  // The elementwise passes. With `stream` whole cache lines bypass the cache on their way to
  // memory. Row i takes coefficient i * step: 0 where all rows are one channel's, 1 for adjacent
  // channels.
  void (*normalize)(const void* x, void* y, Block2d block, AffineColumns affine, int64_t step,
                    bool stream);
  void (*normalize_columns)(const void* x, void* y, Block2d block, AffineColumns affine,
                            bool stream);
  void (*grad_input)(const void* dy, const void* x, void* dx, Block2d block,
                     GradAffineColumns affine, int64_t step, bool stream);
  void (*grad_input_columns)(const void* dy, const void* x, void* dx, Block2d block,
                             GradAffineColumns affine, bool stream);

  // The same with an epilogue: y of x, and the mask where there is one to write.
  void (*activate)(const void* x, void* y, Block2d block, AffineColumns affine, int64_t step,
                   const EpilogueLoop& epilogue, bool stream);
  void (*activate_columns)(const void* x, void* y, Block2d block, AffineColumns affine,
                           const EpilogueLoop& epilogue, bool stream);
  // What grad_sums and grad_input compute, from the gradient dz of the pre-activation in the place
  // of dy, by the mask where there is one. It is also left in `dz` unless that is null; grad_input
  // then takes it from there. With statistics that are given and not taken in `training`, dx is dz
  // * scale.
  void (*activated_grad_sums)(const void* dy, const void* x, void* dz, Block2d block,
                              AffineColumns affine, const EpilogueLoop& epilogue, double* sum_dz,
                              double* sum_dz_xmu);
  void (*activated_column_grad_sums)(const void* dy, const void* x, void* dz, Block2d block,
                                     AffineColumns affine, const EpilogueLoop& epilogue,
                                     double* sum_dz, double* sum_dz_xmu);
  // What grad_input computes from dz where the function is ReLU, whose derivative is computed again
  // sooner than dz is kept. With statistics that are given and not taken in `training`, dx is
  // dz * scale.
  void (*relu_grad_input)(const void* dy, const void* x, void* dx, Block2d block,
                          ActivatedGradColumns coefficients, int64_t step,
                          const EpilogueLoop& epilogue, bool training, bool stream);
  void (*relu_grad_input_columns)(const void* dy, const void* x, void* dx, Block2d block,
                                  ActivatedGradColumns coefficients, const EpilogueLoop& epilogue,
                                  bool training, bool stream);
  // dz alone, of blocks with fewer columns, too.
  void (*activation_grad_columns)(const void* dy, const void* x, void* dz, Block2d block,
                                  AffineColumns affine, const EpilogueLoop& epilogue);

  // `length` elements, `stride` apart, to and from adjacent acc_t.
  void (*pack)(const void* from, int64_t stride, int64_t length, void* to);
  void (*unpack)(const void* from, void* to, int64_t stride, int64_t length);
};

// The loops for activations of `dtype`, in the widest instruction set that this processor has.
const Loops& loops(DType dtype);

// Name of that instruction set: "scalar", "default" (SSE2 or NEON), "avx2" or "avx512".
// FASTBN_CPU_CAPABILITY in the environment caps it.
const char* capability();

}  // namespace fastbn::cpu
