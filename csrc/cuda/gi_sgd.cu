// Gradient inundation (ait_family.md 7.2) for all tensors in three launches and one memset, without a host round trip.
//
//   1. ladder:    per tensor, how many integer codes would change at kappa = 1, 2, 4, ...
//   2. bisect:    the same at every midpoint that the bisection of the decided bracket could visit (a dyadic grid,
//   exact in double)
//   3. apply:     replay the bisection from the counts, write kappa and changed, take the SGD step
// Weight decay, which the search leaves out by definition, costs one more launch before the last: it recounts what
// really changes.
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

constexpr int kTensors = 80;  // per launch: the table travels as a kernel argument and must stay below 4 KB
constexpr int kHeld = 20;
constexpr int64_t kApplyPerBlock = kThreads * 16;

struct GiTable {
  GiTensor tensor[kTensors];
  int search_block[kTensors + 1];  // first block of each tensor in launches 1 and 2
  int apply_block[kTensors + 1];   // and in launch 3
  int count;
  GiOptions options;
};
static_assert(sizeof(GiTable) + 64 <= 4096, "kernel arguments are limited to 4 KB");

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

enum class Stage { kLadder, kBisect, kRecount };

__global__ void __launch_bounds__(kThreads, 2)
    search_kernel(const __grid_constant__ GiTable table, Count* counts, Stage stage) {
  ZSQ_SHARED(Tally, tally);
  const int at = piece_of_block(table.search_block, table.count), lane = static_cast<int>(threadIdx.x);
  const GiTensor& t = table.tensor[at];
  const GiOptions& o = table.options;
  counts += static_cast<int64_t>(at) * kSlots;
  const int doubled = stage == Stage::kLadder ? 0 : doublings(counts, t, o);
  if (doubled == kSkip || (stage == Stage::kBisect && doubled == 0)) return;  // the same in every thread of the block
  int candidates = 1, slot = kRecount;
  if (stage == Stage::kLadder) candidates = (o.capped ? kGiCappedDoublings : kGiMaxDoublings) + 1, slot = 0;
  if (stage == Stage::kBisect) candidates = (1 << o.search_steps) - 1, slot = kMids;
  if (lane < 32) {
    const double kappa = stage == Stage::kLadder   ? static_cast<double>(1ll << lane)
                         : stage == Stage::kBisect ? kappa_at(doubled, lane + 1, o.search_steps)
                                                   : decide(counts, t, o, doubled).kappa;
    tally.step[lane] = static_cast<float>(mul(kappa, o.lr));
    tally.count[lane] = 0;
    if (lane == 0) tally.flags = 0;
  }
  __syncthreads();
  const int block = static_cast<int>(blockIdx.x) - table.search_block[at];
  const float weight_decay = stage == Stage::kRecount ? static_cast<float>(o.weight_decay) : 0.f;
  if (t.cols <= 32 * kHeld)
    try_row<1, kHeld>(t, block * kWarps + lane / 32, o, weight_decay, candidates, tally);
  else if (t.cols <= kThreads * kHeld)
    try_row<kWarps, kHeld>(t, block, o, weight_decay, candidates, tally);
  else
    try_row<kWarps, 0>(t, block, o, weight_decay, candidates, tally);
  __syncthreads();
  if (lane < candidates && tally.count[lane]) atomicAdd(counts + slot + lane, static_cast<Count>(tally.count[lane]));
  if (lane == 0 && stage == Stage::kLadder) atomicOr(counts + kFlags, static_cast<Count>(tally.flags));
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

__global__ void __launch_bounds__(kThreads, 4)
    apply_kernel(const __grid_constant__ GiTable table, const Count* counts, float* kappa, int64_t* changed) {
  const int at = piece_of_block(table.apply_block, table.count),
            block = static_cast<int>(blockIdx.x) - table.apply_block[at];
  const GiTensor& t = table.tensor[at];
  const GiOptions& o = table.options;
  counts += static_cast<int64_t>(at) * kSlots;
  const int doubled = doublings(counts, t, o);
  Decision d = doubled == kSkip ? Decision{NAN, 0} : decide(counts, t, o, doubled);
  if (doubled != kSkip && o.weight_decay != 0) d.changed = static_cast<int64_t>(counts[kRecount]);
  if (block == 0 && threadIdx.x == 0) kappa[at] = static_cast<float>(d.kappa), changed[at] = d.changed;
  if (doubled == kSkip) return;
  const Update update{static_cast<float>(mul(d.kappa, o.lr)), static_cast<float>(o.momentum),
                      static_cast<float>(o.weight_decay), o.nesterov};
  const int64_t n = elements(t), begin = block * kApplyPerBlock,
                end = begin + kApplyPerBlock < n ? begin + kApplyPerBlock : n;
  using V4 = Vec<float, 4>;
  const bool vec = (reinterpret_cast<uintptr_t>(t.weight) | reinterpret_cast<uintptr_t>(t.grad) |
                    reinterpret_cast<uintptr_t>(t.momentum)) %
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

int search_blocks(const GiTensor& t) {
  return t.cols == 0 ? 0 : t.cols <= 32 * kHeld ? static_cast<int>(ceil_div(t.rows, kWarps)) : t.rows;
}
// At least one: the first block of a tensor also writes its kappa.
int apply_blocks(const GiTensor& t) {
  const int64_t n = static_cast<int64_t>(t.rows) * t.cols;
  return n == 0 ? 1 : static_cast<int>(ceil_div(n, kApplyPerBlock));
}

}  // namespace

size_t gi_sgd_workspace(int count) { return static_cast<size_t>(count) * kSlots * sizeof(Count); }

cudaError_t gi_sgd(const GiTensor* tensors, int count, float* kappa, int64_t* changed, const GiOptions& options,
                   void* workspace, cudaStream_t stream) {
  Count* counts = static_cast<Count*>(workspace);
  cudaError_t error = cudaMemsetAsync(workspace, 0, gi_sgd_workspace(count), stream);
  for (int first = 0; first < count && error == cudaSuccess; first += kTensors) {
    GiTable table{};
    table.options = options;
    table.count = count - first < kTensors ? count - first : kTensors;
    for (int i = 0; i < table.count; ++i) {
      table.tensor[i] = tensors[first + i];
      table.search_block[i + 1] = table.search_block[i] + search_blocks(tensors[first + i]);
      table.apply_block[i + 1] = table.apply_block[i] + apply_blocks(tensors[first + i]);
    }
    Count* slots = counts + static_cast<int64_t>(first) * kSlots;
    const int64_t search = table.search_block[table.count], apply = table.apply_block[table.count];
    auto try_steps = [&](Stage stage, bool wanted) {
      if (wanted && search > 0 && error == cudaSuccess)
        error = launch({search, kThreads, 0, stream}, search_kernel, table, slots, stage);
    };
    try_steps(Stage::kLadder, true);
    try_steps(Stage::kBisect, options.search_steps > 0);
    try_steps(Stage::kRecount, options.weight_decay != 0);
    if (error == cudaSuccess)
      error = launch({apply, kThreads, 0, stream}, apply_kernel, table, slots, kappa + first, changed + first);
  }
  return error;
}

}  // namespace zsq::cuda
