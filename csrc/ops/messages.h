// SPDX-License-Identifier: BSD-3-Clause
//
// What is said of arguments that batch norm refuses: stock's words, where stock has some. The
// Python side, which checks tensors that have only a shape, takes them from here.
#pragma once

#include <sstream>
#include <string>

namespace fastbn {

// Every message, as MESSAGE(name, text). Each {} stands for an argument.
#define FASTBN_MESSAGES(MESSAGE)                                                                  \
  MESSAGE(one_value_per_channel,                                                                  \
          "Expected more than 1 value per channel when training, got input size {}")              \
  MESSAGE(training_eps, "batch_norm eps must be positive during training, but got {}")            \
  MESSAGE(eps, "batch_norm eps must be non-negative, but got {}")                                 \
  MESSAGE(elements, "{} should contain {} elements not {}")                                       \
  MESSAGE(no_statistics, "{} must be defined in evaluation mode")                                 \
  MESSAGE(one_statistic,                                                                          \
          "running_mean and running_var must either both be None or neither be None")             \
  MESSAGE(dtype, "\"batch_norm\" not implemented for '{}'")                                       \
  MESSAGE(mixed_with_float64, "mixed dtype ({}): all inputs must share same datatype.")           \
  MESSAGE(mixed_dtypes, "mixed dtype ({}): expect parameter to have scalar type of Float")        \
  MESSAGE(dimensions,                                                                             \
          "Dimension out of range (batch_norm takes an input of shape (N, C, ...), but got {}D)") \
  MESSAGE(no_element, "select(): index 0 out of range for tensor of size [0] at dimension 0")     \
  MESSAGE(counter, "num_batches_tracked must be a single int64, but got {} elements of {}")       \
  MESSAGE(gradient_shape, "dy has shape {} and x has shape {}; they must be the same")            \
  MESSAGE(gradient_dtype, "dy is {} and x is {}; they must be the same")                          \
  MESSAGE(residual_shape, "residual has shape {} and x has shape {}; they must be the same")      \
  MESSAGE(residual_dtype, "residual is {} and x is {}; they must be the same")                    \
  MESSAGE(mask,                                                                                   \
          "mask must be what forward returned, {} elements of uint8, and come instead of a "      \
          "residual, but got {} elements of {}")                                                  \
  MESSAGE(activation, "no activation function is called '{}'")                                    \
  MESSAGE(float64, "{} must be float64, but got {}")                                              \
  MESSAGE(rows, "rows must have shape (R, {}) for an input of shape {}, but got {}")              \
  MESSAGE(count, "count must be a single float64, but got {} elements")                           \
  MESSAGE(device, "Tensor on device {} is not on the expected device {}!")

namespace messages {
#define FASTBN_MESSAGE(name, text) constexpr const char* name = text;
FASTBN_MESSAGES(FASTBN_MESSAGE)
#undef FASTBN_MESSAGE
}  // namespace messages

// A message with its arguments filled in.
template <typename... Arguments>
std::string say(const std::string& message, const Arguments&... arguments) {
  std::ostringstream said;
  size_t begin = 0;
  const auto fill = [&](const auto& argument) {
    const size_t end = message.find("{}", begin);
    said << message.substr(begin, end - begin) << argument;
    begin = end + 2;
  };
  (fill(arguments), ...);
  return said.str() + message.substr(begin);
}

}  // namespace fastbn
