// The only portability header a kernel file includes. nvcc sees the CUDA runtime; g++ (tests only) sees
// tests/cuda_host/host_exec.h, which runs the same sources on the CPU. Hence no <<<>>> and no plain __shared__ in
// kernel files.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#ifdef __CUDACC__
#include <cooperative_groups.h>
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

// Bytes of arguments that a kernel takes: from CUDA 12.1 on 32,764, on every GPU that we build for.
#if !defined(CUDART_VERSION) || CUDART_VERSION >= 12010
constexpr int kArgumentBytes = 32764;
#else
constexpr int kArgumentBytes = 4096;
#endif
constexpr bool kLargeArguments = kArgumentBytes > 4096;

struct LaunchConfig {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  bool cooperative = false;  // all blocks run at the same time and may wait for each other
};

// Blocks of a kernel that can run at the same time on the current device; 0 if it cannot launch them cooperatively.
template <class... P>
int64_t resident_blocks([[maybe_unused]] void (*kernel)(P...), [[maybe_unused]] int threads) {
#ifdef __CUDACC__
  int device = 0, processors = 0, able = 0, blocks = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&able, cudaDevAttrCooperativeLaunch, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
                     cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0) == cudaSuccess;
  return known && able ? int64_t(blocks) * processors : 0;
#else
  return 8;  // few enough for the thread sanitizer
#endif
}

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
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  config.attrs = &together;
  config.numAttrs = c.cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(std::forward<A>(a))...);
#else
  std::tuple<P...> t{static_cast<P>(std::forward<A>(a))...};
  auto body = [&] { std::apply(kernel, t); };
  hexec::run(
      {dim3(static_cast<unsigned>(c.blocks)), dim3(static_cast<unsigned>(c.threads)), c.shared_bytes, c.cooperative},
      [](void* p) { (*static_cast<decltype(body)*>(p))(); }, &body);
  return cudaSuccess;
#endif
}

}  // namespace zsq::cuda
