// C names over the launchers, so that ctypes can call the kernels as they run on the host executor. 0: done, 1: see
// zsq_error().
#include <exception>
#include <string>
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "host_exec.h"

namespace {
using namespace zsq::cuda;
std::string last_error;

template <class F>
int guarded(F f) {
  try {
    const cudaError_t e = f();
    if (e != cudaSuccess) last_error = "cudaError " + std::to_string(static_cast<int>(e));
    return e != cudaSuccess;
  } catch (const std::exception& e) {  // the executor found a bug in a kernel
    last_error = e.what();
    return 1;
  }
}
}  // namespace

// For each storage type: ZSQ_FOR_TYPES(M) is M(float, f32) M(double, f64) ... ; files below define M and undefine it.
#define ZSQ_FOR_TYPES(M) M(float, f32) M(double, f64) M(zsq::Bf16, bf16) M(zsq::Half, f16)
#define ZSQ_FOR_WIDE_TYPES(M) M(float, f32) M(double, f64)

extern "C" {
const char* zsq_error() { return last_error.c_str(); }
void zsq_seed(uint64_t seed) { hexec::options().seed = seed; }
unsigned long long zsq_launches() { return hexec::launches(); }

#include "shim_bn_act.inc"
#include "shim_bn_stats.inc"
#include "shim_fake_quant.inc"
#include "shim_learned_step.inc"
#include "shim_losses.inc"

size_t zsq_gi_workspace(int count) { return gi_sgd_workspace(count); }
int zsq_gi_sgd(const GiTensor* tensors, int count, float* kappa, int64_t* changed, const zsq::GiOptions* options,
               void* ws) {
  return guarded([&] { return gi_sgd(tensors, count, kappa, changed, *options, ws, nullptr); });
}
}
