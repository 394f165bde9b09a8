// SPDX-License-Identifier: BSD-3-Clause
//
// The loops of loops.h that know of an epilogue. Part of loops_impl.h.
//
// They compute the pre-activation z again wherever they need it. In each, rows (or columns) differ
// only in where the coefficients of an element are: in one vector for the whole row, or in arrays.
#pragma once

#include "../../core/activation_functions.h"
#include "math.h"
#include "walks.h"

namespace fastbn::cpu::FASTBN_CAPABILITY {

// The largest number that activations hold as zero.
template <typename acc_t>
inline acc_t largest_vanishing(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return static_cast<acc_t>(0x1p-134);
    case DType::kFloat16:
      return static_cast<acc_t>(0x1p-25);
    default:
      return 0;
  }
}

// A vector as activations of a dtype hold it.
template <typename acc_t>
inline Vector<acc_t> held(DType dtype, Vector<acc_t> value) {
  if constexpr (std::is_same_v<acc_t, float>) {
    if (dtype == DType::kBFloat16) return to_float(from_float(value, BFloat16{}), BFloat16{});
    if (dtype == DType::kFloat16) return to_float(from_float(value, Float16{}), Float16{});
  }
  return value;
}

// The activation functions of epilogues, of vectors and of pairs: value(z), and gradient(dy, z), dy
// times the derivative. That is the derivative at z as an activation holds it: where that is zero,
// so is what a ReLU that follows batch norm gets. Where a function is flat no dy gets through, not
// even an infinite one. Where the derivative takes two values, has_slope_one(z) is the mask.
//
// set_gradients(dy, z) does so with up to kAtOnce vectors, z(v) being the v-th one's: a function
// that is called has several to work on while it waits for results.
template <typename acc_t>
class ReluFunction {
 public:
  using V = Vector<acc_t>;
  static constexpr std::integral_constant<int, 1> kAtOnce{};

  explicit ReluFunction(DType dtype) : vanishing_(splat(largest_vanishing<acc_t>(dtype))) {}

  inline __attribute__((always_inline)) V value(V z) const { return z <= V{} ? V{} : z; }
  inline __attribute__((always_inline)) V gradient(V dy, V z) const {
    return z <= vanishing_ ? V{} : dy;
  }
  template <typename Z>
  inline __attribute__((always_inline)) void set_gradients(V (&dy)[1], const Z& z) const {
    dy[0] = gradient(dy[0], z(0));
  }
  inline __attribute__((always_inline)) LaneMask<acc_t> has_slope_one(V z) const {
    return (z <= vanishing_) == 0;
  }
  inline __attribute__((always_inline)) Pair<acc_t> value(Pair<acc_t> z) const {
    return {value(z.first), value(z.second)};
  }
  inline __attribute__((always_inline)) PairMask<acc_t> has_slope_one(Pair<acc_t> z) const {
    return {has_slope_one(z.first), has_slope_one(z.second)};
  }
  inline __attribute__((always_inline)) Pair<acc_t> gradient(Pair<acc_t> dy, Pair<acc_t> z) const {
    return {gradient(dy.first, z.first), gradient(dy.second, z.second)};
  }

 private:
  const V vanishing_;
};

// Any other. So much code that all loops share it.
template <typename acc_t, int kVectors>
__attribute__((noinline)) void set_values(ActivationFunction function, Vector<acc_t> (&z)[kVectors],
                                          Vector<acc_t> parameter) {
  with_function<VectorMath<acc_t>>(function, [&](auto chosen) {
    for (Vector<acc_t>& vector : z) vector = chosen.value(vector, parameter);
  });
}
template <typename acc_t, int kVectors>
__attribute__((noinline)) void set_derivatives(ActivationFunction function, DType dtype,
                                               Vector<acc_t> (&z)[kVectors],
                                               Vector<acc_t> parameter) {
  with_function<VectorMath<acc_t>>(function, [&](auto chosen) {
    for (Vector<acc_t>& vector : z) {
      vector = chosen.derivative(held<acc_t>(dtype, vector), parameter);
    }
  });
}

template <typename acc_t>
class AnyFunction {
 public:
  using V = Vector<acc_t>;
  static constexpr std::integral_constant<int, kUnroll> kAtOnce{};

  explicit AnyFunction(const EpilogueLoop& epilogue)
      : function_(epilogue.function),
        dtype_(epilogue.dtype),
        parameter_(splat(static_cast<acc_t>(epilogue.parameter))) {}

  V value(V z) const {
    V vectors[] = {z};
    set_values<acc_t>(function_, vectors, parameter_);
    return vectors[0];
  }
  Pair<acc_t> value(Pair<acc_t> z) const {
    V vectors[] = {z.first, z.second};
    set_values<acc_t>(function_, vectors, parameter_);
    return {vectors[0], vectors[1]};
  }
  V gradient(V dy, V z) const {
    V slopes[] = {z};
    set_derivatives<acc_t>(function_, dtype_, slopes, parameter_);
    return times(dy, slopes[0]);
  }
  Pair<acc_t> gradient(Pair<acc_t> dy, Pair<acc_t> z) const {
    V slopes[] = {z.first, z.second};
    set_derivatives<acc_t>(function_, dtype_, slopes, parameter_);
    return {times(dy.first, slopes[0]), times(dy.second, slopes[1])};
  }
  template <int kVectors, typename Z>
  void set_gradients(V (&dy)[kVectors], const Z& z) const {
    V slopes[kVectors];
    for (int v = 0; v < kVectors; ++v) slopes[v] = z(v);
    set_derivatives<acc_t>(function_, dtype_, slopes, parameter_);
    for (int v = 0; v < kVectors; ++v) dy[v] = times(dy[v], slopes[v]);
  }
  LaneMask<acc_t> has_slope_one(V z) const {
    return fastbn::has_slope_one(function_, held<acc_t>(dtype_, z), V{}, splat<acc_t>(6));
  }
  PairMask<acc_t> has_slope_one(Pair<acc_t> z) const {
    return {has_slope_one(z.first), has_slope_one(z.second)};
  }

 private:
  static V times(V dy, V slope) {
    const V product = dy * slope;
    return slope == V{} ? V{} : product;
  }

  const ActivationFunction function_;
  const DType dtype_;
  const V parameter_;
};

// dy times the derivative that a mask tells.
template <typename acc_t>
class MaskedGradient {
 public:
  using V = Vector<acc_t>;

  explicit MaskedGradient(const EpilogueLoop& epilogue)
      : slope_(splat(static_cast<acc_t>(other_slope(epilogue.function, epilogue.parameter)))) {}

  V operator()(V dy, LaneMask<acc_t> has_slope_one) const {
    const V product = dy * slope_;
    const V otherwise = slope_ == V{} ? V{} : product;
    return has_slope_one ? dy : otherwise;
  }
  Pair<acc_t> operator()(Pair<acc_t> dy, PairMask<acc_t> has_slope_one) const {
    return {(*this)(dy.first, has_slope_one.first), (*this)(dy.second, has_slope_one.second)};
  }

 private:
  const V slope_;
};

// Calls body(function) with the class of the epilogue's function.
template <typename acc_t, typename Body>
inline __attribute__((always_inline)) void with_loop_function(const EpilogueLoop& epilogue,
                                                              const Body& body) {
  if (epilogue.function == ActivationFunction::kRelu) {
    body(ReluFunction<acc_t>(epilogue.dtype));
  } else {
    body(AnyFunction<acc_t>(epilogue));
  }
}

// A coefficient of all elements of a row, and those of columns.
template <typename acc_t>
struct OfRow {
  Vector<acc_t> value;

  OfRow(const void* array, int64_t index) : value(splat(as<acc_t>(array)[index])) {}
  template <typename At>
  Vector<acc_t> operator()(const At&) const {
    return value;
  }
};
template <typename acc_t>
struct OfColumns {
  const acc_t* array;

  OfColumns(const void* array, int64_t) : array(as<acc_t>(array)) {}
  template <typename At>
  auto operator()(const At& at) const {
    return at(array);
  }
};

// z of a row of elements.
template <typename scalar_t, template <typename> class Coefficient>
class PreActivation {
 public:
  using acc_t = acc_type<scalar_t>;

  PreActivation(const void* x, const EpilogueLoop& epilogue, const AffineColumns& affine,
                int64_t first, int64_t coefficient)
      : x_(as<scalar_t>(x) + first),
        residual_(epilogue.residual == nullptr ? nullptr : as<scalar_t>(epilogue.residual) + first),
        mean_(affine.mean, coefficient),
        scale_(affine.scale, coefficient),
        shift_(affine.shift, coefficient) {}

  template <typename At>
  inline __attribute__((always_inline)) auto centered(const At& at) const {
    return at.whole(x_) - mean_(at);
  }
  template <typename At, typename Centered>
  inline __attribute__((always_inline)) auto of(const At& at, const Centered& centered) const {
    auto z = centered * scale_(at) + shift_(at);
    if (residual_ != nullptr) z = z + at.whole(residual_);
    return z;
  }
  template <typename At>
  inline __attribute__((always_inline)) auto operator()(const At& at) const {
    return of(at, centered(at));
  }
  template <typename At>
  void prefetch_next(const At& at, int vector) const {
    prefetch(x_ + at.i + kPrefetchBytes / sizeof(scalar_t), vector);
  }

 private:
  const scalar_t *x_, *residual_;
  Coefficient<acc_t> mean_, scale_, shift_;
};

// In rows, lanes may come in any order.
template <template <typename> class Coefficient>
constexpr LaneOrder kOrderOf = LaneOrder::kMemory;
template <>
inline constexpr LaneOrder kOrderOf<OfRow> = LaneOrder::kAny;

template <typename scalar_t, template <typename> class Coefficient>
inline __attribute__((always_inline)) void activate_rows(const void* x, void* y, Block2d block,
                                                         AffineColumns affine, int64_t step,
                                                         const EpilogueLoop& epilogue,
                                                         bool stream) {
  with_loop_function<acc_type<scalar_t>>(epilogue, [&](const auto& function) {
    for (int64_t row = 0; row < block.rows; ++row) {
      const int64_t first = row * block.row_stride;
      const PreActivation<scalar_t, Coefficient> z(x, epilogue, affine, first, row * step);
      if (epilogue.mask_out != nullptr) {
        uint8_t* mask = epilogue.mask_out + first / kMasked<scalar_t>;
        map<LaneOrder::kMemory>(as<scalar_t>(y) + first, block.columns, stream, [&](auto at) {
          const auto value = z(at);
          at.template put_mask<scalar_t>(mask, function.has_slope_one(value));
          return function.value(value);
        });
        continue;
      }
      map<kOrderOf<Coefficient>>(as<scalar_t>(y) + first, block.columns, stream,
                                 [&](auto at) { return function.value(z(at)); });
    }
  });
  if (stream) stream_fence();
}

template <typename scalar_t, template <typename> class Coefficient>
inline __attribute__((always_inline)) void relu_grad_input_rows(
    const void* dy_data, const void* x, void* dx, Block2d block, ActivatedGradColumns coefficients,
    int64_t step, const EpilogueLoop& epilogue, bool training, bool stream) {
  using Numbers = Coefficient<acc_type<scalar_t>>;
  const ReluFunction<acc_type<scalar_t>> relu(epilogue.dtype);
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t first = row * block.row_stride;
    const scalar_t* dy = as<scalar_t>(dy_data) + first;
    const PreActivation<scalar_t, Coefficient> z(x, epilogue, coefficients.affine, first,
                                                 row * step);
    const Numbers scale(coefficients.affine.scale, row * step);
    const Numbers slope(coefficients.slope, row * step), offset(coefficients.offset, row * step);
    map<kOrderOf<Coefficient>>(as<scalar_t>(dx) + first, block.columns, stream, [&](auto at) {
      const auto centered = z.centered(at);
      const auto through = relu.gradient(at(dy), z.of(at, centered)) * scale(at);
      return training ? through + (centered * slope(at) + offset(at)) : through;
    });
  }
  if (stream) stream_fence();
}

template <typename scalar_t>
void activate(const void* x, void* y, Block2d block, AffineColumns affine, int64_t step,
              const EpilogueLoop& epilogue, bool stream) {
  activate_rows<scalar_t, OfRow>(x, y, block, affine, step, epilogue, stream);
}
template <typename scalar_t>
void activate_columns(const void* x, void* y, Block2d block, AffineColumns affine,
                      const EpilogueLoop& epilogue, bool stream) {
  activate_rows<scalar_t, OfColumns>(x, y, block, affine, 0, epilogue, stream);
}

template <typename scalar_t>
void relu_grad_input(const void* dy, const void* x, void* dx, Block2d block,
                     ActivatedGradColumns coefficients, int64_t step, const EpilogueLoop& epilogue,
                     bool training, bool stream) {
  relu_grad_input_rows<scalar_t, OfRow>(dy, x, dx, block, coefficients, step, epilogue, training,
                                        stream);
}
template <typename scalar_t>
void relu_grad_input_columns(const void* dy, const void* x, void* dx, Block2d block,
                             ActivatedGradColumns coefficients, const EpilogueLoop& epilogue,
                             bool training, bool stream) {
  relu_grad_input_rows<scalar_t, OfColumns>(dy, x, dx, block, coefficients, 0, epilogue, training,
                                            stream);
}

template <typename scalar_t>
void activation_grad_columns(const void* dy_data, const void* x, void* dz, Block2d block,
                             AffineColumns affine, const EpilogueLoop& epilogue) {
  const AnyFunction<acc_type<scalar_t>> function(epilogue);
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t first = row * block.row_stride;
    const scalar_t* dy = as<scalar_t>(dy_data) + first;
    const PreActivation<scalar_t, OfColumns> z(x, epilogue, affine, first, 0);
    map<LaneOrder::kMemory>(as<scalar_t>(dz) + first, block.columns, false,
                            [&](auto at) { return function.gradient(at(dy), z(at)); });
  }
}

template <typename scalar_t>
void activated_grad_sums(const void* dy_data, const void* x, void* dz_data, Block2d block,
                         AffineColumns affine, const EpilogueLoop& epilogue, double* sum_dz,
                         double* sum_dz_xmu) {
  const scalar_t* dy = as<scalar_t>(dy_data);
  scalar_t* dz = as<scalar_t>(dz_data);
  const PreActivation<scalar_t, OfRow> z(x, epilogue, affine, 0, 0);
  Sum<acc_type<scalar_t>> sums, products;
  const auto sum_up = [&](const auto& gradient_at) {
    for_each_vector<kLanes<acc_type<scalar_t>>>(block, [&](int accumulator, auto at) {
      z.prefetch_next(at, accumulator);
      prefetch(dy + at.i + kPrefetchBytes / sizeof(scalar_t), accumulator);
      const auto centered = z.centered(at);
      const auto gradient = gradient_at(at, at.whole(dy), centered);
      if (dz != nullptr) at.put(dz, gradient);
      sums.add(accumulator, at.kept(gradient));
      products.add(accumulator, at.kept(gradient * centered));
    });
  };
  if (epilogue.mask != nullptr) {
    const MaskedGradient<acc_type<scalar_t>> masked(epilogue);
    sum_up([&](const auto& at, const auto& dy, const auto&) {
      return masked(dy, at.template mask<scalar_t>(epilogue.mask));
    });
  } else {
    with_loop_function<acc_type<scalar_t>>(epilogue, [&](const auto& function) {
      sum_up([&](const auto& at, const auto& dy, const auto& centered) {
        return function.gradient(dy, z.of(at, centered));
      });
    });
  }
  *sum_dz = sums.total();
  *sum_dz_xmu = products.total();
}

template <typename scalar_t>
void activated_column_grad_sums(const void* dy_data, const void* x_data, void* dz_data,
                                Block2d block, AffineColumns affine, const EpilogueLoop& epilogue,
                                double* sum_dz, double* sum_dz_xmu) {
  using acc_t = acc_type<scalar_t>;
  using V = Vector<acc_t>;
  constexpr int kWidth = kLanes<acc_t>;
  const scalar_t* dy = as<scalar_t>(dy_data);
  const scalar_t* x = as<scalar_t>(x_data);
  const scalar_t* residual = as<scalar_t>(epilogue.residual);
  scalar_t* dz = as<scalar_t>(dz_data);
  const acc_t* mean = as<acc_t>(affine.mean);
  const acc_t* scale = as<acc_t>(affine.scale);
  const acc_t* shift = as<acc_t>(affine.shift);

  acc_t block_sums[kMaxBlockColumns], block_products[kMaxBlockColumns];
  // set_gradients(dy, i, z) as above; the first dy is the i-th element.
  const auto sum_up = [&](auto at_once, const auto& set_gradients) {
    for_each_visit<kWidth>(block, [&](int64_t j, auto vectors, int64_t begin, int64_t end) {
      constexpr int kVectors = decltype(vectors)::value;
      constexpr int kMost = decltype(at_once)::value;
      constexpr int kAtOnce = kVectors < kMost ? kVectors : kMost;
      V means[kVectors], scales[kVectors], shifts[kVectors];
      V sums[kVectors] = {}, products[kVectors] = {};
      for (int v = 0; v < kVectors; ++v) {
        const int64_t column = j + v * kWidth;
        means[v] = load(mean + column);
        scales[v] = load(scale + column);
        shifts[v] = load(shift + column);
        if (begin == 0) continue;
        sums[v] = load(block_sums + column);
        products[v] = load(block_products + column);
      }
      for (int64_t row = begin; row < end; ++row) {
        for (int first = 0; first < kVectors; first += kAtOnce) {
          const int64_t i = row * block.row_stride + j + first * kWidth;
          V centered[kAtOnce], gradients[kAtOnce];
          for (int v = 0; v < kAtOnce; ++v) {
            prefetch(dy + i + v * kWidth + kVisitRows * block.row_stride, first + v);
            prefetch(x + i + v * kWidth + kVisitRows * block.row_stride, first + v);
            centered[v] = load(x + i + v * kWidth) - means[first + v];
            gradients[v] = load(dy + i + v * kWidth);
          }
          set_gradients(gradients, i, [&](int v) {
            const V z = centered[v] * scales[first + v] + shifts[first + v];
            return residual == nullptr ? z : z + load(residual + i + v * kWidth);
          });
          for (int v = 0; v < kAtOnce; ++v) {
            if (dz != nullptr) store<false>(dz + i + v * kWidth, gradients[v]);
            sums[first + v] += gradients[v];
            products[first + v] += gradients[v] * centered[v];
          }
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        store<false>(block_sums + j + v * kWidth, sums[v]);
        store<false>(block_products + j + v * kWidth, products[v]);
      }
    });
  };
  if (epilogue.mask != nullptr) {
    const MaskedGradient<acc_t> masked(epilogue);
    sum_up(std::integral_constant<int, 1>{}, [&](V(&dy)[1], int64_t i, const auto&) {
      dy[0] = masked(dy[0], lanes_of<acc_t>(load_mask<scalar_t>(epilogue.mask, i)));
    });
  } else {
    with_loop_function<acc_t>(epilogue, [&](const auto& function) {
      sum_up(function.kAtOnce,
             [&](auto& dy, int64_t, const auto& z) { function.set_gradients(dy, z); });
    });
  }
  for (int64_t j = 0; j < block.columns; ++j) {
    sum_dz[j] += static_cast<double>(block_sums[j]);
    sum_dz_xmu[j] += static_cast<double>(block_products[j]);
  }
}

}  // namespace fastbn::cpu::FASTBN_CAPABILITY
