// Element-wise kernels over storage of any type, and sums over a warp or a block. What an element becomes is an Op:
//   Storage: the storage type; in[K], out: pointers to n elements in the same order;
//   at(first): what the elements of one access share;  value(shared, u, v): the result for values v[K] of element u.
#pragma once
#include "../number.h"
#include "common.h"

namespace zsq::cuda {

template <class Op, int V>
__global__ void __launch_bounds__(kThreads) stream_kernel(const Op op, int64_t n) {
  using T = typename Op::Storage;
  constexpr int K = Op::kInputs, kInFlight = 4 / K;
  const int64_t whole = n / V, tail = whole * V + threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kInFlight) + threadIdx.x;
  Vec<T, V> p[kInFlight][K];
  ZSQ_UNROLL for (int k = 0; k < kInFlight; ++k) {
    ZSQ_UNROLL for (int j = 0; j < K; ++j) {
      if (first + k * kThreads < whole) p[k][j] = reinterpret_cast<const Vec<T, V>*>(op.in[j])[first + k * kThreads];
    }
  }
  ZSQ_UNROLL for (int k = 0; k < kInFlight; ++k) {
    const int64_t unit = first + k * kThreads;
    if (unit >= whole) break;
    const auto shared = op.at(unit * V);
    ZSQ_UNROLL for (int u = 0; u < V; ++u) {
      Wide<T> v[K];
      ZSQ_UNROLL for (int j = 0; j < K; ++j) v[j] = widen(p[k][j].v[u]);
      p[k][0].v[u] = narrow<T>(op.value(shared, u, v));
    }
    reinterpret_cast<Vec<T, V>*>(op.out)[unit] = p[k][0];
  }
  if (blockIdx.x > 0 || tail >= n) return;
  Wide<T> v[K];
  ZSQ_UNROLL for (int j = 0; j < K; ++j) v[j] = widen(op.in[j][tail]);
  op.out[tail] = narrow<T>(op.value(op.at(tail), 0, v));
}

// `period`: an access must not cross a multiple of it; 0: it may lie anywhere.
template <class Op>
cudaError_t stream_through(const Op& op, int64_t n, int64_t period, cudaStream_t stream) {
  using T = typename Op::Storage;
  if (n == 0) return cudaSuccess;
  bool vec = period % kVec<T> == 0 && aligned(op.out);
  for (const T* in : op.in) vec = vec && aligned(in);
  const int64_t blocks = ceil_div(n, kThreads * (4 / Op::kInputs) * (vec ? kVec<T> : 1));
  return launch({blocks, kThreads, 0, stream}, vec ? stream_kernel<Op, kVec<T>> : stream_kernel<Op, 1>, op, n);
}

// Sums over groups of G = 32 or kThreads neighbouring threads, given to each, in a fixed order. All threads must call.
template <int G, int K>
__device__ __forceinline__ void group_sums(double (&s)[K]) {
  ZSQ_UNROLL for (int k = 0; k < K; ++k) {
    ZSQ_UNROLL for (int o = 16; o > 0; o /= 2) s[k] += __shfl_xor_sync(kFullWarp, s[k], o);
  }
  if (G == 32) return;
  ZSQ_SHARED(double, part, [K][kWarps]);
  __syncthreads();  // an earlier call may still be reading
  if (threadIdx.x % 32 == 0) {
    ZSQ_UNROLL for (int k = 0; k < K; ++k) part[k][threadIdx.x / 32] = s[k];
  }
  __syncthreads();
  ZSQ_UNROLL for (int k = 0; k < K; ++k) {
    s[k] = part[k][0];
    ZSQ_UNROLL for (int w = 1; w < kWarps; ++w) s[k] += part[k][w];
  }
}

}  // namespace zsq::cuda
