// SPDX-License-Identifier: BSD-3-Clause
//
// The Python module. Importing it registers the operators torch.ops.fastbn.*, through which all
// tensors go; what it defines itself are questions about the build and the planner.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../core/activation_table.h"
#include "../core/mask.h"
#include "../cpu/simd/loops.h"
#include "../cuda/device_query.h"
#include "../cuda/planner/plan.h"
#include "messages.h"

namespace py = pybind11;

namespace fastbn {

namespace {

void define_planner(py::module_& module) {
  using cuda::Device;
  using cuda::Operation;
  using cuda::Plan;
  using cuda::Request;

  py::enum_<DType>(module, "DType")
      .value("float64", DType::kFloat64)
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);
  py::enum_<Layout>(module, "Layout")
      .value("contiguous", Layout::kContiguous)
      .value("channels_last", Layout::kChannelsLast)
      .value("generic", Layout::kGeneric);
  py::enum_<ActivationFunction>(module, "ActivationFunction")
#define FASTBN_FUNCTION(Function, name) .value(name, ActivationFunction::k##Function)
      FASTBN_ACTIVATION_FUNCTIONS(FASTBN_FUNCTION)
#undef FASTBN_FUNCTION
          ;
  py::enum_<Operation>(module, "Operation")
      .value("forward", Operation::kForward)
      .value("eval", Operation::kEval)
      .value("backward", Operation::kBackward);

  py::class_<Device>(module, "Device")
      .def_readonly("name", &Device::name)
      .def_readonly("major", &Device::major)
      .def_readonly("minor", &Device::minor)
      .def_readonly("multiprocessors", &Device::multiprocessors)
      .def_readonly("threads_per_multiprocessor", &Device::threads_per_multiprocessor)
      .def_readonly("shared_per_block", &Device::shared_per_block)
      .def_readonly("shared_per_multiprocessor", &Device::shared_per_multiprocessor)
      .def_readonly("l2_bytes", &Device::l2_bytes)
      .def_readonly("bandwidth", &Device::bandwidth)
      .def_readonly("copy_engine", &Device::copy_engine)
      .def_readonly("cooperative", &Device::cooperative)
      .def_readonly("clusters", &Device::clusters)
      .def_readonly("half_clusters", &Device::half_clusters);
  py::class_<Request>(module, "Request")
      .def(py::init([](Operation operation, DType dtype, Layout layout, int64_t batch,
                       int64_t channels, int64_t spatial) {
             Request request;
             request.operation = operation;
             request.problem = {dtype, layout, batch, channels, spatial};
             return request;
           }),
           py::arg("operation"), py::arg("dtype"), py::arg("layout"), py::arg("batch"),
           py::arg("channels"), py::arg("spatial"))
      .def_readwrite("aligned", &Request::aligned)
      .def_readwrite("cumulative", &Request::cumulative)
      .def_readwrite("training", &Request::training)
      .def_readwrite("want_dx", &Request::want_dx)
      .def_readwrite("want_dresidual", &Request::want_dresidual)
      .def_readwrite("want_dweight", &Request::want_dweight)
      .def_readwrite("want_dbias", &Request::want_dbias)
      .def_readwrite("free_multiprocessors", &Request::free_multiprocessors)
      .def("set_epilogue", &cuda::set_epilogue, py::arg("function"), py::arg("residual"));
  py::class_<Plan>(module, "Plan")
      .def_property_readonly("algorithm", [](const Plan& plan) { return name(plan.algorithm); })
      .def_property_readonly("mapping",
                             [](const Plan& plan) { return name(plan.geometry.mapping); })
      .def_property_readonly("channel_tiles",
                             [](const Plan& plan) { return plan.geometry.channel_tiles; })
      .def_property_readonly("splits", [](const Plan& plan) { return plan.geometry.splits; })
      .def_property_readonly("cta_groups",
                             [](const Plan& plan) { return plan.geometry.persistence.cta_groups; })
      .def_readonly("blocks_per_multiprocessor", &Plan::blocks_per_multiprocessor)
      .def_readonly("seconds", &Plan::seconds)
      .def_readonly("launches", &Plan::launches)
      .def_readonly("grid", &Plan::grid)
      .def_readonly("block", &Plan::block)
      .def_readonly("cluster", &Plan::cluster)
      .def_readonly("shared_bytes", &Plan::shared_bytes)
      .def_readonly("vector_bytes", &Plan::vector_bytes)
      .def_readonly("bytes_read", &Plan::bytes_read)
      .def_readonly("bytes_written", &Plan::bytes_written)
      .def_readonly("floor_bytes", &Plan::floor_bytes)
      .def_readonly("workspace_bytes", &Plan::workspace_bytes);

  module.def("known_devices", &cuda::known_devices, "Devices by their published properties.");
  module.def("device_properties", &cuda::device_properties, py::arg("index"),
             "Properties of a GPU of this machine.");
  module.def("force_algorithm", &cuda::force_algorithm, py::arg("name"),
             "What the CUDA backend uses from now on whatever it costs; 'auto' for the best.");
  module.def("leave_free", &cuda::leave_free, py::arg("multiprocessors"),
             "How many multiprocessors persistent grids leave to other kernels from now on.");
  module.def("current_name", &cuda::current_name, py::arg("algorithm"),
             "Today's name of an algorithm that was called otherwise; else the name itself.");
  module.def("plan", &cuda::plan, py::arg("request"), py::arg("device"), py::arg("forced"),
             "What the CUDA backend would do; see csrc/cuda/planner/plan.h.");
  module.def("alternatives", &cuda::alternatives, py::arg("request"), py::arg("device"),
             "What it would choose from: the best plan of each algorithm that fits.");
}

}  // namespace

}  // namespace fastbn

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled operators of fastbn.";
  module.def("cpu_capability", &fastbn::cpu::capability,
             "Instruction set of the CPU loops: 'scalar', 'default', 'avx2' or 'avx512'.");
  py::dict messages;
#define FASTBN_MESSAGE(name, text) messages[#name] = text;
  FASTBN_MESSAGES(FASTBN_MESSAGE)
#undef FASTBN_MESSAGE
  module.attr("messages") = messages;
  py::list functions;
#define FASTBN_FUNCTION(Function, name) functions.append(name);
  FASTBN_ACTIVATION_FUNCTIONS(FASTBN_FUNCTION)
#undef FASTBN_FUNCTION
  module.attr("activation_functions") = py::tuple(functions);
  py::list with_two_slopes;
#define FASTBN_FUNCTION(Function, name) \
  if (fastbn::has_two_slopes(fastbn::ActivationFunction::k##Function)) with_two_slopes.append(name);
  FASTBN_ACTIVATION_FUNCTIONS(FASTBN_FUNCTION)
#undef FASTBN_FUNCTION
  module.attr("functions_with_two_slopes") = py::tuple(with_two_slopes);
  module.attr("masked_bytes") = fastbn::kMaskedBytes;
  module.attr("max_mask_bytes") = fastbn::kMaxMaskBytes;
  fastbn::define_planner(module);
}
