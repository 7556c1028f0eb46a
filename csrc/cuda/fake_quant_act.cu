// Per-tensor activation fake quantization with the range in device memory (8 B per float), and with the running range:
// one reduction (4 B per float) whose last block updates the range in place, then the same quantization. No host round
// trip in either.
#include "common.h"
#include "kernels.h"

namespace zsq::cuda {
namespace {

constexpr int kInFlight = 4;        // accesses a thread has under way at a time
constexpr int kRangeBlocks = 1024;  // fixed, so that the workspace does not depend on the device

// Elements past the last whole access are the tail; the first threads of block 0 take one each.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    quantize_kernel(const T* __restrict__ x, const T* __restrict__ lo, const T* __restrict__ hi, T* __restrict__ out,
                    int64_t n, int bits) {
  const Grid<T> g = make_grid(*lo, *hi, bits);
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
    ZSQ_UNROLL for (int u = 0; u < V; ++u) p[k].v[u] = fake_quant(p[k].v[u], g);
    dst[first + k * kThreads] = p[k];
  }
  if (blockIdx.x == 0 && tail < n) out[tail] = fake_quant(x[tail], g);
}

template <class T>
struct RunningRange {
  T *lo, *hi, *beta_t;
  T decay;
  bool plain;
  __device__ __forceinline__ void update(const Range<T>& seen) const {
    const T before = *beta_t, after = mul(before, decay);
    *beta_t = after;
    *lo = track(*lo, seen.lo, before, after, decay, plain);
    *hi = track(*hi, seen.hi, before, after, decay, plain);
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    running_range_kernel(const T* __restrict__ x, int64_t n, RunningRange<T> state, T* part, unsigned* ticket) {
  const int64_t whole = n / V, tail = whole * V + threadIdx.x, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const Vec<T, V>* src = reinterpret_cast<const Vec<T, V>*>(x);
  Range<T> r = empty_range<T>();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < whole; i += stride * kInFlight) {
    Vec<T, V> p[kInFlight];
    ZSQ_UNROLL for (int k = 0; k < kInFlight; ++k) p[k] = src[i + k * stride < whole ? i + k * stride : i];
    ZSQ_UNROLL for (int k = 0; k < kInFlight; ++k) { ZSQ_UNROLL for (int u = 0; u < V; ++u) r.see(p[k].v[u]); }
  }
  if (blockIdx.x == 0 && tail < n) r.see(x[tail]);
  r = block_range(r);
  if (threadIdx.x == 0) part[2 * blockIdx.x] = r.lo, part[2 * blockIdx.x + 1] = r.hi;
  if (!arrive_last(ticket, gridDim.x)) return;
  r = empty_range<T>();
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads)
    r.merge({__ldcg(part + 2 * b), __ldcg(part + 2 * b + 1)});
  r = block_range(r);
  if (threadIdx.x == 0) state.update(r);
}

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

size_t fake_quant_act_running_workspace(size_t element_size) { return 16 + 2 * kRangeBlocks * element_size; }

template <class T>
cudaError_t fake_quant_act_running(const T* x, Wide<T>* lo, Wide<T>* hi, Wide<T>* beta_t, T* out, int64_t n, int bits,
                                   double decay, bool plain, void* workspace, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  unsigned* ticket = static_cast<unsigned*>(workspace);
  T* part = reinterpret_cast<T*>(static_cast<char*>(workspace) + 16);
  const cudaError_t cleared = cudaMemsetAsync(ticket, 0, sizeof *ticket, stream);
  if (cleared != cudaSuccess) return cleared;
  const bool vec = aligned(x);
  const int64_t wanted = ceil_div(n, kThreads * kInFlight * (vec ? kVec<T> : 1));
  const RunningRange<T> state{lo, hi, beta_t, T(decay), plain};
  const auto kernel = vec ? running_range_kernel<T, kVec<T>> : running_range_kernel<T, 1>;
  const cudaError_t ranged =
      launch({wanted < kRangeBlocks ? wanted : kRangeBlocks, kThreads, 0, stream}, kernel, x, n, state, part, ticket);
  return ranged != cudaSuccess ? ranged : fake_quant_act<T>(x, lo, hi, out, n, bits, stream);
}

#define ZSQ_INSTANTIATE(T)                                                                                    \
  template cudaError_t fake_quant_act<T>(const T*, const T*, const T*, T*, int64_t, int, cudaStream_t);       \
  template cudaError_t fake_quant_act_running<T>(const T*, T*, T*, T*, T*, int64_t, int, double, bool, void*, \
                                                 cudaStream_t);
ZSQ_INSTANTIATE(float)
ZSQ_INSTANTIATE(double)

}  // namespace zsq::cuda
