// One thread's share of a weight row during the search: loaded once, then moved and encoded again for every candidate
// step.
#pragma once
#include "common.h"

namespace zsq::cuda {

__device__ __forceinline__ float decayed(float grad, float w, float weight_decay) {
  return weight_decay != 0.f ? add(grad, mul(weight_decay, w)) : grad;
}

// The elements of a row that one of `Warps` warps' threads owns. Held = 0: nothing is kept, everything is computed
// again.
template <int Warps, int Held>
struct Row {
  const float *w, *g, *v;
  int first, cols;  // cols = 0: the warp has no row
  float momentum, weight_decay;
  bool nesterov;
  Grid<float> grid;
  float weight[Held ? Held : 1], direction[Held ? Held : 1], code[Held ? Held : 1];

  __device__ __forceinline__ float direction_at(int i) const {
    return gi_direction(decayed(g[i], w[i], weight_decay), v[i], momentum, nesterov);
  }
  __device__ __forceinline__ void load() {
    ZSQ_UNROLL for (int k = 0; k < Held; ++k) {
      const int i = first + k * Warps * 32;
      if (i >= cols) break;
      weight[k] = w[i], direction[k] = direction_at(i);
    }
  }
  template <class F>
  __device__ __forceinline__ void each(F f) {  // f(weight, direction)
    ZSQ_UNROLL for (int k = 0; k < Held; ++k) {
      if (first + k * Warps * 32 >= cols) break;
      f(weight[k], direction[k]);
    }
    if constexpr (Held == 0)
      for (int i = first; i < cols; i += Warps * 32) f(w[i], direction_at(i));
  }
  __device__ __forceinline__ void encode_now(const Grid<float>& now) {
    grid = now;
    ZSQ_UNROLL for (int k = 0; k < Held; ++k) {
      if (first + k * Warps * 32 >= cols) break;
      code[k] = encode(weight[k], grid);
    }
  }
  __device__ __forceinline__ unsigned count_changed(float step, const Grid<float>& moved) {
    unsigned n = 0;
    ZSQ_UNROLL for (int k = 0; k < Held; ++k) {
      if (first + k * Warps * 32 >= cols) break;
      n += encode(gi_moved(weight[k], step, direction[k]), moved) != code[k];
    }
    if constexpr (Held == 0) {
      for (int i = first; i < cols; i += Warps * 32)
        n += encode(gi_moved(w[i], step, direction_at(i)), moved) != encode(w[i], grid);
    }
    return n;
  }
};

}  // namespace zsq::cuda
