// What several kernel files share: 16-byte access, ranges that keep NaN, and the "last block finishes" pattern.
#pragma once
#include "../number.h"
#include "launch.h"

namespace zsq::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));
template <class T, int V>
struct alignas(V * sizeof(T)) Vec {
  T v[V];
};

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// fminf and fmaxf drop a NaN, torch.amin and torch.amax keep it, and a poisoned row must stay visible.
template <class T>
__device__ __forceinline__ T min_nan(T a, T b) {
  return b < a || b != b ? b : a;
}
template <class T>
__device__ __forceinline__ T max_nan(T a, T b) {
  return b > a || b != b ? b : a;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ float min_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
template <>
__device__ __forceinline__ float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
#endif

template <class T>
struct Range {
  T lo, hi;
  __device__ __forceinline__ void see(T x) { lo = min_nan(lo, x), hi = max_nan(hi, x); }
  __device__ __forceinline__ void merge(const Range& o) { lo = min_nan(lo, o.lo), hi = max_nan(hi, o.hi); }
};
template <class T>
__device__ __forceinline__ Range<T> empty_range() {
  return {T(INFINITY), -T(INFINITY)};
}

// Range over `Lanes` neighbouring lanes; all 32 lanes of the warp must call.
template <int Lanes, class T>
__device__ __forceinline__ Range<T> lanes_range(Range<T> r) {
  ZSQ_UNROLL for (int o = Lanes / 2; o > 0; o /= 2) {
    const T lo = __shfl_xor_sync(kFullWarp, r.lo, o);
    const T hi = __shfl_xor_sync(kFullWarp, r.hi, o);
    r.merge({lo, hi});
  }
  return r;
}

// Range over a block of kThreads; every thread gets it.
template <class T>
__device__ __forceinline__ Range<T> block_range(Range<T> r) {
  ZSQ_SHARED(Range<T>, part, [kWarps]);
  r = lanes_range<32>(r);
  __syncthreads();  // an earlier call may still be reading
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = r;
  __syncthreads();
  r = part[0];
  ZSQ_UNROLL for (int i = 1; i < kWarps; ++i) r.merge(part[i]);
  return r;
}

// Which of `count` pieces of work this block belongs to, given the first block of each.
__device__ __forceinline__ int piece_of_block(const int* first_block, int count) {
  int lo = 0, hi = count - 1;
  while (lo < hi) {
    const int mid = (lo + hi + 1) / 2;
    if (first_block[mid] <= static_cast<int>(blockIdx.x))
      lo = mid;
    else
      hi = mid - 1;
  }
  return lo;
}

// True in every thread of the block that arrives last of `total`: all that the other blocks wrote before arriving is
// then visible (read it past L1, with __ldcg).
__device__ __forceinline__ bool arrive_last(unsigned* ticket, unsigned total) {
  ZSQ_SHARED(int, is_last);
  __syncthreads();  // every thread's writes come before thread 0's fence
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(ticket, 1u) == total - 1;
    __threadfence();  // by the thread that did the atomic: the barrier then passes on what it acquired
  }
  __syncthreads();
  return is_last;
}

}  // namespace zsq::cuda
