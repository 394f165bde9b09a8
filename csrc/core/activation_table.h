// SPDX-License-Identifier: BSD-3-Clause
//
// Names of the activation functions that may follow batch norm.
#pragma once

#include <cstdint>

namespace fastbn {

// Every function, as FUNCTION(class, name).
#define FASTBN_ACTIVATION_FUNCTIONS(FUNCTION) \
  FUNCTION(Identity, "identity")              \
  FUNCTION(Relu, "relu")                      \
  FUNCTION(Relu6, "relu6")                    \
  FUNCTION(LeakyRelu, "leaky_relu")           \
  FUNCTION(Elu, "elu")                        \
  FUNCTION(Silu, "silu")                      \
  FUNCTION(Gelu, "gelu")                      \
  FUNCTION(GeluTanh, "gelu_tanh")             \
  FUNCTION(Hardswish, "hardswish")            \
  FUNCTION(Hardsigmoid, "hardsigmoid")        \
  FUNCTION(Sigmoid, "sigmoid")                \
  FUNCTION(Tanh, "tanh")                      \
  FUNCTION(Mish, "mish")

enum class ActivationFunction : int8_t {
#define FASTBN_FUNCTION(Function, name) k##Function,
  FASTBN_ACTIVATION_FUNCTIONS(FASTBN_FUNCTION)
#undef FASTBN_FUNCTION
};

}  // namespace fastbn
