// Per-tensor activation fake quantization with the range in device memory (8 B per float), and with the running range:
// what fits into the registers of all blocks stays there while they wait for its range (8 B per float); otherwise one
// reduction (4 B) whose last block updates the range in place, then the same quantization. No host round trip in any.
// The clipping gradient keeps a bit per element: a thread takes eight neighbours and their byte.
#include <algorithm>

#include "common.h"
#include "kernels.h"

namespace zsq::cuda {
namespace {

constexpr int kInFlight = 4;        // accesses a thread has under way at a time
constexpr int kRangeBlocks = 1024;  // fixed, so that the workspace does not depend on the device

// Elements past the last whole access are the tail; the first threads of block 0 take one each.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    quantize_kernel(const T* __restrict__ x, const Wide<T>* __restrict__ lo, const Wide<T>* __restrict__ hi,
                    T* __restrict__ out, int64_t n, int bits) {
  const Grid<Wide<T>> g = make_grid(*lo, *hi, bits);
  const int64_t whole = n / V, tail = whole * V + threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kInFlight) + threadIdx.x;
  const Vec<T, V>* src = reinterpret_cast<const Vec<T, V>*>(x);
  Vec<T, V>* dst = reinterpret_cast<Vec<T, V>*>(out);
  Vec<T, V> p[kInFlight];
  ZSQ_UNROLL for (int k = 0; k < kInFlight; ++k) {
    if (first + k * kThreads < whole) p[k] = src[first + k * kThreads];
  }
  ZSQ_UNROLL for (int k = 0; k < kInFlight; ++k) {
    if (first + k * kThreads >= whole) break;
    ZSQ_UNROLL for (int u = 0; u < V; ++u) p[k].v[u] = narrow<T>(fake_quant(widen(p[k].v[u]), g));
    dst[first + k * kThreads] = p[k];
  }
  if (blockIdx.x == 0 && tail < n) out[tail] = narrow<T>(fake_quant(widen(x[tail]), g));
}

// f(v, i, live) for every eight neighbours v = from[8*i ..], which it changes on their way to `to`; `live` of them
// exist. The same accesses under way for every type.
template <class T>
constexpr int kEights = 8 / static_cast<int>(sizeof(T));
template <int V, class T, class F>
__device__ __forceinline__ void each_eight(const T* __restrict__ from, T* __restrict__ to, int64_t n, F f) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kEights<T>)+threadIdx.x;
  Vec<T, V> p[kEights<T>][8 / V];
  ZSQ_UNROLL for (int k = 0; k < kEights<T>; ++k) {
    const int64_t at = 8 * (first + k * kThreads);
    if (at + 8 > n) break;
    ZSQ_UNROLL for (int u = 0; u < 8 / V; ++u) p[k][u] = reinterpret_cast<const Vec<T, V>*>(from + at)[u];
  }
  ZSQ_UNROLL for (int k = 0; k < kEights<T>; ++k) {
    const int64_t i = first + k * kThreads, at = 8 * i;
    if (at >= n) break;
    T v[8];
    if (at + 8 <= n) {
      ZSQ_UNROLL for (int u = 0; u < 8; ++u) v[u] = p[k][u / V].v[u % V];
      f(v, i, 8);
      ZSQ_UNROLL for (int u = 0; u < 8; ++u) p[k][u / V].v[u % V] = v[u];
      ZSQ_UNROLL for (int u = 0; u < 8 / V; ++u) reinterpret_cast<Vec<T, V>*>(to + at)[u] = p[k][u];
    } else {
      const int live = static_cast<int>(n - at);
      ZSQ_UNROLL for (int u = 0; u < 8; ++u) v[u] = u < live ? from[at + u] : T{};
      f(v, i, live);
      ZSQ_UNROLL for (int u = 0; u < 8; ++u) {
        if (u < live) to[at + u] = v[u];
      }
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    clip_kernel(const T* __restrict__ x, const Wide<T>* __restrict__ lo, const Wide<T>* __restrict__ hi,
                T* __restrict__ out, uint8_t* __restrict__ mask, int64_t n, int bits) {
  const Grid<Wide<T>> g = make_grid(*lo, *hi, bits);
  each_eight<V>(x, out, n, [&](T(&v)[8], int64_t i, int live) {
    unsigned keep = 0;
    ZSQ_UNROLL for (int u = 0; u < 8; ++u) {
      const Wide<T> value = widen(v[u]);
      keep |= static_cast<unsigned>(u < live && not_clamped(value, g)) << u;
      v[u] = narrow<T>(fake_quant(value, g));
    }
    mask[i] = static_cast<uint8_t>(keep);
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    masked_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ mask, T* __restrict__ out, int64_t n) {
  each_eight<V>(grad, out, n, [&](T(&v)[8], int64_t i, int) {
    const unsigned keep = mask[i];
    ZSQ_UNROLL for (int u = 0; u < 8; ++u) v[u] = keep >> u & 1 ? v[u] : T{};
  });
}

template <class T>
struct RangeState {
  T lo, hi, beta_t;
};
template <class T>
struct RunningRange {
  T *lo, *hi, *beta_t;
  T decay;
  bool plain;
  __device__ __forceinline__ RangeState<T> get() const { return {*lo, *hi, *beta_t}; }
  __device__ __forceinline__ void put(const RangeState<T>& s) const { *lo = s.lo, *hi = s.hi, *beta_t = s.beta_t; }
  __device__ __forceinline__ RangeState<T> after(const RangeState<T>& was, const Range<T>& seen) const {
    const T before = checked_beta(was.beta_t), beta = mul(before, decay);
    return {track(was.lo, seen.lo, before, beta, decay, plain), track(was.hi, seen.hi, before, beta, decay, plain),
            beta};
  }
};

// Range of what all blocks wrote to `part`, in every thread.
template <class T>
__device__ __forceinline__ Range<T> parts_range(const T* part) {
  Range<T> r = empty_range<T>();
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads)
    r.merge({__ldcg(part + 2 * b), __ldcg(part + 2 * b + 1)});
  return block_range(r);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    running_range_kernel(const T* __restrict__ x, int64_t n, RunningRange<Wide<T>> state, Wide<T>* part,
                         unsigned* ticket) {
  const int64_t whole = n / V, tail = whole * V + threadIdx.x, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const Vec<T, V>* src = reinterpret_cast<const Vec<T, V>*>(x);
  Range<Wide<T>> r = empty_range<Wide<T>>();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < whole; i += stride * kInFlight) {
    Vec<T, V> p[kInFlight];
    ZSQ_UNROLL for (int k = 0; k < kInFlight; ++k) p[k] = src[i + k * stride < whole ? i + k * stride : i];
    ZSQ_UNROLL for (int k = 0; k < kInFlight; ++k) { ZSQ_UNROLL for (int u = 0; u < V; ++u) r.see(widen(p[k].v[u])); }
  }
  if (blockIdx.x == 0 && tail < n) r.see(widen(x[tail]));
  r = block_range(r);
  if (threadIdx.x == 0) part[2 * blockIdx.x] = r.lo, part[2 * blockIdx.x + 1] = r.hi;
  if (!arrive_last(ticket, gridDim.x)) return;
  r = parts_range(part);
  if (threadIdx.x == 0) state.put(state.after(state.get(), r));
}

// Nothing that was computed from v is worth a register until v is used again: widened copies of the held 16-bit values
// would take twice the registers.
template <class T, int V>
__device__ __forceinline__ void hold(Vec<T, V>& v) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof v == 16) {
    unsigned* word = reinterpret_cast<unsigned*>(&v);
    ZSQ_UNROLL for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(word[i]));
  }
#endif
}

// In one pass, by blocks that all run at the same time. Every block computes the new range for itself, from the state
// as it was before they met.
constexpr int kHeld = 13;  // accesses that a thread keeps in registers, 14 MB on an H200; with more, ptxas spills
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    running_quantize_kernel(const T* __restrict__ x, T* __restrict__ out, int64_t n, RunningRange<Wide<T>> state,
                            Wide<T>* part, int bits) {
  const int64_t whole = n / V, tail = whole * V + threadIdx.x, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const Vec<T, V>* src = reinterpret_cast<const Vec<T, V>*>(x);
  Vec<T, V>* dst = reinterpret_cast<Vec<T, V>*>(out);
  Vec<T, V> p[kHeld];
  ZSQ_UNROLL for (int k = 0; k < kHeld; ++k) {
    if (first + k * stride < whole) p[k] = src[first + k * stride];
  }
  const bool has_tail = blockIdx.x == 0 && tail < n;
  const T last = has_tail ? x[tail] : T{};
  const RangeState<Wide<T>> was = state.get();
  Range<Wide<T>> r = empty_range<Wide<T>>();
  ZSQ_UNROLL for (int k = 0; k < kHeld; ++k) {
    if (first + k * stride >= whole) break;
    ZSQ_UNROLL for (int u = 0; u < V; ++u) r.see(widen(p[k].v[u]));
  }
  if (has_tail) r.see(widen(last));
  r = block_range(r);
  if (threadIdx.x == 0) part[2 * blockIdx.x] = r.lo, part[2 * blockIdx.x + 1] = r.hi;
  const auto grid = cooperative_groups::this_grid();
  grid.sync();
  const RangeState<Wide<T>> now = state.after(was, parts_range(part));
  if (blockIdx.x == 0 && threadIdx.x == 0) state.put(now);
  const Grid<Wide<T>> g = make_grid(now.lo, now.hi, bits);
  ZSQ_UNROLL for (int k = 0; k < kHeld; ++k) {
    if (first + k * stride >= whole) break;
    hold(p[k]);
    ZSQ_UNROLL for (int u = 0; u < V; ++u) p[k].v[u] = narrow<T>(fake_quant(widen(p[k].v[u]), g));
    dst[first + k * stride] = p[k];
  }
  if (has_tail) out[tail] = narrow<T>(fake_quant(widen(last), g));
}

// Below, two launches take no longer than one whose blocks wait for each other.
#ifdef __CUDACC__
constexpr int64_t kOnePassBytes = 2 << 20;
#else
constexpr int64_t kOnePassBytes = 16 << 10;  // so that tests reach both
#endif

}  // namespace

template <class T>
cudaError_t fake_quant_act(const T* x, const Wide<T>* lo, const Wide<T>* hi, T* out, int64_t n, int bits,
                           cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const bool vec = aligned(x) && aligned(out);
  const int64_t blocks = ceil_div(n, kThreads * kInFlight * (vec ? kVec<T> : 1));
  const auto kernel = vec ? quantize_kernel<T, kVec<T>> : quantize_kernel<T, 1>;
  return launch({blocks, kThreads, 0, stream}, kernel, x, lo, hi, out, n, bits);
}

template <class T>
cudaError_t fake_quant_act_clip(const T* x, const Wide<T>* lo, const Wide<T>* hi, T* out, uint8_t* mask, int64_t n,
                                int bits, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const auto kernel = aligned(x) && aligned(out) ? clip_kernel<T, kVec<T>> : clip_kernel<T, 1>;
  return launch({ceil_div(n, 8 * kThreads * kEights<T>), kThreads, 0, stream}, kernel, x, lo, hi, out, mask, n, bits);
}

template <class T>
cudaError_t masked(const T* grad, const uint8_t* mask, T* out, int64_t n, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const auto kernel = aligned(grad) && aligned(out) ? masked_kernel<T, kVec<T>> : masked_kernel<T, 1>;
  return launch({ceil_div(n, 8 * kThreads * kEights<T>), kThreads, 0, stream}, kernel, grad, mask, out, n);
}

size_t track_range_workspace(size_t element_size) {
  return 16 + 2 * kRangeBlocks * (element_size == 8 ? sizeof(double) : sizeof(float));
}

template <class T>
cudaError_t track_range(const T* x, Wide<T>* lo, Wide<T>* hi, Wide<T>* beta_t, int64_t n, double decay, bool plain,
                        void* workspace, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  unsigned* ticket = static_cast<unsigned*>(workspace);
  Wide<T>* part = reinterpret_cast<Wide<T>*>(static_cast<char*>(workspace) + 16);
  const RunningRange<Wide<T>> state{lo, hi, beta_t, Wide<T>(decay), plain};
  const cudaError_t cleared = cudaMemsetAsync(ticket, 0, sizeof *ticket, stream);
  if (cleared != cudaSuccess) return cleared;
  const int64_t wanted = ceil_div(n, kThreads * kInFlight * (aligned(x) ? kVec<T> : 1));
  const auto kernel = aligned(x) ? running_range_kernel<T, kVec<T>> : running_range_kernel<T, 1>;
  return launch({std::min<int64_t>(wanted, kRangeBlocks), kThreads, 0, stream}, kernel, x, n, state, part, ticket);
}

template <class T>
cudaError_t fake_quant_act_running(const T* x, Wide<T>* lo, Wide<T>* hi, Wide<T>* beta_t, T* out, int64_t n, int bits,
                                   double decay, bool plain, void* workspace, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  if (n * int64_t(sizeof(T)) >= kOnePassBytes) {
    Wide<T>* part = static_cast<Wide<T>*>(workspace);
    const bool vec = aligned(x) && aligned(out);
    const int64_t width = vec ? kVec<T> : 1, wanted = ceil_div(n, kThreads * kInFlight * width);
    const RunningRange<Wide<T>> state{lo, hi, beta_t, Wide<T>(decay), plain};
    const auto kernel = vec ? running_quantize_kernel<T, kVec<T>> : running_quantize_kernel<T, 1>;
    const int64_t resident = std::min<int64_t>(resident_blocks(kernel, kThreads), kRangeBlocks);
    if (n / width <= resident * kThreads * kHeld)
      return launch({std::min(wanted, resident), kThreads, 0, stream, true}, kernel, x, out, n, state, part, bits);
  }
  const cudaError_t ranged = track_range<T>(x, lo, hi, beta_t, n, decay, plain, workspace, stream);
  return ranged != cudaSuccess ? ranged : fake_quant_act<T>(x, lo, hi, out, n, bits, stream);
}

#define ZSQ_INSTANTIATE(T)                                                                                          \
  template cudaError_t fake_quant_act<T>(const T*, const Wide<T>*, const Wide<T>*, T*, int64_t, int, cudaStream_t); \
  template cudaError_t fake_quant_act_clip<T>(const T*, const Wide<T>*, const Wide<T>*, T*, uint8_t*, int64_t, int, \
                                              cudaStream_t);                                                        \
  template cudaError_t masked<T>(const T*, const uint8_t*, T*, int64_t, cudaStream_t);                              \
  template cudaError_t track_range<T>(const T*, Wide<T>*, Wide<T>*, Wide<T>*, int64_t, double, bool, void*,         \
                                      cudaStream_t);                                                                \
  template cudaError_t fake_quant_act_running<T>(const T*, Wide<T>*, Wide<T>*, Wide<T>*, T*, int64_t, int, double,  \
                                                 bool, void*, cudaStream_t);
ZSQ_INSTANTIATE(float)
ZSQ_INSTANTIATE(double)
ZSQ_INSTANTIATE(Bf16)
ZSQ_INSTANTIATE(Half)

}  // namespace zsq::cuda
