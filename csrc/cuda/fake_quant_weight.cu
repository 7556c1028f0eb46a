// Per-output-channel weight fake quantization: the range of a row and its quantize-dequantize in one kernel, so that
// every element is read once and written once (8 B per float), for one tensor or for all of a network. Short rows live
// in registers, four or 32 lanes to a row; longer rows take a block and live in shared memory; rows that do not fit
// there are read twice (the second time mostly from L2).
#include "common.h"
#include "kernels.h"

namespace zsq::cuda {
namespace {

constexpr int64_t kTileBytes = 44 << 10;  // leaves room for the static part within the 48 KiB that need no opt-in

constexpr int kFewCols = 16, kSomeCols = 128, kManyCols = 1024;

// Values, or codes with the grid of each row.
template <class T, bool kCodes>
struct Rows {
  using Out = std::conditional_t<kCodes, Wide<T>, T>;
  const T* w;
  Out* out;                 // [rows, cols]
  Wide<T>*scale, *lo_code;  // [rows], codes only
  int64_t rows, cols;

  __device__ __forceinline__ bool vectorised() const {
    return cols % kVec<T> == 0 && (reinterpret_cast<uintptr_t>(w) | reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  }
  __device__ __forceinline__ void write_grid(int64_t row, const Grid<Wide<T>>& g) const {
    if (!kCodes) return;
    scale[row] = g.scale;
    lo_code[row] = add(g.zero_point, g.code_min);
  }
  __device__ __forceinline__ static Out quantize(Wide<T> x, const Grid<Wide<T>>& g) {
    if constexpr (kCodes)
      return add(encode(x, g), g.zero_point);
    else
      return narrow<T>(fake_quant(x, g));
  }
};

// V values, in accesses of at most 16 bytes.
template <int V, class O>
__device__ __forceinline__ void store(O* to, const O (&v)[V]) {
  constexpr int P = V < kVec<O> ? V : kVec<O>;
  ZSQ_UNROLL for (int at = 0; at < V; at += P) {
    Vec<O, P> p;
    ZSQ_UNROLL for (int u = 0; u < P; ++u) p.v[u] = v[at + u];
    *reinterpret_cast<Vec<O, P>*>(to + at) = p;
  }
}

// `Lanes` threads per row, at most Held elements of it in each; the block takes kThreads / Lanes rows.
template <int Lanes, int Held, class T, bool kCodes>
__device__ __forceinline__ void short_rows(const Rows<T, kCodes>& a, int64_t block, int bits) {
  constexpr int V = kVec<T>;
  static_assert(Held % V == 0);
  const int lane = static_cast<int>(threadIdx.x % Lanes);
  const int64_t row = block * (kThreads / Lanes) + threadIdx.x / Lanes;
  const int live = row < a.rows ? static_cast<int>(a.cols) : 0;  // lanes past the last row still take part in shuffles
  const bool vec = a.vectorised();
  const T* src = a.w + row * a.cols;
  auto* dst = a.out + row * a.cols;
  Wide<T> x[Held] = {};
  Range<Wide<T>> r = empty_range<Wide<T>>();
  if (vec) {
    ZSQ_UNROLL for (int k = 0; k < Held; k += V) {
      const int i = k * Lanes + lane * V;
      if (i >= live) break;
      const Vec<T, V> p = *reinterpret_cast<const Vec<T, V>*>(src + i);
      ZSQ_UNROLL for (int u = 0; u < V; ++u) r.see(x[k + u] = widen(p.v[u]));
    }
  } else {
    ZSQ_UNROLL for (int k = 0; k < Held; ++k) {
      const int i = k * Lanes + lane;
      if (i >= live) break;
      r.see(x[k] = widen(src[i]));
    }
  }
  r = lanes_range<Lanes>(r);
  const auto g = make_grid(r.lo, r.hi, bits);
  if (lane == 0 && live) a.write_grid(row, g);
  if (vec) {
    ZSQ_UNROLL for (int k = 0; k < Held; k += V) {
      const int i = k * Lanes + lane * V;
      if (i >= live) break;
      typename Rows<T, kCodes>::Out y[V];
      ZSQ_UNROLL for (int u = 0; u < V; ++u) y[u] = a.quantize(x[k + u], g);
      store<V>(dst + i, y);
    }
  } else {
    ZSQ_UNROLL for (int k = 0; k < Held; ++k) {
      const int i = k * Lanes + lane;
      if (i >= live) break;
      dst[i] = a.quantize(x[k], g);
    }
  }
}

// A block per row, V elements per access. `cached`: the row fits into `tile`. Each thread reads back only what it
// stored itself.
template <int V, class T, bool kCodes>
__device__ __forceinline__ void long_row(const Rows<T, kCodes>& a, int64_t row, int bits, bool cached, T* tile) {
  const int64_t first = static_cast<int64_t>(threadIdx.x) * V;
  const T* src = a.w + row * a.cols;
  Range<Wide<T>> r = empty_range<Wide<T>>();
  for (int64_t i = first; i < a.cols; i += kThreads * V) {
    const Vec<T, V> p = *reinterpret_cast<const Vec<T, V>*>(src + i);
    ZSQ_UNROLL for (int u = 0; u < V; ++u) r.see(widen(p.v[u]));
    if (cached) *reinterpret_cast<Vec<T, V>*>(tile + i) = p;
  }
  r = block_range(r);
  const auto g = make_grid(r.lo, r.hi, bits);
  if (threadIdx.x == 0) a.write_grid(row, g);
  for (int64_t i = first; i < a.cols; i += kThreads * V) {
    const Vec<T, V> p =
        cached ? *reinterpret_cast<const Vec<T, V>*>(tile + i) : *reinterpret_cast<const Vec<T, V>*>(src + i);
    typename Rows<T, kCodes>::Out y[V];
    ZSQ_UNROLL for (int u = 0; u < V; ++u) y[u] = a.quantize(widen(p.v[u]), g);
    store<V>(a.out + row * a.cols + i, y);
  }
}

template <class T>
constexpr int kFewHeld = kVec<T> > 4 ? kVec<T> : 4;

// The second launch bound changes nothing but ptxas' thrift: without it some kernels spill a word to save a register.
template <int Lanes, int Held, class T, bool kCodes>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8) short_rows_kernel(const Rows<T, kCodes> a, int bits) {
  short_rows<Lanes, Held>(a, blockIdx.x, bits);
}
template <class T, bool kCodes>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3)
    long_rows_kernel(const Rows<T, kCodes> a, int bits, bool cached) {
  ZSQ_DYN_SHARED(T, tile);
  if (a.vectorised())
    long_row<kVec<T>>(a, blockIdx.x, bits, cached, tile);
  else
    long_row<1>(a, blockIdx.x, bits, cached, tile);
}

template <class T>
bool fits_tile(int64_t cols) {
  return cols * static_cast<int64_t>(sizeof(T)) <= kTileBytes;
}
int64_t blocks_for(int64_t rows, int64_t cols) {
  const int rows_per_block = cols <= kFewCols ? kThreads / 4 : cols <= kManyCols ? kWarps : 1;
  return ceil_div(rows, rows_per_block);
}

template <class T, bool kCodes>
cudaError_t quantize_rows(const Rows<T, kCodes>& a, int bits, cudaStream_t stream) {
  if (a.rows == 0 || a.cols == 0) return cudaSuccess;
  LaunchConfig config{blocks_for(a.rows, a.cols), kThreads, 0, stream};
  if (a.cols <= kFewCols) return launch(config, short_rows_kernel<4, kFewHeld<T>, T, kCodes>, a, bits);
  if (a.cols <= kSomeCols) return launch(config, short_rows_kernel<32, kFewHeld<T>, T, kCodes>, a, bits);
  if (a.cols <= kManyCols) return launch(config, short_rows_kernel<32, 32, T, kCodes>, a, bits);
  const bool cached = fits_tile<T>(a.cols);
  config.shared_bytes = cached ? static_cast<size_t>(a.cols) * sizeof(T) : 0;
  return launch(config, long_rows_kernel<T, kCodes>, a, bits, cached);
}

// A kernel argument, that is in the device's constant memory: no copy, no lifetime, and a graph keeps it.
template <class T, int kTensors>
struct WeightTable {
  struct Entry {
    const T* w;
    T* out;
    int rows, cols;
  } entry[kTensors];
  int first_block[kTensors + 1];
  int count, bits;
};
constexpr int kFewTensors = 120, kMostTensors = kLargeArguments ? 1000 : kFewTensors;
static_assert(sizeof(WeightTable<float, kFewTensors>) <= 4096);
static_assert(sizeof(WeightTable<float, kMostTensors>) <= kArgumentBytes);

// A block never mixes tensors, so all its threads take the same path.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8)
    weights_kernel(const __grid_constant__ WeightTable<T, N> table) {
  ZSQ_DYN_SHARED(T, tile);
  const int i = piece_of_block(table.first_block, table.count), bits = table.bits;
  const int64_t block = static_cast<int64_t>(blockIdx.x) - table.first_block[i];
  const Rows<T, false> a{table.entry[i].w, table.entry[i].out,  nullptr,
                         nullptr,          table.entry[i].rows, table.entry[i].cols};
  const bool cached = a.cols * static_cast<int64_t>(sizeof(T)) <= kTileBytes;
  if (a.cols <= kFewCols)
    short_rows<4, kFewHeld<T>>(a, block, bits);
  else if (a.cols <= kSomeCols)
    short_rows<32, kFewHeld<T>>(a, block, bits);
  else if (a.cols <= kManyCols)
    short_rows<32, 32>(a, block, bits);
  else if (a.vectorised())
    long_row<kVec<T>>(a, block, bits, cached, tile);
  else
    long_row<1>(a, block, bits, cached, tile);
}

}  // namespace

template <class T>
cudaError_t fake_quant_weight(const T* w, T* out, int64_t rows, int64_t cols, int bits, cudaStream_t stream) {
  return quantize_rows(Rows<T, false>{w, out, nullptr, nullptr, rows, cols}, bits, stream);
}

template <class T, int N>
cudaError_t fake_quant_weights(const WeightTensor<T>* tensors, int count, int bits, cudaStream_t stream) {
  constexpr int64_t kMost = 0x7fffffff;
  WeightTable<T, N> table;
  table.count = 0, table.first_block[0] = 0, table.bits = bits;
  size_t tile = 0;
  cudaError_t error = cudaSuccess;
  const auto flush = [&] {
    if (table.count > 0 && error == cudaSuccess)
      error = launch({table.first_block[table.count], kThreads, tile, stream}, weights_kernel<T, N>, table);
    table.count = 0, tile = 0;
  };
  for (int i = 0; i < count; ++i) {
    const auto [w, out, rows, cols] = tensors[i];
    if (rows == 0 || cols == 0) continue;
    if (rows > kMost || cols > kMost) {  // does not fit the table, and needs no company
      if (error == cudaSuccess) error = fake_quant_weight(w, out, rows, cols, bits, stream);
      continue;
    }
    const int64_t blocks = blocks_for(rows, cols);
    if (table.count == N || table.first_block[table.count] + blocks > kMost) flush();
    table.entry[table.count] = {w, out, static_cast<int>(rows), static_cast<int>(cols)};
    table.first_block[table.count + 1] = table.first_block[table.count] + static_cast<int>(blocks);
    ++table.count;
    const size_t bytes = static_cast<size_t>(cols) * sizeof(T);
    if (cols > kManyCols && fits_tile<T>(cols) && bytes > tile) tile = bytes;
  }
  flush();
  return error;
}

template <class T>
cudaError_t fake_quant_weights(const WeightTensor<T>* tensors, int count, int bits, cudaStream_t stream) {
  return count <= kFewTensors ? fake_quant_weights<T, kFewTensors>(tensors, count, bits, stream)
                              : fake_quant_weights<T, kMostTensors>(tensors, count, bits, stream);
}

template <class T>
cudaError_t weight_codes(const T* w, Wide<T>* codes, Wide<T>* scale, Wide<T>* lo_code, int64_t rows, int64_t cols,
                         int bits, cudaStream_t stream) {
  return quantize_rows(Rows<T, true>{w, codes, scale, lo_code, rows, cols}, bits, stream);
}

#define ZSQ_INSTANTIATE(T)                                                                      \
  template cudaError_t fake_quant_weight<T>(const T*, T*, int64_t, int64_t, int, cudaStream_t); \
  template cudaError_t fake_quant_weights<T>(const WeightTensor<T>*, int, int, cudaStream_t);   \
  template cudaError_t weight_codes<T>(const T*, Wide<T>*, Wide<T>*, Wide<T>*, int64_t, int64_t, int, cudaStream_t);
ZSQ_INSTANTIATE(float)
ZSQ_INSTANTIATE(double)
ZSQ_INSTANTIATE(Bf16)
ZSQ_INSTANTIATE(Half)

}  // namespace zsq::cuda
