// Gradient inundation (ait_family.md 7.2) for all tensors in three launches and one memset, without a host round trip.
//
//   1. ladder:    per tensor, how many integer codes would change at kappa = 1, 2, 4, ...
//   2. bisect:    the same at every midpoint that the bisection of the decided bracket could visit (a dyadic grid,
//   exact in double)
//   3. apply:     replay the bisection from the counts, write kappa and changed, take the SGD step; with weight decay,
//   which the search leaves out by definition, first count in the same rows what really changes
//
// A later launch replays the decision of an earlier one from integer counts, so nothing depends on the order in which
// blocks run. Rows stay in registers (weight, direction, current code) while all candidates are tried: 12 B per weight
// and launch, not per candidate. A warp takes a row of up to 32*kHeld values, a block a row of up to 256*kHeld; longer
// rows are read again each time.
#include "common.h"
#include "gi_decision.h"
#include "gi_row.h"
#include "kernels.h"

namespace zsq::cuda {
namespace {

constexpr int kHeld = 20;
constexpr int64_t kApplyPerBlock = kThreads * 16;

// The table travels as a kernel argument, that is in the device's constant memory: no copy, no lifetime, and a graph
// keeps it.
template <int kTensors>
struct GiTable {
  GiTensor tensor[kTensors];
  int search_block[kTensors + 1];  // first block of each tensor in launches 1 and 2
  int apply_block[kTensors + 1];   // and in launch 3
  int count;
  GiOptions options;
};
constexpr int kFewTensors = 80, kMostTensors = kLargeArguments ? 800 : kFewTensors;
static_assert(sizeof(GiTable<kFewTensors>) + 64 <= 4096);
static_assert(sizeof(GiTable<kMostTensors>) + 64 <= kArgumentBytes);

__device__ __forceinline__ unsigned warp_sum(unsigned n) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kFullWarp, n);
#else
  for (int o = 16; o > 0; o /= 2) n += __shfl_xor_sync(kFullWarp, n, o);
  return n;
#endif
}

struct Tally {
  Range<float> range[32 + 1][kWarps];  // per candidate and warp; the last one is the unmoved row's
  float step[32];
  unsigned count[32];
  unsigned flags;
};

// Tries `candidates` steps on this thread's row and adds the changed codes to the tally.
template <int Warps, int Held>
__device__ __forceinline__ void try_row(const GiTensor& t, int row, const GiOptions& o, float weight_decay,
                                        int candidates, Tally& tally) {
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32),
            team = warp / Warps * Warps;
  const int64_t base = static_cast<int64_t>(row) * t.cols;
  Row<Warps, Held> r;
  r.w = t.weight + base, r.g = t.grad + base, r.v = t.momentum + base;
  r.first = static_cast<int>(threadIdx.x) % (Warps * 32), r.cols = row < t.rows ? t.cols : 0;
  r.momentum = static_cast<float>(o.momentum), r.weight_decay = weight_decay, r.nesterov = o.nesterov;
  r.load();
  auto put_range = [&](int slot, float step) {
    Range<float> seen = empty_range<float>();
    r.each([&](float w, float d) { seen.see(slot == 32 ? w : gi_moved(w, step, d)); });
    seen = lanes_range<32>(seen);
    if (lane == 0) tally.range[slot][warp] = seen;
  };
  auto grid_of = [&](int slot) {
    Range<float> seen = tally.range[slot][team];
    ZSQ_UNROLL for (int i = 1; i < Warps; ++i) seen.merge(tally.range[slot][team + i]);
    return make_grid(seen.lo, seen.hi, o.bits);
  };
  unsigned flags = 0;
  r.each([&](float, float d) { flags |= (d - d == 0.f ? 0u : kNonFinite) | (d != 0.f ? kNonZero : 0u); });
  if (flags) atomicOr(&tally.flags, flags);
  put_range(32, 0.f);
  for (int c = 0; c < candidates; ++c) put_range(c, tally.step[c]);
  __syncthreads();
  r.encode_now(grid_of(32));
  unsigned mine = 0;  // lane c keeps the count of candidate c
  for (int c = 0; c < candidates; ++c) {
    const unsigned n = warp_sum(r.count_changed(tally.step[c], grid_of(c)));
    if (lane == c) mine = n;
  }
  if (mine) atomicAdd(&tally.count[lane], mine);
}

// Rows that a block takes of a tensor.
__host__ __device__ __forceinline__ int rows_per_block(const GiTensor& t) { return t.cols <= 32 * kHeld ? kWarps : 1; }

// Tries the steps kappa(i) * lr, i = 0 .. candidates-1, on the rows of a block. All its threads call, and find the
// tally filled.
template <class F>
__device__ __forceinline__ void try_block(const GiTensor& t, int block, const GiOptions& o, float weight_decay,
                                          int candidates, F kappa, Tally& tally) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 32) {
    tally.step[lane] = static_cast<float>(mul(kappa(lane), o.lr));
    tally.count[lane] = 0;
    if (lane == 0) tally.flags = 0;
  }
  __syncthreads();
  if (t.cols <= 32 * kHeld)
    try_row<1, kHeld>(t, block * kWarps + lane / 32, o, weight_decay, candidates, tally);
  else if (t.cols <= kThreads * kHeld)
    try_row<kWarps, kHeld>(t, block, o, weight_decay, candidates, tally);
  else
    try_row<kWarps, 0>(t, block, o, weight_decay, candidates, tally);
  __syncthreads();
}

enum class Stage { kLadder, kBisect };

template <int N>
__global__ void __launch_bounds__(kThreads, 2)
    search_kernel(const __grid_constant__ GiTable<N> table, Count* counts, int64_t* changed, Stage stage) {
  ZSQ_SHARED(Tally, tally);
  const int at = piece_of_block(table.search_block, table.count), lane = static_cast<int>(threadIdx.x);
  const int block = static_cast<int>(blockIdx.x) - table.search_block[at];
  const GiTensor& t = table.tensor[at];
  const GiOptions& o = table.options;
  counts += static_cast<int64_t>(at) * kSlots;
  const bool ladder = stage == Stage::kLadder;
  if (ladder && block == 0 && lane == 0) changed[at] = 0;  // where `apply` with weight decay adds up
  const int doubled = ladder ? 0 : doublings(counts, t, o);
  if (!ladder && (doubled == kSkip || doubled == 0)) return;  // the same in every thread of the block
  const int candidates = ladder ? (o.capped ? kGiCappedDoublings : kGiMaxDoublings) + 1 : (1 << o.search_steps) - 1;
  const auto kappa = [&](int i) {
    return ladder ? static_cast<double>(1ll << i) : kappa_at(doubled, i + 1, o.search_steps);
  };
  try_block(t, block, o, 0.f, candidates, kappa, tally);
  counts += ladder ? 0 : kMids;
  if (lane < candidates && tally.count[lane]) atomicAdd(counts + lane, static_cast<Count>(tally.count[lane]));
  if (ladder && lane == 0) atomicOr(counts + kFlags, static_cast<Count>(tally.flags));
}

struct Update {
  float step, momentum, weight_decay;
  bool nesterov;
  __device__ __forceinline__ void apply(float& w, float grad, float& velocity) const {
    const float g = decayed(grad, w, weight_decay);
    const float v = add(mul(momentum, velocity), g);
    w = gi_moved(w, step, gi_direction(g, velocity, momentum, nesterov));
    velocity = v;
  }
};

// With weight decay a block takes the rows that it counts, else a piece of kApplyPerBlock elements.
template <int N, bool kDecays>
__global__ void __launch_bounds__(kThreads, kDecays ? 2 : 4)
    apply_kernel(const __grid_constant__ GiTable<N> table, const Count* counts, float* kappa, int64_t* changed) {
  const int at = piece_of_block(table.apply_block, table.count),
            block = static_cast<int>(blockIdx.x) - table.apply_block[at];
  const GiTensor& t = table.tensor[at];
  const GiOptions& o = table.options;
  counts += static_cast<int64_t>(at) * kSlots;
  const int doubled = doublings(counts, t, o);
  const Decision d = doubled == kSkip ? Decision{NAN, 0} : decide(counts, t, o, doubled);
  const int64_t n = elements(t), piece = kDecays ? int64_t(rows_per_block(t)) * t.cols : kApplyPerBlock,
                begin = block * piece, end = begin + piece < n ? begin + piece : n;
  if (block == 0 && threadIdx.x == 0) {
    kappa[at] = static_cast<float>(d.kappa);
    if (!kDecays || n == 0) changed[at] = d.changed;
  }
  if (doubled == kSkip || n == 0) return;
  const Update update{static_cast<float>(mul(d.kappa, o.lr)), static_cast<float>(o.momentum),
                      static_cast<float>(o.weight_decay), o.nesterov};
  if constexpr (kDecays) {
    ZSQ_SHARED(Tally, tally);
    try_block(t, block, o, update.weight_decay, 1, [&](int) { return d.kappa; }, tally);
    if (threadIdx.x == 0 && tally.count[0])
      atomicAdd(reinterpret_cast<Count*>(changed + at), static_cast<Count>(tally.count[0]));
  }
  using V4 = Vec<float, 4>;
  const bool vec = (reinterpret_cast<uintptr_t>(t.weight + begin) | reinterpret_cast<uintptr_t>(t.grad + begin) |
                    reinterpret_cast<uintptr_t>(t.momentum + begin)) %
                       16 ==
                   0;
  const int64_t tail = vec ? end - (end - begin) % 4 : begin;
  for (int64_t i = begin + 4 * threadIdx.x; i < tail; i += 4 * kThreads) {
    V4 w = *reinterpret_cast<const V4*>(t.weight + i), v = *reinterpret_cast<const V4*>(t.momentum + i);
    const V4 g = *reinterpret_cast<const V4*>(t.grad + i);
    ZSQ_UNROLL for (int k = 0; k < 4; ++k) update.apply(w.v[k], g.v[k], v.v[k]);
    *reinterpret_cast<V4*>(t.weight + i) = w, *reinterpret_cast<V4*>(t.momentum + i) = v;
  }
  for (int64_t i = tail + threadIdx.x; i < end; i += kThreads) update.apply(t.weight[i], t.grad[i], t.momentum[i]);
}

int search_blocks(const GiTensor& t) { return t.cols == 0 ? 0 : static_cast<int>(ceil_div(t.rows, rows_per_block(t))); }
// At least one: the first block of a tensor also writes its kappa.
int apply_blocks(const GiTensor& t, bool decays) {
  const int64_t n = static_cast<int64_t>(t.rows) * t.cols;
  return n == 0 ? 1 : decays ? search_blocks(t) : static_cast<int>(ceil_div(n, kApplyPerBlock));
}

template <int N>
cudaError_t gi_sgd_some(const GiTensor* tensors, int count, float* kappa, int64_t* changed, const GiOptions& options,
                        Count* counts, cudaStream_t stream) {
  const bool decays = options.weight_decay != 0;
  GiTable<N> table{};
  table.options = options;
  table.count = count;
  for (int i = 0; i < count; ++i) {
    table.tensor[i] = tensors[i];
    table.search_block[i + 1] = table.search_block[i] + search_blocks(tensors[i]);
    table.apply_block[i + 1] = table.apply_block[i] + apply_blocks(tensors[i], decays);
  }
  const LaunchConfig search{table.search_block[count], kThreads, 0, stream},
      apply{table.apply_block[count], kThreads, 0, stream};
  cudaError_t error = cudaSuccess;
  if (search.blocks > 0) {
    error = launch(search, search_kernel<N>, table, counts, changed, Stage::kLadder);
    if (options.search_steps > 0 && error == cudaSuccess)
      error = launch(search, search_kernel<N>, table, counts, changed, Stage::kBisect);
  }
  if (error != cudaSuccess) return error;
  return launch(apply, decays ? apply_kernel<N, true> : apply_kernel<N, false>, table, counts, kappa, changed);
}

}  // namespace

size_t gi_sgd_workspace(int count) { return static_cast<size_t>(count) * kSlots * sizeof(Count); }

cudaError_t gi_sgd(const GiTensor* tensors, int count, float* kappa, int64_t* changed, const GiOptions& options,
                   void* workspace, cudaStream_t stream) {
  Count* counts = static_cast<Count*>(workspace);
  cudaError_t error = cudaMemsetAsync(workspace, 0, gi_sgd_workspace(count), stream);
  for (int first = 0; first < count && error == cudaSuccess; first += kMostTensors) {
    const int some = count - first < kMostTensors ? count - first : kMostTensors;
    const auto run = some <= kFewTensors ? gi_sgd_some<kFewTensors> : gi_sgd_some<kMostTensors>;
    error = run(tensors + first, some, kappa + first, changed + first, options,
                counts + static_cast<int64_t>(first) * kSlots, stream);
  }
  return error;
}

}  // namespace zsq::cuda
