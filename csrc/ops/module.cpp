// The Python module: importing it registers the kernels. It exposes no operation, only what was built.
#include <pybind11/pybind11.h>

#include "../cpu/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "zsq_fast native kernels; operations are reached through torch.ops.zsq";
  m.def("cpu_isa", [] { return zsq::cpu::kernels().isa; }, "instruction set of the CPU kernels on this machine");
#ifdef ZSQ_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
