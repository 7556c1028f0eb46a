// Per-output-channel weight fake quantization: the range of a row and its quantize-dequantize in one kernel, so that
// every element is read once and written once (8 B per float). Short rows live in registers, four or 32 lanes to a row;
// longer rows take a block and live in shared memory; rows that do not fit there are read twice (the second time mostly
// from L2).
#include "common.h"
#include "kernels.h"

namespace zsq::cuda {
namespace {

constexpr int64_t kTileBytes = 44 << 10;  // leaves room for the static part within the 48 KiB that need no opt-in

template <class T>
struct RowOutput {
  T* values;   // [rows, cols]
  T* scale;    // [rows], codes only
  T* lo_code;  // [rows], codes only
};

template <class T, bool kCodes>
__device__ __forceinline__ T quantize(T x, const Grid<T>& g) {
  return kCodes ? add(encode(x, g), g.zero_point) : fake_quant(x, g);
}

template <class T, bool kCodes>
__device__ __forceinline__ void write_grid(const RowOutput<T>& out, int64_t row, const Grid<T>& g) {
  if (!kCodes) return;
  out.scale[row] = g.scale;
  out.lo_code[row] = add(g.zero_point, g.code_min);
}

// Lanes threads per row, at most Held elements of it in each.
// The second launch bound (one block per multiprocessor for double, none stated for float) changes nothing but ptxas'
// thrift: without it, double kernels spill a word to save a register.
template <class T, int Lanes, int Held, bool kCodes>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8)
    short_rows_kernel(const T* __restrict__ w, RowOutput<T> out, int64_t rows, int cols, int bits, bool vec) {
  constexpr int V = kVec<T>;
  const int lane = static_cast<int>(threadIdx.x % Lanes);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / Lanes) + threadIdx.x / Lanes;
  const int live = row < rows ? cols : 0;  // lanes past the last row still take part in the shuffles
  const T* src = w + row * cols;
  T* dst = out.values + row * cols;
  T x[Held] = {};
  Range<T> r = empty_range<T>();
  if (vec) {
    ZSQ_UNROLL for (int k = 0; k < Held; k += V) {
      const int i = k * Lanes + lane * V;
      if (i >= live) break;
      const Vec<T, V> p = *reinterpret_cast<const Vec<T, V>*>(src + i);
      ZSQ_UNROLL for (int u = 0; u < V; ++u) r.see(x[k + u] = p.v[u]);
    }
  } else {
    ZSQ_UNROLL for (int k = 0; k < Held; ++k) {
      const int i = k * Lanes + lane;
      if (i >= live) break;
      r.see(x[k] = src[i]);
    }
  }
  r = lanes_range<Lanes>(r);
  const Grid<T> g = make_grid(r.lo, r.hi, bits);
  if (lane == 0 && live) write_grid<T, kCodes>(out, row, g);
  if (vec) {
    ZSQ_UNROLL for (int k = 0; k < Held; k += V) {
      const int i = k * Lanes + lane * V;
      if (i >= live) break;
      Vec<T, V> p;
      ZSQ_UNROLL for (int u = 0; u < V; ++u) p.v[u] = quantize<T, kCodes>(x[k + u], g);
      *reinterpret_cast<Vec<T, V>*>(dst + i) = p;
    }
  } else {
    ZSQ_UNROLL for (int k = 0; k < Held; ++k) {
      const int i = k * Lanes + lane;
      if (i >= live) break;
      dst[i] = quantize<T, kCodes>(x[k], g);
    }
  }
}

// A block per row, V elements per access. `cached`: the row fits into shared memory. Each thread reads back only what
// it stored itself.
template <class T, int V, bool kCodes>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8)
    long_rows_kernel(const T* __restrict__ w, RowOutput<T> out, int64_t cols, int bits, bool cached) {
  ZSQ_DYN_SHARED(T, tile);
  const int64_t row = blockIdx.x, first = static_cast<int64_t>(threadIdx.x) * V;
  const T* src = w + row * cols;
  T* dst = out.values + row * cols;
  Range<T> r = empty_range<T>();
  for (int64_t i = first; i < cols; i += kThreads * V) {
    const Vec<T, V> p = *reinterpret_cast<const Vec<T, V>*>(src + i);
    ZSQ_UNROLL for (int u = 0; u < V; ++u) r.see(p.v[u]);
    if (cached) *reinterpret_cast<Vec<T, V>*>(tile + i) = p;
  }
  r = block_range(r);
  const Grid<T> g = make_grid(r.lo, r.hi, bits);
  if (threadIdx.x == 0) write_grid<T, kCodes>(out, row, g);
  for (int64_t i = first; i < cols; i += kThreads * V) {
    Vec<T, V> p = cached ? *reinterpret_cast<const Vec<T, V>*>(tile + i) : *reinterpret_cast<const Vec<T, V>*>(src + i);
    ZSQ_UNROLL for (int u = 0; u < V; ++u) p.v[u] = quantize<T, kCodes>(p.v[u], g);
    *reinterpret_cast<Vec<T, V>*>(dst + i) = p;
  }
}

template <class T, bool kCodes>
cudaError_t quantize_rows(const T* w, const RowOutput<T>& out, int64_t rows, int64_t cols, int bits,
                          cudaStream_t stream) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  const bool vec = cols % kVec<T> == 0 && aligned(w) && aligned(out.values);
  auto short_rows = [&](auto kernel, int lanes) {
    return launch({ceil_div(rows, kThreads / lanes), kThreads, 0, stream}, kernel, w, out, rows, static_cast<int>(cols),
                  bits, vec);
  };
  if (cols <= 16) return short_rows(short_rows_kernel<T, 4, 4, kCodes>, 4);
  if (cols <= 128) return short_rows(short_rows_kernel<T, 32, 4, kCodes>, 32);
  if (cols <= 1024) return short_rows(short_rows_kernel<T, 32, 32, kCodes>, 32);
  const int64_t bytes = cols * static_cast<int64_t>(sizeof(T));
  const bool cached = bytes <= kTileBytes;
  const auto kernel = vec ? long_rows_kernel<T, kVec<T>, kCodes> : long_rows_kernel<T, 1, kCodes>;
  return launch({rows, kThreads, cached ? static_cast<size_t>(bytes) : 0, stream}, kernel, w, out, cols, bits, cached);
}

}  // namespace

template <class T>
cudaError_t fake_quant_weight(const T* w, T* out, int64_t rows, int64_t cols, int bits, cudaStream_t stream) {
  return quantize_rows<T, false>(w, {out, nullptr, nullptr}, rows, cols, bits, stream);
}

template <class T>
cudaError_t weight_codes(const T* w, Wide<T>* codes, Wide<T>* scale, Wide<T>* lo_code, int64_t rows, int64_t cols,
                         int bits, cudaStream_t stream) {
  return quantize_rows<T, true>(w, {codes, scale, lo_code}, rows, cols, bits, stream);
}

#define ZSQ_INSTANTIATE(T)                                                                      \
  template cudaError_t fake_quant_weight<T>(const T*, T*, int64_t, int64_t, int, cudaStream_t); \
  template cudaError_t weight_codes<T>(const T*, T*, T*, T*, int64_t, int64_t, int, cudaStream_t);
ZSQ_INSTANTIATE(float)
ZSQ_INSTANTIATE(double)

}  // namespace zsq::cuda
