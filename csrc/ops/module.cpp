// The Python module: importing it registers the kernels. It exposes no operation, only what was built.
#include <pybind11/pybind11.h>

#include "../cpu/kernels.h"
#include "memory.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "zsq_fast native kernels; operations are reached through torch.ops.zsq";
  m.def("cpu_isa", [] { return zsq::cpu::kernels().isa; }, "instruction set of the CPU kernels on this machine");
  m.def("kept_memory", &zsq::kept_memory, "bytes kept for later large CPU results");
  m.def("release_memory", &zsq::release_memory, "give them back to the system");
#ifdef ZSQ_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
