// C names over the launchers, so that ctypes can call the kernels as they run on the host executor. 0: done, 1: see
// zsq_error().
#include <exception>
#include <string>

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

extern "C" {
const char* zsq_error() { return last_error.c_str(); }
void zsq_seed(uint64_t seed) { hexec::options().seed = seed; }
unsigned long long zsq_launches() { return hexec::launches(); }
size_t zsq_running_workspace(size_t element) { return fake_quant_act_running_workspace(element); }
size_t zsq_bn_workspace(int64_t n, int64_t c, int64_t s, bool last, size_t element) {
  return bn_stats_workspace({n, c, s, last}, element);
}
size_t zsq_gi_workspace(int count) { return gi_sgd_workspace(count); }

#define ZSQ_SHIM(T, X)                                                                                                \
  int zsq_fake_quant_weight_##X(const T* w, T* out, int64_t rows, int64_t cols, int bits) {                           \
    return guarded([&] { return fake_quant_weight<T>(w, out, rows, cols, bits, nullptr); });                          \
  }                                                                                                                   \
  int zsq_weight_codes_##X(const T* w, T* codes, T* scale, T* lo, int64_t rows, int64_t cols, int bits) {             \
    return guarded([&] { return weight_codes<T>(w, codes, scale, lo, rows, cols, bits, nullptr); });                  \
  }                                                                                                                   \
  int zsq_fake_quant_act_##X(const T* x, const T* lo, const T* hi, T* out, int64_t n, int bits) {                     \
    return guarded([&] { return fake_quant_act<T>(x, lo, hi, out, n, bits, nullptr); });                              \
  }                                                                                                                   \
  int zsq_fake_quant_act_running_##X(const T* x, T* lo, T* hi, T* beta, T* out, int64_t n, int bits, double decay,    \
                                     bool plain, void* ws) {                                                          \
    return guarded(                                                                                                   \
        [&] { return fake_quant_act_running<T>(x, lo, hi, beta, out, n, bits, decay, plain, ws, nullptr); });         \
  }                                                                                                                   \
  int zsq_bn_stats_##X(const T* x, const T* mean, const T* var, T* loss, T* bm, T* bv, int64_t n, int64_t c,          \
                       int64_t s, bool last, void* ws) {                                                              \
    return guarded([&] { return bn_stats<T>({x, mean, var, loss, bm, bv, {n, c, s, last}}, ws, nullptr); });          \
  }                                                                                                                   \
  int zsq_bn_stats_backward_##X(const T* g, const T* x, const T* mean, const T* var, const T* bm, const T* bv, T* gx, \
                                int64_t n, int64_t c, int64_t s, bool last) {                                         \
    return guarded([&] { return bn_stats_backward<T>({g, x, mean, var, bm, bv, gx, {n, c, s, last}}, nullptr); });    \
  }
ZSQ_SHIM(float, f32)
ZSQ_SHIM(double, f64)

int zsq_gi_sgd(const GiTensor* tensors, int count, float* kappa, int64_t* changed, const zsq::GiOptions* options,
               void* ws) {
  return guarded([&] { return gi_sgd(tensors, count, kappa, changed, *options, ws, nullptr); });
}
}
