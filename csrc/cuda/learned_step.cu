// Learned step sizes (LSQ, Esser et al. 2020). Forward 8 B per float; backward reads grad and x once, writes grad_x
// (12 B per float) and adds up the gradient of every row's step. Rows are cut into slices by shape alone; the last
// block adds up the slices in order.
#include "kernels.h"
#include "stream.h"

namespace zsq::cuda {
namespace {

template <class T>
struct Quantize {
  using Storage = T;
  static constexpr int kInputs = 1;
  const T* in[1];
  T* out;
  const Wide<T>* step;
  int64_t rows, cols;
  Wide<T> code_min, code_max;
  __device__ __forceinline__ Wide<T> at(int64_t first) const {
    return checked_step(step[rows == 1 ? 0 : first / cols]);
  }
  __device__ __forceinline__ Wide<T> value(Wide<T> s, int, const Wide<T> (&v)[1]) const {
    return learned_value(v[0], s, code_min, code_max);
  }
};

constexpr int64_t kWarpCols = 1024;   // rows up to this length get a warp each
constexpr int64_t kSliceCols = 4096;  // longer ones a block per slice of at least so many
constexpr int64_t kManySlices = 4096;

struct Slices {
  int64_t count, cols;  // per row
};
Slices slices_for(int64_t rows, int64_t cols) {
  if (cols <= kWarpCols) return {1, cols};
  const int64_t most = rows < kManySlices ? kManySlices / rows : 1, wanted = ceil_div(cols, kSliceCols);
  const int64_t per = ceil_div(ceil_div(cols, wanted < most ? wanted : most), 16) * 16;  // whole accesses
  return {ceil_div(cols, per), per};
}

template <class T>
struct BackwardArgs {
  const T *grad, *x;
  const Wide<T>* step;
  T* grad_x;
  Wide<T>* grad_step;
  int64_t rows, cols;
  Wide<T> code_min, code_max;
  double grad_factor;
  Slices slices;
  unsigned* ticket;
  double* part;  // [rows, slices]
};

template <class T, int V, int G>
__global__ void __launch_bounds__(kThreads) backward_kernel(const BackwardArgs<T> a) {
  constexpr int kInFlight = 2;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * (kThreads / G) + threadIdx.x / G;
  const int64_t row = task / a.slices.count, begin = task % a.slices.count * a.slices.cols;
  const int64_t end = begin + a.slices.cols < a.cols ? begin + a.slices.cols : a.cols;
  double sum[1] = {};
  if (row < a.rows) {
    const Wide<T> s = checked_step(a.step[row]);
    const Vec<T, V>* grad = reinterpret_cast<const Vec<T, V>*>(a.grad + row * a.cols);
    const Vec<T, V>* x = reinterpret_cast<const Vec<T, V>*>(a.x + row * a.cols);
    Vec<T, V>* out = reinterpret_cast<Vec<T, V>*>(a.grad_x + row * a.cols);
    for (int64_t i = begin / V + threadIdx.x % G; i < end / V; i += G * kInFlight) {
      Vec<T, V> g[kInFlight], p[kInFlight];
      ZSQ_UNROLL for (int k = 0; k < kInFlight; ++k) {
        if (i + k * G < end / V) g[k] = grad[i + k * G], p[k] = x[i + k * G];
      }
      ZSQ_UNROLL for (int k = 0; k < kInFlight; ++k) {
        if (i + k * G >= end / V) break;
        Wide<T> some = 0;
        ZSQ_UNROLL for (int u = 0; u < V; ++u) {
          const Wide<T> position = quot(widen(p[k].v[u]), s), code = clamp_code(position, a.code_min, a.code_max);
          some = add(some, mul(widen(g[k].v[u]), learned_slope(position, code)));
          if (code != position) g[k].v[u] = T{};
        }
        out[i + k * G] = g[k];
        sum[0] += static_cast<double>(some);
      }
    }
  }
  group_sums<G>(sum);
  const bool first = threadIdx.x % G == 0 && row < a.rows;
  if (a.slices.count == 1) {
    if (first) a.grad_step[row] = static_cast<Wide<T>>(sum[0] * a.grad_factor);
    return;
  }
  if (first) a.part[task] = sum[0];
  if (!arrive_last(a.ticket, gridDim.x)) return;
  for (int64_t r = threadIdx.x / 32; r < a.rows; r += kWarps) {
    sum[0] = 0;
    for (int64_t i = threadIdx.x % 32; i < a.slices.count; i += 32) sum[0] += __ldcg(a.part + r * a.slices.count + i);
    group_sums<32>(sum);
    if (threadIdx.x % 32 == 0) a.grad_step[r] = static_cast<Wide<T>>(sum[0] * a.grad_factor);
  }
}

}  // namespace

template <class T>
cudaError_t fake_quant_learned(const T* x, const Wide<T>* step, T* out, int64_t rows, int64_t cols, int code_min,
                               int code_max, cudaStream_t stream) {
  const Quantize<T> op{{x}, out, step, rows, cols, Wide<T>(code_min), Wide<T>(code_max)};
  return stream_through(op, rows * cols, rows == 1 ? 0 : cols, stream);
}

size_t fake_quant_learned_backward_workspace(int64_t rows, int64_t cols, size_t) {
  return 16 + sizeof(double) * static_cast<size_t>(rows * slices_for(rows, cols).count);
}

template <class T>
cudaError_t fake_quant_learned_backward(const T* grad, const T* x, const Wide<T>* step, T* grad_x, Wide<T>* grad_step,
                                        int64_t rows, int64_t cols, int code_min, int code_max, double grad_factor,
                                        void* workspace, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const Slices slices = slices_for(rows, cols);
  unsigned* ticket = static_cast<unsigned*>(workspace);
  double* part = reinterpret_cast<double*>(static_cast<char*>(workspace) + 16);
  if (slices.count > 1) {
    const cudaError_t cleared = cudaMemsetAsync(ticket, 0, sizeof *ticket, stream);
    if (cleared != cudaSuccess) return cleared;
  }
  const BackwardArgs<T> args{
      grad,        x,      step,   grad_x, grad_step, rows, cols, Wide<T>(code_min), Wide<T>(code_max),
      grad_factor, slices, ticket, part};
  const bool vec = cols % kVec<T> == 0 && aligned(grad) && aligned(x) && aligned(grad_x), warp = cols <= kWarpCols;
  const auto kernel = vec ? (warp ? backward_kernel<T, kVec<T>, 32> : backward_kernel<T, kVec<T>, kThreads>)
                          : (warp ? backward_kernel<T, 1, 32> : backward_kernel<T, 1, kThreads>);
  return launch({warp ? ceil_div(rows, kWarps) : rows * slices.count, kThreads, 0, stream}, kernel, args);
}

#define ZSQ_INSTANTIATE(T)                                                                                            \
  template cudaError_t fake_quant_learned<T>(const T*, const Wide<T>*, T*, int64_t, int64_t, int, int, cudaStream_t); \
  template cudaError_t fake_quant_learned_backward<T>(const T*, const T*, const Wide<T>*, T*, Wide<T>*, int64_t,      \
                                                      int64_t, int, int, double, void*, cudaStream_t);
ZSQ_INSTANTIATE(float)
ZSQ_INSTANTIATE(double)
ZSQ_INSTANTIATE(Bf16)
ZSQ_INSTANTIATE(Half)

}  // namespace zsq::cuda
