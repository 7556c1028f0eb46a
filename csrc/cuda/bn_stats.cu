// Batch-norm statistics matching: mean and biased variance of every channel and their squared distance from given ones,
// in one kernel that reads x once, and the closed-form gradient. The same kernels write the batch norm of eval mode
// from that read (8 B per float), and merge the gradients of both results (12 B per float).
//
// Sums are taken around the given mean, S1 = sum(x-mean) and S2 = sum((x-mean)^2), which removes most of the
// cancellation in S2 - S1^2: at most kMaxPerThread values per thread in Wide<T>, everything above that in double. Work
// is cut by shape alone. The last block to finish a group of channels adds that group's partial sums in index order,
// the last group adds up the loss: deterministic, no floating-point atomics, and C = 16 still fills the GPU.
#include "../bn_math.h"
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
  int64_t per_thread = V == 1 && !channels_last ? 16 : 4;  // a scalar path reads as much as a vector path
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

// The units of one thread, four at a time so that their loads are in flight together.
constexpr int kBatch = 4;
template <int V, bool kLast>
struct Walk {
  int64_t u, end, n, s, step, step_n, step_s, plane, C, c;
  __device__ __forceinline__ Walk(const Cut& cut, int64_t first, int64_t C_, int64_t S, int split) : C(C_), c(first) {
    const int64_t begin = split * cut.per_block, stop = begin + cut.per_block;
    step = kThreads / cut.width, u = begin + threadIdx.x / cut.width, end = stop < cut.units ? stop : cut.units;
    plane = S / V, n = kLast ? 0 : u / plane, s = kLast ? 0 : u % plane;
    step_n = kLast ? 0 : step / plane, step_s = kLast ? 0 : step % plane;
  }
  // Index of the next unit in units of V values, or -1.
  __device__ __forceinline__ int64_t next() {
    if (u >= end) return -1;
    const int64_t at = kLast ? (u * C + c) / V : (n * C + c) * plane + s;
    u += step;
    if (!kLast) {
      n += step_n, s += step_s;
      if (s >= plane) s -= plane, ++n;
    }
    return at;
  }
};

// The channels of one thread: V neighbouring ones (channels_last), or one.
template <int V, bool kLast>
constexpr int kColumns = kLast ? V : 1;

template <class T>
struct StatsArgs {
  const T* x;
  const Wide<T>*mean, *var;
  Wide<T>*loss, *batch_mean, *batch_var;  // null when `sums` is wanted
  const Wide<T>*weight, *bias;
  Wide<T> eps;
  T* y;  // null when the loss is wanted
  double* sums;
  Workspace ws;
  Cut cut;
  int64_t N, C, S;
};

// Adds over the threads that share threadIdx.x % width; the first `width` threads get the sums.
template <int V>
__device__ __forceinline__ void column_sums(double (&s1)[V], double (&s2)[V], int width) {
  constexpr int kAtOnce = V < 4 ? V : 4;
  ZSQ_SHARED(double2, sh, [kAtOnce][kThreads]);
  const int t = static_cast<int>(threadIdx.x);
  ZSQ_UNROLL for (int base = 0; base < V; base += kAtOnce) {
    __syncthreads();  // an earlier round may still be reading
    ZSQ_UNROLL for (int u = 0; u < kAtOnce; ++u) sh[u][t] = make_double2(s1[base + u], s2[base + u]);
    for (int half = kThreads / 2; half >= width; half /= 2) {
      __syncthreads();
      if (t < half) {
        ZSQ_UNROLL for (int u = 0; u < kAtOnce; ++u) sh[u][t].x += sh[u][t + half].x, sh[u][t].y += sh[u][t + half].y;
      }
    }
    ZSQ_UNROLL for (int u = 0; u < kAtOnce; ++u) s1[base + u] = sh[u][t].x, s2[base + u] = sh[u][t].y;
  }
}

// This thread's sums, and y on the way.
template <class T, int V, bool kLast, bool kWrite>
__device__ __forceinline__ void sum_units(const StatsArgs<T>& a, int64_t c, int split, Wide<T> (&s1)[V],
                                          Wide<T> (&s2)[V]) {
  using W = Wide<T>;
  constexpr int K = kColumns<V, kLast>;
  if (c >= a.C) return;
  W mean[K], scale[K], shift[K];
  ZSQ_UNROLL for (int k = 0; k < K; ++k) {
    mean[k] = a.mean[c + k];
    const Affine<W> f = kWrite ? bn_affine(a.mean, a.var, a.weight, a.bias, a.eps, c + k) : Affine<W>{};
    scale[k] = f.scale, shift[k] = f.shift;
  }
  Walk<V, kLast> walk(a.cut, c, a.C, a.S, split);
  for (int64_t at[kBatch]; (at[0] = walk.next()) >= 0;) {
    Vec<T, V> p[kBatch];
    ZSQ_UNROLL for (int j = 1; j < kBatch; ++j) at[j] = walk.next();
    ZSQ_UNROLL for (int j = 0; j < kBatch; ++j) {
      if (at[j] >= 0) p[j] = reinterpret_cast<const Vec<T, V>*>(a.x)[at[j]];
    }
    ZSQ_UNROLL for (int j = 0; j < kBatch; ++j) {
      if (at[j] < 0) break;
      ZSQ_UNROLL for (int k = 0; k < V; ++k) {
        const W x = widen(p[j].v[k]), d = sub(x, mean[k % K]);
        s1[k] = add(s1[k], d);
        s2[k] = fma(d, d, s2[k]);  // explicit, so that host and device round alike
        if (kWrite) narrow_to(add(mul(x, scale[k % K]), shift[k % K]), &p[j].v[k]);
      }
      if (kWrite) reinterpret_cast<Vec<T, V>*>(a.y)[at[j]] = p[j];
    }
  }
}

// From the sums of a channel to its statistics and its term of the loss.
template <class T>
__device__ __forceinline__ void finish_channel(const StatsArgs<T>& a, int64_t c, double s1, double s2) {
  using W = Wide<T>;
  const double count = static_cast<double>(a.N) * static_cast<double>(a.S), shift = s1 / count;
  const double spread = s2 / count - shift * shift, v = spread < 0 ? 0 : spread;  // NaN stays
  const double dv = v - static_cast<double>(a.var[c]);
  a.batch_mean[c] = static_cast<W>(static_cast<double>(a.mean[c]) + shift);
  a.batch_var[c] = static_cast<W>(v);
  a.ws.terms[c] = shift * shift + dv * dv;
}

// The second launch bound keeps kernels of 2 and 8 bytes from spilling, as in fake_quant_weight.cu.
template <class T, int V, bool kLast, bool kWrite>
__global__ void __launch_bounds__(kThreads, sizeof(T) != 4) stats_kernel(const StatsArgs<T> a) {
  constexpr int K = kColumns<V, kLast>;
  const int t = static_cast<int>(threadIdx.x), groups = a.cut.groups;
  const int group = static_cast<int>(blockIdx.x) % groups, split = static_cast<int>(blockIdx.x) / groups;
  const int wide = kLast ? a.cut.width * V : 1;
  const int64_t first = static_cast<int64_t>(group) * wide;  // channel
  Wide<T> s1[V] = {}, s2[V] = {};
  sum_units<T, V, kLast, kWrite>(a, kLast ? first + t % a.cut.width * V : first, split, s1, s2);

  double d1[K] = {}, d2[K] = {};
  ZSQ_UNROLL for (int k = 0; k < V; ++k) d1[k % K] += s1[k], d2[k % K] += s2[k];
  column_sums<K>(d1, d2, a.cut.width);
  ZSQ_UNROLL for (int k = 0; k < K; ++k) {
    const int64_t c = first + t * K + k;
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
  if (kWrite) {
    if (t < wide && c < a.C) a.sums[c] = t1[0], a.sums[a.C + c] = t2[0];
    return;
  }
  if (t < wide && c < a.C) finish_channel(a, c, t1[0], t2[0]);
  if (!arrive_last(a.ws.tickets + groups, static_cast<unsigned>(groups))) return;

  t1[0] = t2[0] = 0;
  for (int64_t i = t; i < a.C; i += kThreads) t1[0] += __ldcg(a.ws.terms + i);
  column_sums<1>(t1, t2, 1);
  if (t == 0) *a.loss = static_cast<Wide<T>>(t1[0] / static_cast<double>(a.C));
}

// grad_x = [grad_y*scale +] first + slope*(x - centre)
template <class T>
struct GradArgs {
  const T *grad_y, *x;
  const Wide<T>*mean, *var;
  const Wide<T>*grad_loss, *batch_mean, *batch_var;  // of the loss
  const double* grad_sums;                           // [2, C] or null: not of the loss, but of the sums
  const Wide<T>* weight;
  Wide<T> eps;
  T* grad_x;
  Cut cut;
  int64_t N, C, S;
};

template <class T, int V, bool kLast, bool kGradY>
__global__ void __launch_bounds__(kThreads, sizeof(T) != 4) grad_kernel(const GradArgs<T> a) {
  using W = Wide<T>;
  constexpr int K = kColumns<V, kLast>;
  const int t = static_cast<int>(threadIdx.x), groups = a.cut.groups;
  const int group = static_cast<int>(blockIdx.x) % groups, split = static_cast<int>(blockIdx.x) / groups;
  const int64_t c = kLast ? (static_cast<int64_t>(group) * a.cut.width + t % a.cut.width) * V : group;
  if (c >= a.C) return;
  W centre[K], first[K], slope[K], scale[K];
  ZSQ_UNROLL for (int k = 0; k < K; ++k) {
    const W mean = a.mean[c + k], var = a.var[c + k];
    if (a.grad_sums) {
      centre[k] = mean;
      first[k] = static_cast<W>(a.grad_sums[c + k]);
      slope[k] = static_cast<W>(2 * a.grad_sums[a.C + c + k]);
    } else {
      const W unit = quot(*a.grad_loss, static_cast<W>(static_cast<double>(a.N) * a.C * a.S));
      centre[k] = a.batch_mean[c + k];
      first[k] = mul(unit, mul(W(2), sub(centre[k], mean)));
      slope[k] = mul(unit, mul(W(4), sub(a.batch_var[c + k], var)));
    }
    scale[k] = kGradY ? bn_affine<W>(a.mean, a.var, a.weight, nullptr, a.eps, c + k).scale : W(0);
  }
  Walk<V, kLast> walk(a.cut, c, a.C, a.S, split);
  for (int64_t at[kBatch]; (at[0] = walk.next()) >= 0;) {
    Vec<T, V> p[kBatch], g[kBatch];
    ZSQ_UNROLL for (int j = 1; j < kBatch; ++j) at[j] = walk.next();
    ZSQ_UNROLL for (int j = 0; j < kBatch; ++j) {
      if (at[j] < 0) continue;
      p[j] = reinterpret_cast<const Vec<T, V>*>(a.x)[at[j]];
      if (kGradY) g[j] = reinterpret_cast<const Vec<T, V>*>(a.grad_y)[at[j]];
    }
    ZSQ_UNROLL for (int j = 0; j < kBatch; ++j) {
      if (at[j] < 0) break;
      ZSQ_UNROLL for (int k = 0; k < V; ++k) {
        W d = add(first[k % K], mul(slope[k % K], sub(widen(p[j].v[k]), centre[k % K])));
        if (kGradY) d = add(mul(widen(g[j].v[k]), scale[k % K]), d);
        narrow_to(d, &p[j].v[k]);
      }
      reinterpret_cast<Vec<T, V>*>(a.grad_x)[at[j]] = p[j];
    }
  }
}

// The loss from the sums: C values, one block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    loss_kernel(const double* sums, const T* var, int64_t C, int64_t count, T* loss) {
  double t1[1] = {}, t2[1] = {};
  for (int64_t c = threadIdx.x; c < C; c += kThreads) {
    const BnMiss miss = bn_miss(sums, var, C, count, c);
    t1[0] += miss.mean * miss.mean + miss.var * miss.var;
  }
  column_sums<1>(t1, t2, 1);
  if (threadIdx.x == 0) *loss = static_cast<T>(t1[0] / static_cast<double>(C));
}
template <class T>
__global__ void __launch_bounds__(kThreads) loss_grad_kernel(const T* grad_loss, const double* sums, const T* var,
                                                             int64_t C, int64_t count, double* grad_sums) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= C) return;
  const BnMiss miss = bn_miss(sums, var, C, count, c);
  const double unit = static_cast<double>(*grad_loss) / (static_cast<double>(count) * static_cast<double>(C));
  grad_sums[c] = unit * (2 * miss.mean - 4 * miss.var * miss.mean);
  grad_sums[C + c] = unit * (2 * miss.var);
}

template <class T, bool kWrite>
cudaError_t launch_stats(StatsArgs<T> a, const Plane& shape, int V, void* workspace, cudaStream_t stream) {
  a.N = shape.n, a.C = shape.c, a.S = shape.s;
  const cudaError_t cleared = cudaMemsetAsync(workspace, 0, ticket_bytes(a.C), stream);
  if (cleared != cudaSuccess) return cleared;
  char* base = static_cast<char*>(workspace);
  a.ws = {reinterpret_cast<unsigned*>(base), reinterpret_cast<double*>(base + ticket_bytes(a.C)),
          reinterpret_cast<double2*>(base + ticket_bytes(a.C) + term_bytes(a.C))};
  a.cut = cut_for(a.N, a.C, a.S, shape.channels_last, V);
  const auto kernel =
      V == 1 ? (shape.channels_last ? stats_kernel<T, 1, true, kWrite> : stats_kernel<T, 1, false, kWrite>)
             : (shape.channels_last ? stats_kernel<T, kVec<T>, true, kWrite> : stats_kernel<T, kVec<T>, false, kWrite>);
  return launch({static_cast<int64_t>(a.cut.groups) * a.cut.splits, kThreads, 0, stream}, kernel, a);
}

template <class T, bool kGradY>
cudaError_t launch_grad(GradArgs<T> a, const Plane& shape, cudaStream_t stream) {
  const bool vectors = aligned(a.grad_x) && aligned(a.grad_y);
  const int V = vectors ? vector_width(a.x, shape.c, shape.s, shape.channels_last) : 1;
  a.N = shape.n, a.C = shape.c, a.S = shape.s;
  a.cut = cut_for(a.N, a.C, a.S, shape.channels_last, V);
  const auto kernel =
      V == 1 ? (shape.channels_last ? grad_kernel<T, 1, true, kGradY> : grad_kernel<T, 1, false, kGradY>)
             : (shape.channels_last ? grad_kernel<T, kVec<T>, true, kGradY> : grad_kernel<T, kVec<T>, false, kGradY>);
  return launch({static_cast<int64_t>(a.cut.groups) * a.cut.splits, kThreads, 0, stream}, kernel, a);
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
size_t bn_eval_sums_workspace(const Plane& shape, size_t element_size) {
  return bn_stats_workspace(shape, element_size);
}

template <class T>
cudaError_t bn_stats(const BnStatsArgs<T>& a, void* workspace, cudaStream_t stream) {
  StatsArgs<T> args{};
  args.x = a.x, args.mean = a.mean, args.var = a.var;
  args.loss = a.loss, args.batch_mean = a.batch_mean, args.batch_var = a.batch_var;
  const int V = vector_width(a.x, a.shape.c, a.shape.s, a.shape.channels_last);
  return launch_stats<T, false>(args, a.shape, V, workspace, stream);
}

template <class T>
cudaError_t bn_stats_backward(const BnStatsBackwardArgs<T>& a, cudaStream_t stream) {
  GradArgs<T> args{};
  args.x = a.x, args.mean = a.mean, args.var = a.var, args.grad_x = a.grad_x;
  args.grad_loss = a.grad_loss, args.batch_mean = a.batch_mean, args.batch_var = a.batch_var;
  return launch_grad<T, false>(args, a.shape, stream);
}

template <class T>
cudaError_t bn_eval_sums(const BnEvalSumsArgs<T>& a, void* workspace, cudaStream_t stream) {
  StatsArgs<T> args{};
  args.x = a.x, args.mean = a.mean, args.var = a.var;
  args.weight = a.weight, args.bias = a.bias, args.eps = static_cast<Wide<T>>(a.eps);
  args.y = a.y, args.sums = a.sums;
  const int V = aligned(a.y) ? vector_width(a.x, a.shape.c, a.shape.s, a.shape.channels_last) : 1;
  return launch_stats<T, true>(args, a.shape, V, workspace, stream);
}

template <class T>
cudaError_t bn_eval_sums_backward(const BnEvalSumsBackwardArgs<T>& a, cudaStream_t stream) {
  GradArgs<T> args{};
  args.x = a.x, args.mean = a.mean, args.var = a.var, args.grad_x = a.grad_x;
  args.grad_y = a.grad_y, args.grad_sums = a.grad_sums;
  args.weight = a.weight, args.eps = static_cast<Wide<T>>(a.eps);
  return a.grad_y ? launch_grad<T, true>(args, a.shape, stream) : launch_grad<T, false>(args, a.shape, stream);
}

template <class T>
cudaError_t bn_stats_loss(const double* sums, const T* var, int64_t channels, int64_t count, T* loss,
                          cudaStream_t stream) {
  return launch({1, kThreads, 0, stream}, loss_kernel<T>, sums, var, channels, count, loss);
}
template <class T>
cudaError_t bn_stats_loss_backward(const T* grad_loss, const double* sums, const T* var, int64_t channels,
                                   int64_t count, double* grad_sums, cudaStream_t stream) {
  return launch({ceil_div(channels, kThreads), kThreads, 0, stream}, loss_grad_kernel<T>, grad_loss, sums, var,
                channels, count, grad_sums);
}

#define ZSQ_INSTANTIATE(T)                                                                \
  template cudaError_t bn_stats<T>(const BnStatsArgs<T>&, void*, cudaStream_t);           \
  template cudaError_t bn_stats_backward<T>(const BnStatsBackwardArgs<T>&, cudaStream_t); \
  template cudaError_t bn_eval_sums<T>(const BnEvalSumsArgs<T>&, void*, cudaStream_t);    \
  template cudaError_t bn_eval_sums_backward<T>(const BnEvalSumsBackwardArgs<T>&, cudaStream_t);
ZSQ_INSTANTIATE(float)
ZSQ_INSTANTIATE(double)
ZSQ_INSTANTIATE(Bf16)
ZSQ_INSTANTIATE(Half)
#define ZSQ_INSTANTIATE_LOSS(T)                                                                                \
  template cudaError_t bn_stats_loss<T>(const double*, const T*, int64_t, int64_t, T*, cudaStream_t);          \
  template cudaError_t bn_stats_loss_backward<T>(const T*, const double*, const T*, int64_t, int64_t, double*, \
                                                 cudaStream_t);
ZSQ_INSTANTIATE_LOSS(float)
ZSQ_INSTANTIATE_LOSS(double)

}  // namespace zsq::cuda
