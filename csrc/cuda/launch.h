// The only portability header a kernel file includes. nvcc sees the CUDA runtime; g++ (tests only) sees
// tests/cuda_host/host_exec.h, which runs the same sources on the CPU. Hence no <<<>>> and no plain __shared__ in
// kernel files.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#ifdef __CUDACC__
#include <cuda_runtime.h>
// ZSQ_SHARED(float, tile, [32][33]);   ZSQ_SHARED(int, is_last);
#define ZSQ_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define ZSQ_DYN_SHARED(T, name)                             \
  extern __shared__ __align__(16) unsigned char zsq_dyn_[]; \
  T* name = reinterpret_cast<T*>(zsq_dyn_)
#define ZSQ_UNROLL _Pragma("unroll")
#else
#include "host_exec.h"
#define ZSQ_UNROLL
#endif

namespace zsq::cuda {

struct LaunchConfig {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

// The parameter types come from the kernel and the arguments convert to them: no void** arrays, no silent mismatch.
template <class... P, class... A>
cudaError_t launch(const LaunchConfig& c, void (*kernel)(P...), A&&... a) {
  static_assert(sizeof...(P) == sizeof...(A), "wrong number of kernel arguments");
  if (c.blocks > 0x7fffffffLL) return cudaErrorInvalidConfiguration;
#ifdef __CUDACC__
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(c.blocks));
  config.blockDim = dim3(static_cast<unsigned>(c.threads));
  config.dynamicSmemBytes = c.shared_bytes;
  config.stream = c.stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(std::forward<A>(a))...);
#else
  std::tuple<P...> t{static_cast<P>(std::forward<A>(a))...};
  auto body = [&] { std::apply(kernel, t); };
  hexec::run(
      {dim3(static_cast<unsigned>(c.blocks)), dim3(static_cast<unsigned>(c.threads)), c.shared_bytes, false},
      [](void* p) { (*static_cast<decltype(body)*>(p))(); }, &body);
  return cudaSuccess;
#endif
}

}  // namespace zsq::cuda
