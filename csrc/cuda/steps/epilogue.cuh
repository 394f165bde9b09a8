// SPDX-License-Identifier: BSD-3-Clause
//
// What follows batch norm in the steps that take elements: an activation function, and a residual
// before it.
//
// The function is chosen by a switch at run time, which goes the same way in all threads of a
// launch. It is in a function that is called for some values at once: thirteen functions in each
// unrolled loop of each kernel would be more code than all the rest.
#pragma once

#include "../../core/activation_functions.h"
#include "../gpu/intrinsics.cuh"

namespace fastbn::cuda {

// A number whose division takes few instructions: an exact one has a slow path, and code for it.
template <typename acc_t>
struct Number {
  acc_t value;

  FASTBN_DEVICE Number operator-() const { return {-value}; }
  FASTBN_DEVICE Number operator+(Number other) const { return {value + other.value}; }
  FASTBN_DEVICE Number operator-(Number other) const { return {value - other.value}; }
  FASTBN_DEVICE Number operator*(Number other) const { return {value * other.value}; }
  FASTBN_DEVICE Number operator/(Number other) const { return {gpu::divide(value, other.value)}; }
  FASTBN_DEVICE bool operator<(Number other) const { return value < other.value; }
  FASTBN_DEVICE bool operator<=(Number other) const { return value <= other.value; }
  FASTBN_DEVICE bool operator>(Number other) const { return value > other.value; }
  FASTBN_DEVICE bool operator>=(Number other) const { return value >= other.value; }
};

// Arithmetic of a thread, for core/activation_functions.h.
template <typename acc_t>
struct ThreadMath {
  using Value = Number<acc_t>;
  FASTBN_DEVICE static Value number(double value) { return {static_cast<acc_t>(value)}; }
  FASTBN_DEVICE static Value exp(Value of) { return {gpu::exp(of.value)}; }
  FASTBN_DEVICE static Value expm1(Value of) { return {gpu::expm1(of.value)}; }
  FASTBN_DEVICE static Value normal_cdf(Value of, Value) { return {gpu::normal_cdf(of.value)}; }
};

namespace detail {

// Values that are passed in registers.
template <typename acc_t, int kCount>
struct Piece {
  static constexpr int kSize = kCount;
  acc_t values[kCount];
};

// Values of a piece, at most: a vector of a 16-bit dtype, or one of float64, which takes registers.
template <typename acc_t>
constexpr int kMostInPiece = sizeof(acc_t) == 8 ? 1 : 8;

template <typename acc_t, int kCount>
FASTBN_DEVICE_CALL Piece<acc_t, kCount> values_of(ActivationFunction function, acc_t parameter,
                                                  Piece<acc_t, kCount> z) {
  with_function<ThreadMath<acc_t>>(function, [&](auto chosen) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) z.values[i] = chosen.value({z.values[i]}, {parameter}).value;
  });
  return z;
}

template <typename acc_t, int kCount>
FASTBN_DEVICE_CALL Piece<acc_t, kCount> derivatives_of(ActivationFunction function, acc_t parameter,
                                                       Piece<acc_t, kCount> z) {
  with_function<ThreadMath<acc_t>>(function, [&](auto chosen) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      z.values[i] = chosen.derivative({z.values[i]}, {parameter}).value;
    }
  });
  return z;
}

// A bit for each of z, which the dtype of activations holds: whether the derivative is 1 there.
template <typename acc_t, int kCount>
FASTBN_DEVICE_CALL unsigned slopes_of_one(ActivationFunction function, Piece<acc_t, kCount> z) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    bits |= static_cast<unsigned>(has_slope_one(function, z.values[i], acc_t{0}, acc_t{6})) << i;
  }
  return bits;
}

// Takes `values` piece by piece: values = take(piece).
template <typename acc_t, int kValues, typename Take>
FASTBN_DEVICE void in_pieces(acc_t (&values)[kValues], const Take& take) {
  constexpr int kMost = kMostInPiece<acc_t>;
  constexpr int kCount = kValues < kMost ? kValues : kMost;
  static_assert(kValues % kCount == 0);
#pragma unroll
  for (int first = 0; first < kValues; first += kCount) {
    Piece<acc_t, kCount> piece;
#pragma unroll
    for (int i = 0; i < kCount; ++i) piece.values[i] = values[first + i];
    piece = take(piece);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[first + i] = piece.values[i];
  }
}

}  // namespace detail

// Turns pre-activations into values of the function.
template <typename acc_t, int kValues>
FASTBN_DEVICE void activate(const Epilogue& epilogue, acc_t (&z)[kValues]) {
  const acc_t parameter = static_cast<acc_t>(epilogue.parameter);
  detail::in_pieces(
      z, [&](const auto& piece) { return detail::values_of(epilogue.function, parameter, piece); });
}

// Turns pre-activations into derivatives of the function there, at what the dtype of activations
// holds of them: where PyTorch's own operations have them.
template <typename scalar_t, typename acc_t, int kValues>
FASTBN_DEVICE void differentiate(const Epilogue& epilogue, acc_t (&z)[kValues]) {
  const acc_t parameter = static_cast<acc_t>(epilogue.parameter);
  detail::in_pieces(z, [&](auto piece) {
    gpu::Vector<scalar_t, decltype(piece)::kSize> held;
    gpu::narrow(piece.values, held.elements);
    gpu::widen(held.elements, piece.values);
    return detail::derivatives_of(epilogue.function, parameter, piece);
  });
}

// Writes the mask of the vectors of a tile, of the pre-activations of its values.
template <typename scalar_t, typename Tile, typename acc_t, int kValues>
FASTBN_DEVICE void leave_mask(const Tile& tile, const Epilogue& epilogue,
                              const acc_t (&z)[kValues]) {
  constexpr int kWidth = Tile::kWidth;
  constexpr int kCount =
      kWidth < detail::kMostInPiece<acc_t> ? kWidth : detail::kMostInPiece<acc_t>;
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
    unsigned byte = 0;
#pragma unroll
    for (int first = 0; first < kWidth; first += kCount) {
      detail::Piece<acc_t, kCount> piece;
#pragma unroll
      for (int i = 0; i < kCount; ++i) piece.values[i] = z[v * kWidth + first + i];
      gpu::Vector<scalar_t, kCount> held;
      gpu::narrow(piece.values, held.elements);
      gpu::widen(held.elements, piece.values);
      byte |= detail::slopes_of_one(epilogue.function, piece) << first;
    }
    tile.store_mask(epilogue.mask_out, v, static_cast<uint8_t>(byte));
  }
}

}  // namespace fastbn::cuda
