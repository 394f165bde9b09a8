// SPDX-License-Identifier: BSD-3-Clause
//
// The activation functions that may follow batch norm: value and derivative, once for vectors of
// the CPU's loops and for threads of a GPU.
//
// To add one, write a class below and put it into the table of activation_table.h;
// fastbn/activations.py has PyTorch's function of that name.
//
// `Math` is the arithmetic: a type Value of numbers, number(double), exp(z), expm1(z), and
// normal_cdf(z, exp(-z * z / 2)). Where Value is a vector, a comparison is of each lane, and so is
// ?:. Derivatives at kinks, and what becomes of NaN and infinities, are PyTorch's.
#pragma once

#include "activation_table.h"
#include "host_device.h"

namespace fastbn {

// Of each function value(z, parameter) and derivative(z, parameter). Only LeakyRelu (the slope
// below zero) and Elu (alpha) have a parameter.
namespace activation {

template <typename Math>
struct Identity {
  using V = typename Math::Value;
  FASTBN_HOST_DEVICE static V value(V z, V) { return z; }
  FASTBN_HOST_DEVICE static V derivative(V, V) { return Math::number(1); }
};

template <typename Math>
struct Relu {
  using V = typename Math::Value;
  FASTBN_HOST_DEVICE static V value(V z, V) {
    const V zero = Math::number(0);
    return z <= zero ? zero : z;
  }
  FASTBN_HOST_DEVICE static V derivative(V z, V) {
    const V zero = Math::number(0), one = Math::number(1);
    return z <= zero ? zero : one;
  }
};

template <typename Math>
struct Relu6 {
  using V = typename Math::Value;
  FASTBN_HOST_DEVICE static V value(V z, V) {
    const V zero = Math::number(0), six = Math::number(6);
    const V below = z >= six ? six : z;
    return z <= zero ? zero : below;
  }
  FASTBN_HOST_DEVICE static V derivative(V z, V) {
    const V zero = Math::number(0), one = Math::number(1), six = Math::number(6);
    const V below = z < six ? one : zero;
    return z > zero ? below : zero;
  }
};

template <typename Math>
struct LeakyRelu {
  using V = typename Math::Value;
  FASTBN_HOST_DEVICE static V value(V z, V slope) {
    const V scaled = z * slope;
    return z > Math::number(0) ? z : scaled;
  }
  FASTBN_HOST_DEVICE static V derivative(V z, V slope) {
    const V one = Math::number(1);
    return z > Math::number(0) ? one : slope;
  }
};

template <typename Math>
struct Elu {
  using V = typename Math::Value;
  FASTBN_HOST_DEVICE static V value(V z, V alpha) {
    const V curved = alpha * Math::expm1(z);
    return z > Math::number(0) ? z : curved;
  }
  FASTBN_HOST_DEVICE static V derivative(V z, V alpha) {
    const V one = Math::number(1);
    const V curved = alpha * Math::exp(z);
    return z > Math::number(0) ? one : curved;
  }
};

template <typename Math>
struct Sigmoid {
  using V = typename Math::Value;
  FASTBN_HOST_DEVICE static V value(V z, V) {
    const V one = Math::number(1);
    return one / (one + Math::exp(-z));
  }
  FASTBN_HOST_DEVICE static V derivative(V z, V) {
    const V one = Math::number(1);
    const V value = one / (one + Math::exp(-z));
    return value * (one - value);
  }
};

// z * sigmoid(z)
template <typename Math>
struct Silu {
  using V = typename Math::Value;
  FASTBN_HOST_DEVICE static V value(V z, V) { return z / (Math::number(1) + Math::exp(-z)); }
  FASTBN_HOST_DEVICE static V derivative(V z, V) {
    const V one = Math::number(1);
    const V gate = one / (one + Math::exp(-z));
    return gate * (one + z * (one - gate));
  }
};

// z * Phi(z), the cumulative distribution of the normal distribution
template <typename Math>
struct Gelu {
  using V = typename Math::Value;
  FASTBN_HOST_DEVICE static V gaussian(V z) { return Math::exp(Math::number(-0.5) * z * z); }
  FASTBN_HOST_DEVICE static V value(V z, V) { return z * Math::normal_cdf(z, gaussian(z)); }
  FASTBN_HOST_DEVICE static V derivative(V z, V) {
    const V inverse_sqrt_two_pi = Math::number(0.39894228040143267794);
    const V exponential = gaussian(z);
    return Math::normal_cdf(z, exponential) + z * (inverse_sqrt_two_pi * exponential);
  }
};

// z / 2 * (1 + tanh(u)), which is z * sigmoid(2u), with u = sqrt(2 / pi) * (z + 0.044715 * z^3)
template <typename Math>
struct GeluTanh {
  using V = typename Math::Value;
  FASTBN_HOST_DEVICE static V gate(V z) {
    const V twice_sqrt_two_over_pi = Math::number(1.5957691216057307117);
    const V twice_u =
        twice_sqrt_two_over_pi * z * (Math::number(1) + Math::number(0.044715) * z * z);
    return Math::number(1) / (Math::number(1) + Math::exp(-twice_u));
  }
  FASTBN_HOST_DEVICE static V value(V z, V) { return z * gate(z); }
  FASTBN_HOST_DEVICE static V derivative(V z, V) {
    const V one = Math::number(1), most = Math::number(40);
    // Beyond, the derivative is 0 or 1, and z * slope overflows sooner or later.
    z = z > most ? most : z;
    z = z < -most ? -most : z;
    const V twice_sqrt_two_over_pi = Math::number(1.5957691216057307117);
    const V slope = twice_sqrt_two_over_pi * (one + Math::number(3 * 0.044715) * z * z);
    const V gated = gate(z);
    return gated + z * slope * (gated * (one - gated));
  }
};

// min(max(z + 3, 0), 6) / 6
template <typename Math>
struct Hardsigmoid {
  using V = typename Math::Value;
  FASTBN_HOST_DEVICE static V value(V z, V) {
    const V zero = Math::number(0), six = Math::number(6);
    const V raised = z + Math::number(3);
    const V below = raised >= six ? six : raised;
    const V clamped = raised <= zero ? zero : below;
    return clamped * Math::number(1.0 / 6);
  }
  FASTBN_HOST_DEVICE static V derivative(V z, V) {
    const V zero = Math::number(0), sixth = Math::number(1.0 / 6);
    const V below = z < Math::number(3) ? sixth : zero;
    return z > Math::number(-3) ? below : zero;
  }
};

// z * hardsigmoid(z)
template <typename Math>
struct Hardswish {
  using V = typename Math::Value;
  FASTBN_HOST_DEVICE static V value(V z, V none) { return z * Hardsigmoid<Math>::value(z, none); }
  FASTBN_HOST_DEVICE static V derivative(V z, V) {
    const V zero = Math::number(0), one = Math::number(1);
    const V rising = z * Math::number(1.0 / 3) + Math::number(0.5);
    const V above = z >= Math::number(3) ? one : rising;
    return z <= Math::number(-3) ? zero : above;
  }
};

template <typename Math>
struct Tanh {
  using V = typename Math::Value;
  // From exp(-2 |z|) - 1, which neither overflows nor cancels.
  FASTBN_HOST_DEVICE static V value(V z, V) {
    const V zero = Math::number(0), two = Math::number(2);
    const V negative = z > zero ? -z : z;
    const V decay = Math::expm1(two * negative);
    const V below = decay / (two + decay);
    return z > zero ? -below : below;
  }
  FASTBN_HOST_DEVICE static V derivative(V z, V none) {
    const V tanh = value(z, none);
    return Math::number(1) - tanh * tanh;
  }
};

// z * tanh(log(1 + exp(z))), which is z * n / (n + 2) with n = exp(z) * (exp(z) + 2). From z = 20
// on the factor is 1 in float64, too.
template <typename Math>
struct Mish {
  using V = typename Math::Value;
  FASTBN_HOST_DEVICE static V bounded(V z) {
    const V most = Math::number(40);
    return z > most ? most : z;
  }
  FASTBN_HOST_DEVICE static V value(V z, V) {
    const V e = Math::exp(bounded(z));
    const V n = e * (e + Math::number(2));
    return z * (n / (n + Math::number(2)));
  }
  // tanh' = 1 - tanh^2 = 4 (n + 1) / (n + 2)^2, and the derivative of log(1 + exp(z)) is
  // exp(z) / (1 + exp(z)).
  FASTBN_HOST_DEVICE static V derivative(V z, V) {
    const V one = Math::number(1), two = Math::number(2);
    z = bounded(z);
    const V e = Math::exp(z);
    const V n = e * (e + two);
    const V below = one / (n + two);
    return n * below + z * (e / (one + e)) * (Math::number(4) * ((n + one) * below) * below);
  }
};

}  // namespace activation

// Whether the derivative at z, a number or a vector of them, is 1: of the functions that mask.h
// knows, which have one other derivative.
template <typename V>
FASTBN_HOST_DEVICE auto has_slope_one(ActivationFunction function, V z, V zero, V six)
    -> decltype(z > zero) {
  switch (function) {
    case ActivationFunction::kRelu:
      return (z <= zero) == 0;
    case ActivationFunction::kRelu6:
      return (z > zero) & (z < six);
    default:
      return z > zero;
  }
}

// Calls body(activation::Function<Math>()) for a function: where it is the same for many values,
// the choice is made once.
template <typename Math, typename Body>
FASTBN_HOST_DEVICE void with_function(ActivationFunction function, const Body& body) {
  switch (function) {
#define FASTBN_FUNCTION(Function, name) \
  case ActivationFunction::k##Function: \
    return body(activation::Function<Math>());
    FASTBN_ACTIVATION_FUNCTIONS(FASTBN_FUNCTION)
#undef FASTBN_FUNCTION
  }
}

}  // namespace fastbn
