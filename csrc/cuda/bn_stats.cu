// Batch-norm statistics matching: mean and biased variance of every channel and their squared distance from given ones,
// in one kernel that reads x once (4 B per float), and the closed-form gradient (8 B per float).
//
// Sums are taken around the given mean, S1 = sum(x-mean) and S2 = sum((x-mean)^2), which removes most of the
// cancellation in S2 - S1^2: at most kMaxPerThread values per thread in T, everything above that in double. Work is cut
// by shape alone. The last block to finish a group of channels adds that group's partial sums in index order, the last
// group adds up the loss: deterministic, no floating-point atomics, and C = 16 still fills the GPU.
#include "common.h"
#include "kernels.h"

namespace zsq::cuda {
namespace {

constexpr int kMaxPerThread = 256;
constexpr int64_t kManyBlocks = 4096;

// How [N, C, S] is cut. A unit is V neighbouring values: of one channel (NCHW), or of V channels at one position
// (channels_last).
struct Cut {
  int width;          // units side by side in a block that belong to different channels; a power of two
  int64_t units;      // along the summed axis
  int64_t per_block;  // of those, per block
  int groups;         // of width*V channels (channels_last) or of one channel
  int splits;         // of the summed axis
};

Cut cut_for(int64_t N, int64_t C, int64_t S, bool channels_last, int V) {
  Cut c{1, N * S / V, 0, static_cast<int>(C), 0};
  if (channels_last) {
    while (c.width < 32 && c.width < C / V) c.width *= 2;
    c.units = N * S;
    c.groups = static_cast<int>(ceil_div(C / V, c.width));
  }
  int64_t per_thread = channels_last ? 4 : 16 / V;
  auto blocks = [&] { return c.groups * ceil_div(c.units, per_thread * (kThreads / c.width)); };
  while (per_thread < kMaxPerThread && blocks() > kManyBlocks) per_thread *= 2;
  c.per_block = per_thread * (kThreads / c.width);
  c.splits = static_cast<int>(ceil_div(c.units, c.per_block));
  return c;
}

template <class T>
int vector_width(const T* x, int64_t C, int64_t S, bool channels_last) {
  return aligned(x) && (channels_last ? C : S) % kVec<T> == 0 ? kVec<T> : 1;
}

struct Workspace {    // all pointers into one allocation
  unsigned* tickets;  // [groups + 1]
  double* terms;      // [C]
  double2* partial;   // [splits, C]: S1, S2
};
size_t ticket_bytes(int64_t C) { return static_cast<size_t>(ceil_div((C + 1) * 4, 16) * 16); }
size_t term_bytes(int64_t C) { return static_cast<size_t>(ceil_div(C * 8, 16) * 16); }

template <class T>
struct StatsArgs {
  const T *x, *mean, *var;
  T *loss, *batch_mean, *batch_var;
  Workspace ws;
  Cut cut;
  int64_t N, C, S;
};

// Adds over the threads that share threadIdx.x % width; the first `width` threads get the sums.
template <int V>
__device__ __forceinline__ void column_sums(double (&s1)[V], double (&s2)[V], int width) {
  ZSQ_SHARED(double2, sh, [V][kThreads]);
  const int t = static_cast<int>(threadIdx.x);
  __syncthreads();  // an earlier call may still be reading
  ZSQ_UNROLL for (int u = 0; u < V; ++u) sh[u][t] = make_double2(s1[u], s2[u]);
  for (int half = kThreads / 2; half >= width; half /= 2) {
    __syncthreads();
    if (t < half) {
      ZSQ_UNROLL for (int u = 0; u < V; ++u) sh[u][t].x += sh[u][t + half].x, sh[u][t].y += sh[u][t + half].y;
    }
  }
  ZSQ_UNROLL for (int u = 0; u < V; ++u) s1[u] = sh[u][t].x, s2[u] = sh[u][t].y;
}

template <class T>
__device__ __forceinline__ void gather(T x, T mean, T& s1, T& s2) {
  const T d = sub(x, mean);
  s1 = add(s1, d);
  s2 = fma(d, d, s2);  // explicit, so that host and device round alike
}

// This thread's share of channel `c` (NCHW) from unit `begin` on.
template <class T, int V>
__device__ __forceinline__ void sum_planes(const StatsArgs<T>& a, int64_t c, int64_t begin, int64_t end, T (&s1)[V],
                                           T (&s2)[V]) {
  const int64_t plane = a.S / V, step_n = kThreads / plane, step_s = kThreads % plane;
  int64_t u = begin + threadIdx.x, n = u / plane, s = u % plane;
  const T mean = a.mean[c];
  const Vec<T, V>* x = reinterpret_cast<const Vec<T, V>*>(a.x);
  for (; u < end; u += kThreads) {
    const Vec<T, V> p = x[(n * a.C + c) * plane + s];
    ZSQ_UNROLL for (int k = 0; k < V; ++k) gather(p.v[k], mean, s1[k], s2[k]);
    n += step_n, s += step_s;
    if (s >= plane) s -= plane, ++n;
  }
}

// This thread's share of channels c..c+V-1 (channels_last) from position `begin` on.
template <class T, int V>
__device__ __forceinline__ void sum_positions(const StatsArgs<T>& a, int64_t c, int64_t begin, int64_t end, T (&s1)[V],
                                              T (&s2)[V]) {
  if (c >= a.C) return;
  T mean[V];
  ZSQ_UNROLL for (int k = 0; k < V; ++k) mean[k] = a.mean[c + k];
  for (int64_t u = begin + threadIdx.x / a.cut.width; u < end; u += kThreads / a.cut.width) {
    const Vec<T, V> p = *reinterpret_cast<const Vec<T, V>*>(a.x + u * a.C + c);
    ZSQ_UNROLL for (int k = 0; k < V; ++k) gather(p.v[k], mean[k], s1[k], s2[k]);
  }
}

// From the sums of a channel to its statistics and its term of the loss.
template <class T>
__device__ __forceinline__ void finish_channel(const StatsArgs<T>& a, int64_t c, double s1, double s2) {
  const double count = static_cast<double>(a.N) * static_cast<double>(a.S), shift = s1 / count;
  const double spread = s2 / count - shift * shift, v = spread < 0 ? 0 : spread;  // NaN stays
  const double dv = v - static_cast<double>(a.var[c]);
  a.batch_mean[c] = static_cast<T>(static_cast<double>(a.mean[c]) + shift);
  a.batch_var[c] = static_cast<T>(v);
  a.ws.terms[c] = shift * shift + dv * dv;
}

// The second launch bound keeps double kernels from spilling, as in fake_quant_weight.cu.
template <class T, int V, bool kLast>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8) stats_kernel(const StatsArgs<T> a) {
  const int t = static_cast<int>(threadIdx.x), groups = a.cut.groups;
  const int group = static_cast<int>(blockIdx.x) % groups, split = static_cast<int>(blockIdx.x) / groups;
  const int64_t begin = split * a.cut.per_block,
                end = begin + a.cut.per_block < a.cut.units ? begin + a.cut.per_block : a.cut.units;
  const int wide = kLast ? a.cut.width * V : 1;
  const int64_t first = static_cast<int64_t>(group) * wide;  // channel
  T s1[V] = {}, s2[V] = {};
  if (kLast)
    sum_positions<T, V>(a, first + t % a.cut.width * V, begin, end, s1, s2);
  else
    sum_planes<T, V>(a, first, begin, end, s1, s2);

  constexpr int kColumns = kLast ? V : 1;
  double d1[kColumns] = {}, d2[kColumns] = {};
  ZSQ_UNROLL for (int k = 0; k < V; ++k) d1[k % kColumns] += s1[k], d2[k % kColumns] += s2[k];
  column_sums<kColumns>(d1, d2, a.cut.width);
  ZSQ_UNROLL for (int k = 0; k < kColumns; ++k) {
    const int64_t c = first + t * kColumns + k;
    if (t < a.cut.width && c < a.C) a.ws.partial[split * a.C + c] = make_double2(d1[k], d2[k]);
  }
  if (!arrive_last(a.ws.tickets + group, static_cast<unsigned>(a.cut.splits))) return;

  double t1[1] = {}, t2[1] = {};
  const int64_t c = first + t % wide;
  for (int s = t / wide; s < a.cut.splits && c < a.C; s += kThreads / wide) {
    const double2 p = __ldcg(a.ws.partial + s * a.C + c);
    t1[0] += p.x, t2[0] += p.y;
  }
  column_sums<1>(t1, t2, wide);
  if (t < wide && c < a.C) finish_channel(a, c, t1[0], t2[0]);
  if (!arrive_last(a.ws.tickets + groups, static_cast<unsigned>(groups))) return;

  t1[0] = t2[0] = 0;
  for (int64_t i = t; i < a.C; i += kThreads) t1[0] += __ldcg(a.ws.terms + i);
  column_sums<1>(t1, t2, 1);
  if (t == 0) *a.loss = static_cast<T>(t1[0] / static_cast<double>(a.C));
}

constexpr int kBackwardUnits = 8;  // per thread, so that the divisions that find the channel are paid once for several

template <class T>
struct GradArgs {
  const T *grad_loss, *x, *mean, *var, *batch_mean, *batch_var;
  T* grad_x;
  int64_t C, S, units, count;  // count = C*N*S
};

template <class T, int V, bool kLast>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8) grad_kernel(const GradArgs<T> a) {
  const T k = quot(*a.grad_loss, static_cast<T>(a.count));
  int64_t u = static_cast<int64_t>(blockIdx.x) * (kThreads * kBackwardUnits) + threadIdx.x;
  const int64_t run =
      kLast ? a.C / V : a.S / V;  // units until the channel changes (NCHW) or starts over (channels_last)
  const int64_t step_run = kThreads % run, step_c = kThreads / run % a.C;
  int64_t at = u % run, c = u / run % a.C;
  for (int j = 0; j < kBackwardUnits && u < a.units; ++j, u += kThreads) {
    Vec<T, V> p = reinterpret_cast<const Vec<T, V>*>(a.x)[u];
    ZSQ_UNROLL for (int i = 0; i < V; ++i) {
      const int64_t ch = kLast ? at * V + i : c;
      const T bm = a.batch_mean[ch];
      const T k0 = mul(k, mul(T(2), sub(bm, a.mean[ch]))), k1 = mul(k, mul(T(4), sub(a.batch_var[ch], a.var[ch])));
      p.v[i] = add(k0, mul(k1, sub(p.v[i], bm)));
    }
    reinterpret_cast<Vec<T, V>*>(a.grad_x)[u] = p;
    at += step_run, c += step_c;
    if (at >= run) at -= run, ++c;
    if (c >= a.C) c -= a.C;
  }
}

}  // namespace

size_t bn_stats_workspace(const Plane& shape, size_t element_size) {
  const auto [N, C, S, channels_last] = shape;
  const int V = 16 / static_cast<int>(element_size);
  const int scalar = cut_for(N, C, S, channels_last, 1).splits;
  const int vector = (channels_last ? C : S) % V == 0 ? cut_for(N, C, S, channels_last, V).splits : 0;
  return ticket_bytes(C) + term_bytes(C) +
         sizeof(double2) * static_cast<size_t>(C * (scalar > vector ? scalar : vector));
}

template <class T>
cudaError_t bn_stats(const BnStatsArgs<T>& a, void* workspace, cudaStream_t stream) {
  const auto [N, C, S, channels_last] = a.shape;
  const cudaError_t cleared = cudaMemsetAsync(workspace, 0, ticket_bytes(C), stream);
  if (cleared != cudaSuccess) return cleared;
  char* base = static_cast<char*>(workspace);
  const Workspace ws{reinterpret_cast<unsigned*>(base), reinterpret_cast<double*>(base + ticket_bytes(C)),
                     reinterpret_cast<double2*>(base + ticket_bytes(C) + term_bytes(C))};
  const int V = vector_width(a.x, C, S, channels_last);
  const Cut cut = cut_for(N, C, S, channels_last, V);
  const auto kernel = V == 1 ? (channels_last ? stats_kernel<T, 1, true> : stats_kernel<T, 1, false>)
                             : (channels_last ? stats_kernel<T, kVec<T>, true> : stats_kernel<T, kVec<T>, false>);
  const StatsArgs<T> args{a.x, a.mean, a.var, a.loss, a.batch_mean, a.batch_var, ws, cut, N, C, S};
  return launch({static_cast<int64_t>(cut.groups) * cut.splits, kThreads, 0, stream}, kernel, args);
}

template <class T>
cudaError_t bn_stats_backward(const BnStatsBackwardArgs<T>& a, cudaStream_t stream) {
  const auto [N, C, S, channels_last] = a.shape;
  const int V = aligned(a.grad_x) ? vector_width(a.x, C, S, channels_last) : 1;
  const GradArgs<T> args{a.grad_loss, a.x, a.mean, a.var,         a.batch_mean, a.batch_var,
                         a.grad_x,    C,   S,      N * C * S / V, N * C * S};
  const auto kernel = V == 1 ? (channels_last ? grad_kernel<T, 1, true> : grad_kernel<T, 1, false>)
                             : (channels_last ? grad_kernel<T, kVec<T>, true> : grad_kernel<T, kVec<T>, false>);
  return launch({ceil_div(args.units, kThreads * kBackwardUnits), kThreads, 0, stream}, kernel, args);
}

#define ZSQ_INSTANTIATE(T)                                                      \
  template cudaError_t bn_stats<T>(const BnStatsArgs<T>&, void*, cudaStream_t); \
  template cudaError_t bn_stats_backward<T>(const BnStatsBackwardArgs<T>&, cudaStream_t);
ZSQ_INSTANTIATE(float)
ZSQ_INSTANTIATE(double)

}  // namespace zsq::cuda
