// Distillation and cross entropy of logits with their gradients, and the sign perturbation, each in one kernel.
//
// A warp (up to 1024 classes) or a block takes a row: maximum, exponentials, gradient. Memory is read once; the later
// passes find the row in L1. The last block adds up the rows in order.
#include "../loss_math.h"
#include "kernels.h"
#include "stream.h"

namespace zsq::cuda {
namespace {

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

template <class T>
struct DistillationArgs {
  const T *student, *teacher;
  const int64_t* target;
  DistillationOptions o;
  Wide<T>*loss, *kd, *ce;
  T *grad, *grad_teacher;
  int64_t batch, classes;
  unsigned* ticket;
  double* terms;  // [2, batch]: kd, ce
};

// Maximum of a row; NaN if it holds one.
template <int G, class T>
__device__ __forceinline__ Wide<T> row_max(const T* row, int64_t n) {
  Range<Wide<T>> r = empty_range<Wide<T>>();
  for (int64_t i = threadIdx.x % G; i < n; i += G) r.see(widen(row[i]));
  return (G == 32 ? lanes_range<32>(r) : block_range(r)).hi;
}

// exp((x - max) * inverse), or NaN if x is not finite.
template <class W>
__device__ __forceinline__ W exponential(W x, W max, W inverse) {
  return add(exp_of(mul(sub(x, max), inverse)), mul(x, W(0)));
}

template <class T, int G>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8) distillation_kernel(const DistillationArgs<T> a) {
  using W = Wide<T>;
  const int64_t n = a.classes, mine = static_cast<int64_t>(blockIdx.x) * (kThreads / G) + threadIdx.x / G;
  const int64_t r = mine < a.batch ? mine : a.batch - 1;  // all threads must take part in the sums
  const int64_t begin = threadIdx.x % G;
  const T *s = a.student + r * n, *t = a.teacher ? a.teacher + r * n : s;
  const W max_s = row_max<G>(s, n), max_t = a.teacher ? row_max<G>(t, n) : max_s, inverse = W(1 / a.o.temperature);
  const auto apart = [&](W v, W w) { return mul(sub(sub(w, max_t), sub(v, max_s)), inverse); };

  double z[4] = {};  // sums of: exp(s/T), exp(t/T), exp(t/T) * (t - s)/T, exp(s)
  for (int64_t i = begin; i < n; i += G) {
    const W v = widen(s[i]);
    if (a.teacher) {
      const W w = widen(t[i]), p = exponential(w, max_t, inverse);
      z[0] += static_cast<double>(exponential(v, max_s, inverse));
      z[1] += static_cast<double>(p);
      z[2] += static_cast<double>(mul(p, apart(v, w)));
    }
    if (a.target) z[3] += static_cast<double>(exponential(v, max_s, W(1)));
  }
  group_sums<G>(z);

  const double batch = static_cast<double>(a.batch);
  double kd = 0, ce = 0, at_target = 0;
  W k_q = 0, k_p = 0, k_e = 0, centre = 0;
  int64_t y = -1;
  if (a.teacher) {
    const double mean = (z[2] + 0 * z[0]) / z[1],
                 unit = a.o.kd_weight * a.o.temperature / (a.o.batchmean ? batch : batch * n);
    kd = mean + (log(z[0]) - log(z[1]));
    k_q = W(unit / z[0]), k_p = W(unit / z[1]), centre = W(mean);
  }
  if (a.target) {
    y = a.target[r];
    const bool known = y >= 0 && y < n;
    const double sum = known ? z[3] : static_cast<double>(NAN);
    const CrossEntropy one = cross_entropy(
        static_cast<double>(known ? widen(s[y]) : max_s) - static_cast<double>(max_s), log(sum), a.o.gamma);
    const double unit = a.o.ce_weight * one.slope / batch;
    ce = one.loss;
    k_e = W(unit / sum);
    at_target = unit * -one.miss;
  }
  if (mine < a.batch) {
    for (int64_t i = begin; i < n; i += G) {
      const W v = widen(s[i]);
      W g = 0;
      if (a.teacher) {
        const W w = widen(t[i]), p = mul(k_p, exponential(w, max_t, inverse));
        g = sub(mul(k_q, exponential(v, max_s, inverse)), p);
        if (a.grad_teacher) a.grad_teacher[r * n + i] = narrow<T>(mul(p, sub(apart(v, w), centre)));
      }
      if (a.target) g = i == y ? W(static_cast<double>(g) + at_target) : add(g, mul(k_e, exponential(v, max_s, W(1))));
      a.grad[r * n + i] = narrow<T>(g);
    }
    if (begin == 0) a.terms[r] = kd, a.terms[a.batch + r] = ce;
  }

  if (!arrive_last(a.ticket, gridDim.x)) return;
  double sums[2] = {};
  for (int64_t i = threadIdx.x; i < a.batch; i += kThreads)
    sums[0] += __ldcg(a.terms + i), sums[1] += __ldcg(a.terms + a.batch + i);
  group_sums<kThreads>(sums);
  if (threadIdx.x > 0) return;
  sums[0] *= a.o.temperature * a.o.temperature / (a.o.batchmean ? batch : batch * n);
  sums[1] /= batch;
  *a.kd = W(sums[0]);
  *a.ce = W(sums[1]);
  *a.loss = W(a.o.kd_weight * sums[0] + a.o.ce_weight * sums[1]);
}

template <class T>
struct Perturb {
  using Storage = T;
  static constexpr int kInputs = 2;
  const T* in[2];
  T* out;
  Wide<T> epsilon;
  __device__ __forceinline__ int at(int64_t) const { return 0; }
  __device__ __forceinline__ Wide<T> value(int, int, const Wide<T> (&v)[2]) const {
    return add(v[0], mul(epsilon, sign_of(v[1])));
  }
};

}  // namespace

size_t distillation_loss_workspace(int64_t batch) { return 16 + 2 * sizeof(double) * static_cast<size_t>(batch); }

template <class T>
cudaError_t distillation_loss(const T* student, const T* teacher, const int64_t* target,
                              const DistillationOptions& options, Wide<T>* loss, Wide<T>* kd, Wide<T>* ce, T* grad,
                              T* grad_teacher, int64_t batch, int64_t classes, void* workspace, cudaStream_t stream) {
  if (batch == 0 || classes == 0) return cudaSuccess;
  unsigned* ticket = static_cast<unsigned*>(workspace);
  const cudaError_t cleared = cudaMemsetAsync(ticket, 0, sizeof *ticket, stream);
  if (cleared != cudaSuccess) return cleared;
  const DistillationArgs<T> args{student,
                                 teacher,
                                 target,
                                 options,
                                 loss,
                                 kd,
                                 ce,
                                 grad,
                                 grad_teacher,
                                 batch,
                                 classes,
                                 ticket,
                                 reinterpret_cast<double*>(static_cast<char*>(workspace) + 16)};
  return classes <= 1024 ? launch({ceil_div(batch, kWarps), kThreads, 0, stream}, distillation_kernel<T, 32>, args)
                         : launch({batch, kThreads, 0, stream}, distillation_kernel<T, kThreads>, args);
}

template <class T>
cudaError_t sign_perturb(const T* x, const T* grad, double epsilon, T* out, int64_t n, cudaStream_t stream) {
  return stream_through(Perturb<T>{{x, grad}, out, Wide<T>(epsilon)}, n, 0, stream);
}

#define ZSQ_INSTANTIATE(T)                                                                                            \
  template cudaError_t distillation_loss<T>(const T*, const T*, const int64_t*, const DistillationOptions&, Wide<T>*, \
                                            Wide<T>*, Wide<T>*, T*, T*, int64_t, int64_t, void*, cudaStream_t);       \
  template cudaError_t sign_perturb<T>(const T*, const T*, double, T*, int64_t, cudaStream_t);
ZSQ_INSTANTIATE(float)
ZSQ_INSTANTIATE(double)
ZSQ_INSTANTIATE(Bf16)
ZSQ_INSTANTIATE(Half)

}  // namespace zsq::cuda
