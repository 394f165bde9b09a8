// SPDX-License-Identifier: BSD-3-Clause
//
// The Python module. Importing it registers the operators torch.ops.fastbn.*, through which all
// tensors go; what it defines itself are questions about the build.
#include <pybind11/pybind11.h>

#include "cpu/loops.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled operators of fastbn.";
  module.def("cpu_capability", &fastbn::cpu::capability,
             "Instruction set of the CPU loops: 'default', 'avx2' or 'avx512'.");
}
