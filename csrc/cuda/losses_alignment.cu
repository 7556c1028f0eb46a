// Feature alignment: maps of mean squares (one read of the features), the distance of the normalised maps, and the
// gradient, which is the feature times a factor per entry of its map (8 B per float). Sums run in an order fixed by
// the shape (and by whether the features are 16-byte aligned).
#include "../loss_math.h"
#include "kernels.h"
#include "stream.h"

namespace zsq::cuda {
namespace {

constexpr int64_t kDirectBlocks = 1024;  // fixed, so that the workspace does not depend on the device

template <class T>
struct MapArgs {
  const T *student, *teacher;
  Wide<T>*student_map, *teacher_map;
  MapShape shape;
};

template <class W>
__device__ __forceinline__ double square(W x) {
  return static_cast<double>(mul(x, x));
}

template <class T, int V, int G>
__global__ void __launch_bounds__(kThreads) inner_map_kernel(const MapArgs<T> a) {
  const int64_t rows = a.shape.n * a.shape.outer,
                task = static_cast<int64_t>(blockIdx.x) * (kThreads / G) + threadIdx.x / G;
  const bool is_teacher = task >= rows;
  const int64_t r = is_teacher ? task - rows : task;
  double sum[1] = {};
  if (r < rows) {
    const Vec<T, V>* x = reinterpret_cast<const Vec<T, V>*>((is_teacher ? a.teacher : a.student) + r * a.shape.inner);
    for (int64_t i = threadIdx.x % G; i < a.shape.inner / V; i += G) {
      const Vec<T, V> p = x[i];
      ZSQ_UNROLL for (int u = 0; u < V; ++u) sum[0] += square(widen(p.v[u]));
    }
  }
  group_sums<G>(sum);
  if (threadIdx.x % G == 0 && r < rows)
    (is_teacher ? a.teacher_map : a.student_map)[r] = Wide<T>(sum[0] / static_cast<double>(a.shape.inner));
}

// A block sums kColumns<V> neighbouring columns over the outer axis: of every row a warp takes 128 bytes where it can.
template <int V>
constexpr int kAcross = V > 1 ? 8 : 32;  // threads side by side
template <int V>
constexpr int kColumns = kAcross<V> * V;

template <class T, int V>
__global__ void __launch_bounds__(kThreads) outer_map_kernel(const MapArgs<T> a) {
  ZSQ_SHARED(double, part, [kWarps][kColumns<V>]);
  const int64_t outer = a.shape.outer, inner = a.shape.inner, strips = (inner + kColumns<V> - 1) / kColumns<V>;
  const int64_t strip = blockIdx.x % strips, sample = blockIdx.x / strips;
  const bool is_teacher = sample >= a.shape.n;
  const int64_t n = is_teacher ? sample - a.shape.n : sample;
  const int thread = static_cast<int>(threadIdx.x), column = thread % kAcross<V> * V;
  const T* x = (is_teacher ? a.teacher : a.student) + n * outer * inner + strip * kColumns<V>;
  double sum[V] = {};
  if (strip * kColumns<V> + column < inner) {
    for (int64_t i = thread / kAcross<V>; i < outer; i += kThreads / kAcross<V>) {
      const Vec<T, V> p = *reinterpret_cast<const Vec<T, V>*>(x + i * inner + column);
      ZSQ_UNROLL for (int u = 0; u < V; ++u) sum[u] += square(widen(p.v[u]));
    }
  }
  ZSQ_UNROLL for (int u = 0; u < V; ++u) {
    ZSQ_UNROLL for (int o = kAcross<V>; o < 32; o *= 2) sum[u] += __shfl_xor_sync(kFullWarp, sum[u], o);
    if (thread % 32 < kAcross<V>) part[thread / 32][column + u] = sum[u];
  }
  __syncthreads();
  const int64_t b = strip * kColumns<V> + thread;
  if (thread >= kColumns<V> || b >= inner) return;
  double total = part[0][thread];
  ZSQ_UNROLL for (int i = 1; i < kWarps; ++i) total += part[i][thread];
  (is_teacher ? a.teacher_map : a.student_map)[n * inner + b] = Wide<T>(total / static_cast<double>(outer));
}

// The products of a sample's two maps, in every thread of the block.
template <class W>
__device__ __forceinline__ MapProducts block_products(const W* a, const W* b, int64_t n) {
  double s[3] = {};
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const double x = static_cast<double>(a[i]), y = static_cast<double>(b[i]);
    s[0] += x * x, s[1] += y * y, s[2] += x * y;
  }
  group_sums<kThreads>(s);
  return products_of(s[0], s[1], s[2]);
}

// The last block to come adds up one term per block and stores total / count.
template <class W>
__device__ __forceinline__ void finish_mean(double term, double* terms, unsigned* ticket, double count, W* loss) {
  if (threadIdx.x == 0) terms[blockIdx.x] = term;
  if (!arrive_last(ticket, gridDim.x)) return;
  double sum[1] = {};
  for (int64_t i = threadIdx.x; i < gridDim.x; i += kThreads) sum[0] += __ldcg(terms + i);
  group_sums<kThreads>(sum);
  if (threadIdx.x == 0) *loss = W(sum[0] / count);
}

template <class W>
__global__ void __launch_bounds__(kThreads) distance_kernel(const W* student_map, const W* teacher_map, int64_t size,
                                                            W* loss, double* terms, unsigned* ticket) {
  const W *a = student_map + blockIdx.x * size, *b = teacher_map + blockIdx.x * size;
  const MapProducts p = block_products(a, b, size);
  double sum[1] = {};
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const double d = static_cast<double>(a[i]) / p.a - static_cast<double>(b[i]) / p.b;
    sum[0] += d * d;
  }
  group_sums<kThreads>(sum);
  finish_mean(sum[0], terms, ticket, static_cast<double>(gridDim.x) * static_cast<double>(size), loss);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    direct_kernel(const T* student, const T* teacher, int64_t n, Wide<T>* loss, double* terms, unsigned* ticket) {
  const int64_t whole = n / V, tail = whole * V + threadIdx.x, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  double sum[1] = {};
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < whole; i += stride) {
    const Vec<T, V> p = reinterpret_cast<const Vec<T, V>*>(student)[i];
    const Vec<T, V> q = reinterpret_cast<const Vec<T, V>*>(teacher)[i];
    ZSQ_UNROLL for (int u = 0; u < V; ++u) sum[0] += square(sub(widen(p.v[u]), widen(q.v[u])));
  }
  if (blockIdx.x == 0 && tail < n) sum[0] += square(sub(widen(student[tail]), widen(teacher[tail])));
  group_sums<kThreads>(sum);
  finish_mean(sum[0], terms, ticket, static_cast<double>(n), loss);
}

// What to multiply the features with: one factor per entry of the maps.
template <class W>
__global__ void __launch_bounds__(kThreads)
    factor_kernel(const W* grad_loss, const W* student_map, const W* teacher_map, W* student_factor, W* teacher_factor,
                  MapShape shape) {
  const int64_t first = blockIdx.x * shape.size;
  const MapProducts p = block_products(student_map + first, teacher_map + first, shape.size);
  const MapProducts swapped{p.b, p.a, p.bb, p.ab, p.aa};
  const double unit = map_unit(static_cast<double>(*grad_loss), shape);
  for (int64_t i = first + threadIdx.x; i < first + shape.size; i += kThreads) {
    const double a = static_cast<double>(student_map[i]), b = static_cast<double>(teacher_map[i]);
    if (student_factor) student_factor[i] = W(map_factor(a, b, p, unit));
    if (teacher_factor) teacher_factor[i] = W(map_factor(b, a, swapped, unit));
  }
}

template <class T>
struct Scale {
  using Storage = T;
  static constexpr int kInputs = 1;
  const T* in[1];
  T* out;
  const Wide<T>* factor;
  int64_t outer, inner;
  bool over_inner;
  __device__ __forceinline__ const Wide<T>* at(int64_t first) const {
    return factor + (over_inner ? first / inner : first / (outer * inner) * inner + first % inner);
  }
  __device__ __forceinline__ Wide<T> value(const Wide<T>* f, int u, const Wide<T> (&v)[1]) const {
    return mul(f[over_inner ? 0 : u], v[0]);
  }
};

template <class T>
struct Difference {
  using Storage = T;
  static constexpr int kInputs = 2;
  const T* in[2];
  T* out;
  const Wide<T>* grad_loss;
  double per_element;
  __device__ __forceinline__ Wide<T> at(int64_t) const {
    return Wide<T>(static_cast<double>(*grad_loss) * per_element);
  }
  __device__ __forceinline__ Wide<T> value(Wide<T> unit, int, const Wide<T> (&v)[2]) const {
    return mul(unit, sub(v[0], v[1]));
  }
};

int64_t elements(const Plane& p) { return p.n * p.c * p.s; }
size_t factor_bytes(const Plane& p, Alignment kind, size_t wide) {  // of one map
  if (kind == Alignment::kDirect) return 0;
  return static_cast<size_t>(ceil_div(p.n * map_shape(p, kind).size * static_cast<int64_t>(wide), 16) * 16);
}

template <class T>
cudaError_t maps(const MapArgs<T>& args, cudaStream_t stream) {
  const auto [n, outer, inner, over_inner, size, count] = args.shape;
  const bool vec = inner % kVec<T> == 0 && aligned(args.student) && aligned(args.teacher), warp = inner <= 1024;
  if (!over_inner) {
    const int64_t strips = ceil_div(inner, vec ? kColumns<kVec<T>> : kColumns<1>);
    return launch({2 * n * strips, kThreads, 0, stream}, vec ? outer_map_kernel<T, kVec<T>> : outer_map_kernel<T, 1>,
                  args);
  }
  const auto kernel = vec ? (warp ? inner_map_kernel<T, kVec<T>, 32> : inner_map_kernel<T, kVec<T>, kThreads>)
                          : (warp ? inner_map_kernel<T, 1, 32> : inner_map_kernel<T, 1, kThreads>);
  return launch({warp ? ceil_div(2 * n * outer, kWarps) : 2 * n * outer, kThreads, 0, stream}, kernel, args);
}

}  // namespace

size_t feature_alignment_workspace(const Plane& shape, Alignment kind, size_t) {
  return 16 + sizeof(double) * static_cast<size_t>(kind == Alignment::kDirect ? kDirectBlocks : shape.n);
}

template <class T>
cudaError_t feature_alignment(const T* student, const T* teacher, Alignment kind, Wide<T>* loss, Wide<T>* student_map,
                              Wide<T>* teacher_map, const Plane& shape, void* workspace, cudaStream_t stream) {
  const int64_t total = elements(shape);
  if (total == 0) return cudaSuccess;
  unsigned* ticket = static_cast<unsigned*>(workspace);
  double* terms = reinterpret_cast<double*>(static_cast<char*>(workspace) + 16);
  const cudaError_t cleared = cudaMemsetAsync(ticket, 0, sizeof *ticket, stream);
  if (cleared != cudaSuccess) return cleared;
  if (kind == Alignment::kDirect) {
    const bool vec = aligned(student) && aligned(teacher);
    const int64_t wanted = ceil_div(total, kThreads * (vec ? kVec<T> : 1));
    return launch({wanted < kDirectBlocks ? wanted : kDirectBlocks, kThreads, 0, stream},
                  vec ? direct_kernel<T, kVec<T>> : direct_kernel<T, 1>, student, teacher, total, loss, terms, ticket);
  }
  const MapShape m = map_shape(shape, kind);
  const cudaError_t mapped = maps<T>({student, teacher, student_map, teacher_map, m}, stream);
  if (mapped != cudaSuccess) return mapped;
  return launch({m.n, kThreads, 0, stream}, distance_kernel<Wide<T>>, student_map, teacher_map, m.size, loss, terms,
                ticket);
}

size_t feature_alignment_backward_workspace(const Plane& shape, Alignment kind, size_t element_size) {
  return 2 * factor_bytes(shape, kind, element_size == 8 ? 8 : 4);
}

template <class T>
cudaError_t feature_alignment_backward(const Wide<T>* grad_loss, const T* student, const T* teacher,
                                       const Wide<T>* student_map, const Wide<T>* teacher_map, Alignment kind,
                                       T* grad_student, T* grad_teacher, const Plane& shape, void* workspace,
                                       cudaStream_t stream) {
  using W = Wide<T>;
  const int64_t total = elements(shape);
  if (total == 0) return cudaSuccess;
  if (kind == Alignment::kDirect) {
    const auto one = [&](const T* own, const T* other, T* grad) {
      const Difference<T> op{{own, other}, grad, grad_loss, 2 / static_cast<double>(total)};
      return grad ? stream_through(op, total, 0, stream) : cudaSuccess;
    };
    const cudaError_t first = one(student, teacher, grad_student);
    return first != cudaSuccess ? first : one(teacher, student, grad_teacher);
  }
  const MapShape m = map_shape(shape, kind);
  W* student_factor = static_cast<W*>(workspace);
  W* teacher_factor = reinterpret_cast<W*>(static_cast<char*>(workspace) + factor_bytes(shape, kind, sizeof(W)));
  const cudaError_t known = launch({m.n, kThreads, 0, stream}, factor_kernel<W>, grad_loss, student_map, teacher_map,
                                   grad_student ? student_factor : nullptr, grad_teacher ? teacher_factor : nullptr, m);
  if (known != cudaSuccess) return known;
  const auto one = [&](const T* x, const W* factor, T* grad) {
    const Scale<T> op{{x}, grad, factor, m.outer, m.inner, m.over_inner};
    return grad ? stream_through(op, total, m.inner, stream) : cudaSuccess;
  };
  const cudaError_t first = one(student, student_factor, grad_student);
  return first != cudaSuccess ? first : one(teacher, teacher_factor, grad_teacher);
}

#define ZSQ_INSTANTIATE(T)                                                                                             \
  template cudaError_t feature_alignment<T>(const T*, const T*, Alignment, Wide<T>*, Wide<T>*, Wide<T>*, const Plane&, \
                                            void*, cudaStream_t);                                                      \
  template cudaError_t feature_alignment_backward<T>(const Wide<T>*, const T*, const T*, const Wide<T>*,               \
                                                     const Wide<T>*, Alignment, T*, T*, const Plane&, void*,           \
                                                     cudaStream_t);
ZSQ_INSTANTIATE(float)
ZSQ_INSTANTIATE(double)
ZSQ_INSTANTIATE(Bf16)
ZSQ_INSTANTIATE(Half)

}  // namespace zsq::cuda
