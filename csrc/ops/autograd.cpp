// SPDX-License-Identifier: BSD-3-Clause
//
// Batch norm with its gradient as one operator, and the same with an epilogue: what modules call.
// Their kernels are composed of the operators of ops.h, for every backend and for tracing alike.
//
// They save x, weight, the statistics that forward used and, where the derivative of an activation
// function needs it, a mask or else the residual and bias; never the running buffers: later forward
// passes through the same module leave their gradients right. Gradients of
// gradients are those of the formulas of fastbn/composite.py, which has the kernels of
// *_backward_composite.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <string>

#include "ops.h"

namespace fastbn {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Tensor = at::Tensor;
using Gradients4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Calls the operator of that name by the dispatcher. Results and arguments are of exactly the types
// of its schema; it is looked up once for these types, which no two of the operators here share.
template <typename Result, typename... Arguments>
Result call(const char* name, Arguments... arguments) {
  static const auto found =
      c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Arguments...)>();
  return found.call(arguments...);
}

OptionalTensor saved(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

template <typename... Tensors>
bool any_requires_grad(const Tensors&... tensors) {
  const auto requires_grad = [](const OptionalTensor& tensor) {
    return tensor && tensor->requires_grad();
  };
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

// Which of a function's first arguments need gradients; `given` tells which of them are tensors, as
// the context counts only those.
template <size_t kTensors>
std::array<bool, kTensors> wanted_of(AutogradContext* context,
                                     const std::array<bool, kTensors>& given) {
  std::array<bool, kTensors> wanted{};
  size_t edge = 0;
  for (size_t i = 0; i < kTensors; ++i) wanted[i] = given[i] && context->needs_input_grad(edge++);
  return wanted;
}

// As many gradients as a function has arguments, those that are not wanted undefined.
template <size_t kArguments, size_t kTensors, typename Results>
variable_list gradients_of(const std::array<bool, kTensors>& wanted, const Results& results) {
  variable_list all(kArguments);
  std::apply(
      [&](const auto&... result) {
        size_t i = 0;
        ((all[i] = wanted[i] ? result : Tensor(), ++i), ...);
      },
      results);
  return all;
}

// The running statistics and how to update them.
struct Running {
  const OptionalTensor &mean, &var, &num_batches_tracked;
  bool training;
  std::optional<double> momentum;
};

ForwardResults forward_of(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                          const Running& running, double eps, bool save) {
  if (running.training) {
    return call<ForwardResults, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                std::optional<double>, double>("fastbn::batch_norm_training", x, weight, bias,
                                               running.mean, running.var,
                                               running.num_batches_tracked, running.momentum, eps);
  }
  return call<ForwardResults, const Tensor&, const OptionalTensor&, const OptionalTensor&,
              const OptionalTensor&, const OptionalTensor&, double, bool>(
      "fastbn::batch_norm_eval", x, weight, bias, running.mean, running.var, eps, save);
}

class BatchNorm : public torch::autograd::Function<BatchNorm> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Running& running, double eps) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [y, mean, invstd] = forward_of(x, weight, bias, running, eps, /*save=*/true);
    context->save_for_backward({x, weight.value_or(Tensor()), mean, invstd});
    context->saved_data["has_bias"] = bias.has_value();
    context->saved_data["training"] = running.training;
    context->saved_data["eps"] = eps;
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& dy) {
    const variable_list tensors = context->get_saved_variables();
    const Tensor &x = tensors[0], &mean = tensors[2], &invstd = tensors[3];
    const OptionalTensor weight = saved(tensors[1]);
    const auto wanted =
        wanted_of<3>(context, {true, weight.has_value(), context->saved_data["has_bias"].toBool()});
    const bool training = context->saved_data["training"].toBool();
    if (at::GradMode::is_enabled()) {
      return gradients_of<kArguments>(
          wanted, call<Gradients, const Tensor&, const Tensor&, const OptionalTensor&,
                       const Tensor&, const Tensor&, bool, double>(
                      "fastbn::batch_norm_backward_composite", dy[0], x, weight, mean, invstd,
                      training, context->saved_data["eps"].toDouble()));
    }
    return gradients_of<kArguments>(
        wanted, call<Gradients, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                     const Tensor&, bool, bool, bool, bool>("fastbn::batch_norm_backward", dy[0], x,
                                                            weight, mean, invstd, training,
                                                            wanted[0], wanted[1], wanted[2]));
  }

 private:
  static constexpr size_t kArguments = 5;
};

Tensor batch_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, bool training,
                  std::optional<double> momentum, double eps) {
  const Running running{running_mean, running_var, num_batches_tracked, training, momentum};
  if (any_requires_grad(x, weight, bias)) return BatchNorm::apply(x, weight, bias, running, eps);
  return std::get<0>(forward_of(x, weight, bias, running, eps, /*save=*/false));
}

struct NamedFunction {
  c10::string_view name;
  double parameter;
};

ActForwardResults act_forward_of(const Tensor& x, const OptionalTensor& residual,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const Running& running, double eps,
                                 const NamedFunction& activation, bool save) {
  if (running.training) {
    return call<ActForwardResults, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                const OptionalTensor&, std::optional<double>, double, c10::string_view, double,
                bool>("fastbn::batch_norm_act_training", x, residual, weight, bias, running.mean,
                      running.var, running.num_batches_tracked, running.momentum, eps,
                      activation.name, activation.parameter, /*want_mask=*/save);
  }
  return call<ActForwardResults, const Tensor&, const OptionalTensor&, const OptionalTensor&,
              const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double, bool,
              c10::string_view, double>("fastbn::batch_norm_act_eval", x, residual, weight, bias,
                                        running.mean, running.var, eps, save, activation.name,
                                        activation.parameter);
}

class BatchNormAct : public torch::autograd::Function<BatchNormAct> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x, const OptionalTensor& residual,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        const Running& running, double eps, const NamedFunction& activation) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [y, mean, invstd, mask] =
        act_forward_of(x, residual, weight, bias, running, eps, activation, /*save=*/true);
    const bool has_mask = mask.sym_numel() != 0;
    const bool needs_z = !has_mask && activation.name != "identity";
    context->save_for_backward(
        {x, needs_z ? residual.value_or(Tensor()) : Tensor(), weight.value_or(Tensor()),
         needs_z ? bias.value_or(Tensor()) : Tensor(), has_mask ? mask : Tensor(), mean, invstd});
    context->saved_data["has_residual"] = residual.has_value();
    context->saved_data["has_bias"] = bias.has_value();
    context->saved_data["training"] = running.training;
    context->saved_data["eps"] = eps;
    context->saved_data["activation"] = std::string(activation.name);
    context->saved_data["parameter"] = activation.parameter;
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& dy) {
    const variable_list tensors = context->get_saved_variables();
    const Tensor &x = tensors[0], &mean = tensors[5], &invstd = tensors[6];
    const OptionalTensor residual = saved(tensors[1]), weight = saved(tensors[2]),
                         bias = saved(tensors[3]), mask = saved(tensors[4]);
    const auto wanted =
        wanted_of<4>(context, {true, context->saved_data["has_residual"].toBool(),
                               weight.has_value(), context->saved_data["has_bias"].toBool()});
    const bool training = context->saved_data["training"].toBool();
    const std::string& activation = context->saved_data["activation"].toStringRef();
    const double parameter = context->saved_data["parameter"].toDouble();
    // A sum passes its gradient on as it is.
    const bool passes_on = activation == "identity";
    auto gradients =
        at::GradMode::is_enabled()
            ? call<Gradients4, const Tensor&, const Tensor&, const OptionalTensor&,
                   const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                   const Tensor&, const Tensor&, bool, double, c10::string_view, double>(
                  "fastbn::batch_norm_act_backward_composite", dy[0], x, residual, mask, weight,
                  bias, mean, invstd, training, context->saved_data["eps"].toDouble(), activation,
                  parameter)
            : call<Gradients4, const Tensor&, const Tensor&, const OptionalTensor&,
                   const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                   const Tensor&, const Tensor&, bool, c10::string_view, double, bool, bool, bool,
                   bool>("fastbn::batch_norm_act_backward", dy[0], x, residual, mask, weight, bias,
                         mean, invstd, training, activation, parameter, wanted[0],
                         wanted[1] && !passes_on, wanted[2], wanted[3]);
    if (passes_on) std::get<1>(gradients) = dy[0];
    return gradients_of<kArguments>(wanted, gradients);
  }

 private:
  static constexpr size_t kArguments = 7;
};

Tensor batch_norm_act(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                      const OptionalTensor& bias, const OptionalTensor& running_mean,
                      const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                      bool training, std::optional<double> momentum, double eps,
                      c10::string_view name, double parameter) {
  const Running running{running_mean, running_var, num_batches_tracked, training, momentum};
  const NamedFunction activation{name, parameter};
  if (any_requires_grad(x, residual, weight, bias)) {
    return BatchNormAct::apply(x, residual, weight, bias, running, eps, activation);
  }
  return std::get<0>(
      act_forward_of(x, residual, weight, bias, running, eps, activation, /*save=*/false));
}

template <typename Kernel>
auto composite(Kernel kernel) {
  return torch::dispatch(c10::DispatchKey::CompositeImplicitAutograd, kernel);
}

}  // namespace

}  // namespace fastbn

TORCH_LIBRARY_FRAGMENT(fastbn, library) {
  library.def(
      "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, "
      "float eps) -> Tensor",
      fastbn::composite(TORCH_FN(fastbn::batch_norm)));
  library.def(
      "batch_norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
      "bool training, float? momentum, float eps, str activation, float parameter) -> Tensor",
      fastbn::composite(TORCH_FN(fastbn::batch_norm_act)));
  library.def(
      "batch_norm_backward_composite(Tensor dy, Tensor x, Tensor? weight, Tensor mean, "
      "Tensor invstd, bool training, float eps) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  library.def(
      "batch_norm_act_backward_composite(Tensor dy, Tensor x, Tensor? residual, Tensor? mask, "
      "Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, bool training, float eps, "
      "str activation, float parameter) -> "
      "(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
}
