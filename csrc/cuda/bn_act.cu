// Batch norm in eval mode, residual, activation and fake quantization in one pass: 8.125 B per float (12.125 with a
// residual); the gradient of x alone (8.125 B), and with those of weight and bias (12.125 B, one read of x).
//
// The element-wise kernels walk memory in its own order, whatever the layout, so that accesses are coalesced and the
// 8/V neighbouring lanes of a mask byte put it together with shuffles. Scale and shift are computed where the channel
// of a thread changes: a division and a root per access, which hides behind memory. The sums are cut as in bn_stats.cu.
#include "../bn_math.h"
#include "common.h"
#include "kernels.h"

namespace zsq::cuda {
namespace {

constexpr int kInFlight = 4;  // accesses a thread has under way at a time

// Which channels the V elements of an access belong to.
enum class Access { kOne, kNext, kAny };  // one; V in a row (channels innermost); whatever comes

// Position of a thread in [rows, S], row % C being the channel.
struct Place {
  int64_t at, c;
};
__device__ __forceinline__ Place place_of(int64_t element, const Plane& p) {
  return {element % p.s, element / p.s % p.c};
}
__device__ __forceinline__ void advance(Place& at, const Place& step, const Plane& p) {
  at.at += step.at, at.c += step.c;
  if (at.at >= p.s) at.at -= p.s, ++at.c;
  if (at.c >= p.c) at.c -= p.c;
}

// f(k, scale and shift of element k) for the V elements from `at` on.
template <int V, Access kAccess, class W, class P, class F>
__device__ __forceinline__ void each_element(Place at, const Plane& p, int64_t& loaded, Affine<W> (&affine)[V],
                                             const P& parameters, F f) {
  if (kAccess != Access::kAny) {
    if (at.c != loaded) {
      ZSQ_UNROLL for (int k = 0; k < (kAccess == Access::kOne ? 1 : V); ++k) affine[k] = parameters(at.c + k);
      loaded = at.c;
    }
    ZSQ_UNROLL for (int k = 0; k < V; ++k) f(k, affine[kAccess == Access::kOne ? 0 : k]);
  } else {
    Affine<W> now = parameters(at.c);
    ZSQ_UNROLL for (int k = 0; k < V; ++k) {
      f(k, now);
      if (++at.at == p.s && k + 1 < V) {
        at = {0, at.c + 1 == p.c ? 0 : at.c + 1};
        now = parameters(at.c);
      }
    }
  }
}

// The elements behind the last whole mask byte, fewer than 8, are left to one thread of block 0.
template <class T, int V, Access kAccess>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const BnActArgs<T> a, int64_t n) {
  using W = Wide<T>;
  const ActRule<W> rule = act_rule(a.activation, a.clip, *a.lo, *a.hi, a.bits);
  const auto parameters = [&](int64_t c) { return bn_affine(a.mean, a.var, a.weight, a.bias, W(a.eps), c); };
  const int64_t whole = n / 8 * (8 / V);
  int64_t u = static_cast<int64_t>(blockIdx.x) * (kThreads * kInFlight) + threadIdx.x;
  Vec<T, V> x[kInFlight], added[kInFlight];
  ZSQ_UNROLL for (int j = 0; j < kInFlight; ++j) {
    if (u + j * kThreads < whole) x[j] = reinterpret_cast<const Vec<T, V>*>(a.x)[u + j * kThreads];
  }
  if (a.residual) {
    ZSQ_UNROLL for (int j = 0; j < kInFlight; ++j) {
      if (u + j * kThreads < whole) added[j] = reinterpret_cast<const Vec<T, V>*>(a.residual)[u + j * kThreads];
    }
  }
  Place at = place_of(u * V, a.shape);
  const Place step = place_of(kThreads * V, a.shape);
  Affine<W> affine[V] = {};
  int64_t loaded = -1;
  ZSQ_UNROLL for (int j = 0; j < kInFlight; ++j, u += kThreads, advance(at, step, a.shape)) {
    unsigned bits = 0;
    if (u < whole) {
      each_element<V, kAccess>(at, a.shape, loaded, affine, parameters, [&](int k, const Affine<W>& f) {
        W y = add(mul(widen(x[j].v[k]), f.scale), f.shift);
        if (a.residual) y = add(y, widen(added[j].v[k]));
        bool keep;
        x[j].v[k] = narrow<T>(decode(act_encode(y, rule, &keep), rule.grid));
        bits |= static_cast<unsigned>(keep) << k;
      });
      reinterpret_cast<Vec<T, V>*>(a.out)[u] = x[j];
    }
    if (!a.mask) continue;
    bits <<= threadIdx.x % (8 / V) * V;
    ZSQ_UNROLL for (int o = 4 / V; o > 0; o /= 2) bits |= __shfl_xor_sync(kFullWarp, bits, o);
    if (u < whole && threadIdx.x % (8 / V) == 0) a.mask[u / (8 / V)] = static_cast<uint8_t>(bits);
  }
  if (blockIdx.x != 0 || threadIdx.x != 0 || n % 8 == 0) return;
  unsigned bits = 0;
  for (int64_t i = n / 8 * 8; i < n; ++i) {
    const Affine<W> f = parameters(place_of(i, a.shape).c);
    W y = add(mul(widen(a.x[i]), f.scale), f.shift);
    if (a.residual) y = add(y, widen(a.residual[i]));
    bool keep;
    a.out[i] = narrow<T>(decode(act_encode(y, rule, &keep), rule.grid));
    bits |= static_cast<unsigned>(keep) << i % 8;
  }
  if (a.mask) a.mask[n / 8] = static_cast<uint8_t>(bits);
}

template <class T>
__device__ __forceinline__ Wide<T> passed(T grad, unsigned bits, int k) {
  return bits >> k & 1 ? widen(grad) : Wide<T>(0);
}

template <class T, int V, Access kAccess>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    grad_kernel(const BnActBackwardArgs<T> a, int64_t n) {
  using W = Wide<T>;
  const W* none = nullptr;
  const auto parameters = [&](int64_t c) { return bn_affine(a.mean, a.var, a.weight, none, W(a.eps), c); };
  const int64_t whole = n / V;
  int64_t u = static_cast<int64_t>(blockIdx.x) * (kThreads * kInFlight) + threadIdx.x;
  Vec<T, V> grad[kInFlight];
  unsigned bits[kInFlight];
  ZSQ_UNROLL for (int j = 0; j < kInFlight; ++j) {
    const int64_t v = u + j * kThreads;
    if (v < whole) {
      grad[j] = reinterpret_cast<const Vec<T, V>*>(a.grad)[v];
      bits[j] = a.mask[v * V / 8] >> v * V % 8;
    }
  }
  Place at = place_of(u * V, a.shape);
  const Place step = place_of(kThreads * V, a.shape);
  Affine<W> affine[V] = {};
  int64_t loaded = -1;
  ZSQ_UNROLL for (int j = 0; j < kInFlight; ++j, u += kThreads, advance(at, step, a.shape)) {
    if (u >= whole) break;
    Vec<T, V> grad_residual;
    each_element<V, kAccess>(at, a.shape, loaded, affine, parameters, [&](int k, const Affine<W>& f) {
      const W g = passed(grad[j].v[k], bits[j], k);
      grad[j].v[k] = narrow<T>(mul(g, f.scale));
      grad_residual.v[k] = narrow<T>(g);
    });
    reinterpret_cast<Vec<T, V>*>(a.grad_x)[u] = grad[j];
    if (a.grad_residual) reinterpret_cast<Vec<T, V>*>(a.grad_residual)[u] = grad_residual;
  }
  const int64_t tail = whole * V + threadIdx.x;
  if (blockIdx.x != 0 || tail >= n) return;
  const W g = passed(a.grad[tail], a.mask[tail / 8], tail % 8);
  a.grad_x[tail] = narrow<T>(mul(g, parameters(place_of(tail, a.shape).c).scale));
  if (a.grad_residual) a.grad_residual[tail] = narrow<T>(g);
}

// ---- with the sums behind the gradients of weight and bias

constexpr int kMaxPerThread = 256;  // values a thread adds up in Wide<T>; everything above that in double
constexpr int64_t kManyBlocks = 4096;

// How [N, C, S] is cut. A unit is V neighbouring values: of one channel, or of V channels (channel innermost, S = 1).
struct Cut {
  int width;          // units side by side in a block that belong to different channels; a power of two
  int64_t units;      // along the summed axis
  int64_t per_block;  // of those, per block
  int64_t groups;     // of width*V channels (innermost) or of one channel
  int64_t splits;     // of the summed axis
};
Cut cut_for(const Plane& p, int V) {
  const bool last = p.s == 1;
  Cut c{1, last ? p.n : p.n * p.s / V, 0, p.c, 0};
  if (last) {
    while (c.width < 32 && c.width < p.c / V) c.width *= 2;
    c.groups = ceil_div(p.c / V, c.width);
  }
  int64_t per_thread = last ? 4 : 16 / V;
  const int64_t most = last ? kMaxPerThread : kMaxPerThread / V;
  while (per_thread < most && c.groups * ceil_div(c.units, per_thread * (kThreads / c.width)) > kManyBlocks)
    per_thread *= 2;
  c.per_block = per_thread * (kThreads / c.width);
  c.splits = ceil_div(c.units, c.per_block);
  return c;
}
size_t ticket_bytes(int64_t channels) { return static_cast<size_t>(ceil_div(channels * 4, 16) * 16); }

template <class T>
struct AffineArgs {
  BnActBackwardArgs<T> a;
  Cut cut;
  unsigned* tickets;  // [groups]
  double2* partial;   // [splits, C]: sums behind the gradients of weight and bias
};

// Adds over the threads that share threadIdx.x % width; the first `width` threads get the sums.
template <int V>
__device__ __forceinline__ void column_sums(double2 (&sum)[V], int width) {
  ZSQ_SHARED(double2, sh, [V][kThreads]);
  const int t = static_cast<int>(threadIdx.x);
  __syncthreads();  // an earlier call may still be reading
  ZSQ_UNROLL for (int k = 0; k < V; ++k) sh[k][t] = sum[k];
  for (int half = kThreads / 2; half >= width; half /= 2) {
    __syncthreads();
    if (t < half) {
      ZSQ_UNROLL for (int k = 0; k < V; ++k) sh[k][t].x += sh[k][t + half].x, sh[k][t].y += sh[k][t + half].y;
    }
  }
  ZSQ_UNROLL for (int k = 0; k < V; ++k) sum[k] = sh[k][t];
}

template <class T, int V, bool kLast>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2) affine_kernel(const AffineArgs<T> args) {
  using W = Wide<T>;
  constexpr int kColumns = kLast ? V : 1;
  const BnActBackwardArgs<T>& a = args.a;
  const Plane& p = a.shape;
  const Cut& cut = args.cut;
  const int t = static_cast<int>(threadIdx.x), wide = cut.width * kColumns;
  const int64_t group = blockIdx.x % cut.groups, split = blockIdx.x / cut.groups;
  const int64_t first = group * wide, own = first + t % cut.width * kColumns;  // channels
  const int64_t begin = split * cut.per_block,
                end = begin + cut.per_block < cut.units ? begin + cut.per_block : cut.units;
  W of_weight[V] = {}, of_bias[V] = {}, scale[kColumns], mean[kColumns];
  if (own < p.c) {
    ZSQ_UNROLL for (int k = 0; k < kColumns; ++k) {
      mean[k] = a.mean[own + k];
      scale[k] = bn_affine(a.mean, a.var, a.weight, static_cast<const W*>(nullptr), W(a.eps), own + k).scale;
    }
    const int64_t plane = p.s / V, apart = kThreads / cut.width;  // neither counts where the other does
    int64_t u = begin + t / cut.width;
    Place at = kLast ? Place{0, 0} : Place{u % plane, u / plane};  // .c: the image
    const Place step = kLast ? Place{0, 0} : Place{apart % plane, apart / plane};
    for (; u < end; u += apart) {
      const int64_t i = kLast ? u * p.c + own : (at.c * p.c + own) * p.s + at.at * V;
      const Vec<T, V> g = *reinterpret_cast<const Vec<T, V>*>(a.grad + i),
                      x = *reinterpret_cast<const Vec<T, V>*>(a.x + i);
      const unsigned bits = a.mask[i / 8] >> i % 8;
      Vec<T, V> grad_x, grad_residual;
      ZSQ_UNROLL for (int k = 0; k < V; ++k) {
        const W pass = passed(g.v[k], bits, k);
        grad_x.v[k] = narrow<T>(mul(pass, scale[k % kColumns]));
        grad_residual.v[k] = narrow<T>(pass);
        of_weight[k] = add(of_weight[k], mul(pass, sub(widen(x.v[k]), mean[k % kColumns])));
        of_bias[k] = add(of_bias[k], pass);
      }
      *reinterpret_cast<Vec<T, V>*>(a.grad_x + i) = grad_x;
      if (a.grad_residual) *reinterpret_cast<Vec<T, V>*>(a.grad_residual + i) = grad_residual;
      at.at += step.at, at.c += step.c;
      if (at.at >= plane) at.at -= plane, ++at.c;
    }
  }

  double2 sums[kColumns];
  ZSQ_UNROLL for (int k = 0; k < kColumns; ++k) sums[k] = make_double2(0, 0);
  ZSQ_UNROLL for (int k = 0; k < V; ++k) sums[k % kColumns].x += of_weight[k], sums[k % kColumns].y += of_bias[k];
  column_sums<kColumns>(sums, cut.width);
  ZSQ_UNROLL for (int k = 0; k < kColumns; ++k) {
    const int64_t c = first + t * kColumns + k;
    if (t < cut.width && c < p.c) args.partial[split * p.c + c] = sums[k];
  }
  if (!arrive_last(args.tickets + group, static_cast<unsigned>(cut.splits))) return;

  double2 total[1] = {make_double2(0, 0)};
  const int64_t c = first + t % wide;
  for (int64_t s = t / wide; s < cut.splits && c < p.c; s += kThreads / wide) {
    const double2 q = __ldcg(args.partial + s * p.c + c);
    total[0].x += q.x, total[0].y += q.y;
  }
  column_sums<1>(total, wide);
  if (t >= wide || c >= p.c) return;
  a.grad_weight[c] = static_cast<W>(total[0].x / static_cast<double>(root(add(a.var[c], W(a.eps)))));
  a.grad_bias[c] = static_cast<W>(total[0].y);
}

}  // namespace

template <class T>
cudaError_t bn_act(const BnActArgs<T>& a, cudaStream_t stream) {
  constexpr int V = kVec<T>;
  const Plane& p = a.shape;
  const int64_t n = p.n * p.c * p.s;
  if (n == 0) return cudaSuccess;
  const bool vec = aligned(a.x) && aligned(a.residual) && aligned(a.out);
  const auto kernel = !vec                       ? forward_kernel<T, 1, Access::kOne>
                      : p.s % V == 0             ? forward_kernel<T, V, Access::kOne>
                      : p.s == 1 && p.c % V == 0 ? forward_kernel<T, V, Access::kNext>
                                                 : forward_kernel<T, V, Access::kAny>;
  return launch({ceil_div(n, kThreads * kInFlight * (vec ? V : 1)), kThreads, 0, stream}, kernel, a, n);
}

size_t bn_act_backward_workspace(const Plane& p, size_t element_size) {
  if (p.n * p.c * p.s == 0) return 0;
  const int V = 16 / static_cast<int>(element_size);
  const int64_t scalar = cut_for(p, 1).splits, vector = (p.s == 1 ? p.c : p.s) % V == 0 ? cut_for(p, V).splits : 0;
  return ticket_bytes(p.c) + sizeof(double2) * static_cast<size_t>(p.c * (scalar > vector ? scalar : vector));
}

template <class T>
cudaError_t bn_act_backward(const BnActBackwardArgs<T>& a, void* workspace, cudaStream_t stream) {
  constexpr int V = kVec<T>;
  const Plane& p = a.shape;
  const int64_t n = p.n * p.c * p.s;
  const bool vec = aligned(a.grad) && aligned(a.grad_x) && aligned(a.grad_residual);
  if (!a.grad_weight) {
    if (n == 0) return cudaSuccess;
    const auto kernel = !vec                       ? grad_kernel<T, 1, Access::kOne>
                        : p.s % V == 0             ? grad_kernel<T, V, Access::kOne>
                        : p.s == 1 && p.c % V == 0 ? grad_kernel<T, V, Access::kNext>
                                                   : grad_kernel<T, V, Access::kAny>;
    return launch({ceil_div(n, kThreads * kInFlight * (vec ? V : 1)), kThreads, 0, stream}, kernel, a, n);
  }
  const size_t sum_bytes = static_cast<size_t>(p.c) * sizeof *a.grad_weight;
  if (n == 0) {
    if (p.c == 0) return cudaSuccess;
    const cudaError_t e = cudaMemsetAsync(a.grad_weight, 0, sum_bytes, stream);
    return e != cudaSuccess ? e : cudaMemsetAsync(a.grad_bias, 0, sum_bytes, stream);
  }
  const bool wide = vec && aligned(a.x) && (p.s == 1 ? p.c : p.s) % V == 0;
  const Cut cut = cut_for(p, wide ? V : 1);
  const AffineArgs<T> args{a, cut, static_cast<unsigned*>(workspace),
                           reinterpret_cast<double2*>(static_cast<char*>(workspace) + ticket_bytes(p.c))};
  const cudaError_t cleared = cudaMemsetAsync(workspace, 0, ticket_bytes(p.c), stream);
  if (cleared != cudaSuccess) return cleared;
  const auto kernel = p.s == 1 ? (wide ? affine_kernel<T, V, true> : affine_kernel<T, 1, true>)
                               : (wide ? affine_kernel<T, V, false> : affine_kernel<T, 1, false>);
  return launch({cut.groups * cut.splits, kThreads, 0, stream}, kernel, args);
}

#define ZSQ_INSTANTIATE(T)                                           \
  template cudaError_t bn_act<T>(const BnActArgs<T>&, cudaStream_t); \
  template cudaError_t bn_act_backward<T>(const BnActBackwardArgs<T>&, void*, cudaStream_t);
ZSQ_INSTANTIATE(float)
ZSQ_INSTANTIATE(double)
ZSQ_INSTANTIATE(Bf16)
ZSQ_INSTANTIATE(Half)

}  // namespace zsq::cuda
