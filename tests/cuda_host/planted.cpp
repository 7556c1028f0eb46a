// One planted bug per kernel, for tests/test_cuda_planted.py: the executor has to notice each. Prints what it noticed;
// exit code 0 if the result looked right. Usage: planted BUG SEED
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "../../csrc/cuda/launch.h"

namespace {
using zsq::cuda::launch;
constexpr unsigned kFullWarp = 0xffffffffu;
enum Bug {
  kNone,
  kNoBarrierAfterWrite,
  kNoBarrierBeforeReuse,
  kGlobalBehindTheEnd,
  kSharedBehindTheEnd,
  kMisaligned,
  kDynamicSharedBehindTheEnd,
  kGlobalBeforeTheStart,
  kSharedByPointer,
  kFullMaskInHalfWarp,
  kCallerOutsideMask,
  kSourceOutsideMask,
  kMixedWarpOperations,
  kDivergentBarrier,
  kReturnBeforeBarrier,
  kTwoBarrierSites,
  kWarpOperationAgainstBarrier,
  kSharedNotAtomic,
  kGlobalNotAtomic,
  kNoFence,
  kSharedNotCleared,
  kNoGridBarrier,
  kBlockSkipsGridBarrier,
};  // clang-format off
const char* const kNames[] = {
  "none",
  "no-barrier-after-write", "no-barrier-before-reuse",
  "global-behind-the-end", "shared-behind-the-end", "misaligned", "dynamic-shared-behind-the-end", "global-before-the-start", "shared-by-pointer",
  "full-mask-in-half-warp", "caller-outside-mask", "source-outside-mask", "mixed-warp-operations",
  "divergent-barrier", "return-before-barrier", "two-barrier-sites", "warp-operation-against-barrier",
  "shared-not-atomic", "global-not-atomic", "no-fence", "shared-not-cleared",
  "no-grid-barrier", "block-skips-grid-barrier",
};  // clang-format on

// A block sums its values twice, with the same shared memory.
__device__ float block_sum(float v, Bug bug) {
  ZSQ_SHARED(float, part, [8]);
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(kFullWarp, v, o);
  if (bug != kNoBarrierBeforeReuse) __syncthreads();
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
  if (bug != kNoBarrierAfterWrite) __syncthreads();
  v = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) v += part[i];
  return v;
}
__global__ void sum_twice(const float* x, float* y, Bug bug) {
  const float once = block_sum(x[threadIdx.x], bug), again = block_sum(2 * x[threadIdx.x], bug);
  y[threadIdx.x] = once + again;
}

// A copy that goes through shared memory of 65 floats, and through dynamic shared memory of a float per thread.
__global__ void copy(const float* x, float* y, int n, Bug bug) {
  ZSQ_SHARED(float, tile, [65]);
  ZSQ_DYN_SHARED(float, zero);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (threadIdx.x < 65) tile[bug == kSharedBehindTheEnd ? threadIdx.x + 1 : threadIdx.x] = 0;
  zero[bug == kDynamicSharedBehindTheEnd ? threadIdx.x + 1 : threadIdx.x] = 0;
  __syncthreads();
  if (bug == kSharedByPointer && threadIdx.x < 65) {
    float* volatile p = tile;
    p[threadIdx.x + 1] = 0;
  }
  if (bug == kMisaligned && i == 0) {
    const float4 v = *reinterpret_cast<const float4*>(x + 1);
    y[0] = v.x;
    return;
  }
  if (bug == kGlobalBehindTheEnd ? i <= n : i < n)
    y[i] = bug == kGlobalBeforeTheStart ? x[i - 1] : x[i] + zero[threadIdx.x];
}

__global__ void diverge(const float* x, float* y, int n, Bug bug) {
  const unsigned lane = threadIdx.x & 31;
  const bool half = lane < 16;
  float v = x[threadIdx.x];
  if (bug == kFullMaskInHalfWarp && half) v += __shfl_down_sync(kFullWarp, v, 8);
  if (bug == kCallerOutsideMask) v += __shfl_xor_sync(0x0000ffffu, v, 1);
  if (bug == kSourceOutsideMask && half) v += __shfl_xor_sync(0x0000ffffu, v, 16);
  if (bug == kMixedWarpOperations) {
    if (half)
      v += __shfl_xor_sync(kFullWarp, v, 1);
    else
      v += __shfl_down_sync(kFullWarp, v, 1);
  }
  if (bug == kDivergentBarrier && threadIdx.x < 40) __syncthreads();
  if (bug == kReturnBeforeBarrier) {
    if (static_cast<int>(threadIdx.x) >= n) return;
    __syncthreads();
  }
  if (bug == kTwoBarrierSites) {
    if (lane & 1)
      __syncthreads();
    else
      __syncthreads();
  }
  if (bug == kWarpOperationAgainstBarrier) {
    if (half) v += __shfl_down_sync(kFullWarp, v, 8);
    __syncthreads();
  }
  y[threadIdx.x] = v;
}

// Histogram per block and in all; the last block to finish adds up what the blocks wrote.
__global__ void histogram(const int* x, unsigned* counts, float* part, unsigned* ticket, float* out, Bug bug) {
  ZSQ_SHARED(unsigned, own, [4]);
  ZSQ_SHARED(int, is_last);
  if (bug != kSharedNotCleared) {
    if (threadIdx.x < 4) own[threadIdx.x] = 0;
    __syncthreads();
  }
  const int k = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (bug == kSharedNotAtomic)
    own[k]++;
  else
    atomicAdd(&own[k], 1u);
  __syncthreads();
  if (threadIdx.x < 4) {
    if (bug == kGlobalNotAtomic)
      counts[threadIdx.x] += own[threadIdx.x];
    else
      atomicAdd(&counts[threadIdx.x], own[threadIdx.x]);
  }
  if (threadIdx.x == 0) {
    part[blockIdx.x] = static_cast<float>(own[0]);
    if (bug != kNoFence) __threadfence();
    is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last && threadIdx.x == 0) {
    __threadfence();
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += part[i];
    *out = sum;
  }
}

__global__ void reversed(float* a, float* b, Bug bug) {
  auto grid = cooperative_groups::this_grid();
  a[grid.thread_rank()] = static_cast<float>(grid.thread_rank());
  if (bug == kNoGridBarrier)
    __syncthreads();
  else if (bug != kBlockSkipsGridBarrier || blockIdx.x)
    grid.sync();
  b[grid.thread_rank()] = a[grid.size() - 1 - grid.thread_rank()];
}

// Exactly as many elements as asked for: a sanitizer sees the one behind.
template <class T>
std::unique_ptr<T[]> device(const std::vector<T>& values) {
  std::unique_ptr<T[]> p(new T[values.size()]);
  std::copy(values.begin(), values.end(), p.get());
  return p;
}

bool sums_right(Bug bug) {
  std::vector<float> x(128);
  float sum = 0;
  for (int i = 0; i < 128; ++i) sum += x[i] = static_cast<float>(i % 7);
  auto in = device(x), out = device(x);
  launch({1, 128}, sum_twice, in.get(), out.get(), bug);
  bool right = true;
  for (int i = 0; i < 128; ++i) right &= out[i] == 3 * sum;
  return right;
}
bool copies_right(Bug bug) {
  std::vector<float> x(130);
  for (int i = 0; i < 130; ++i) x[i] = static_cast<float>(i % 7);
  auto in = device(x), out = device(std::vector<float>(130));
  launch({2, 96, 96 * sizeof(float)}, copy, in.get(), out.get(), 130, bug);
  bool right = true;
  for (int i = 1; i < 130; ++i) right &= out[i] == x[i];
  return right;
}
bool diverges_unnoticed(Bug bug) {
  auto in = device(std::vector<float>(64)), out = device(std::vector<float>(64));
  launch({1, 64}, diverge, in.get(), out.get(), 50, bug);
  return true;
}
bool counts_right(Bug bug) {
  std::vector<int> x(256);
  std::vector<unsigned> expected(4);
  for (int i = 0; i < 256; ++i) expected[x[i] = i * 7 % 4]++;
  auto in = device(x);
  auto counts = device(std::vector<unsigned>(4)), ticket = device(std::vector<unsigned>(1));
  auto part = device(std::vector<float>(4)), out = device(std::vector<float>(1));
  launch({4, 64}, histogram, in.get(), counts.get(), part.get(), ticket.get(), out.get(), bug);
  bool right = out[0] == static_cast<float>(expected[0]);
  for (int i = 0; i < 4; ++i) right &= counts[i] == expected[i];
  return right;
}
bool reverses_right(Bug bug) {
  auto a = device(std::vector<float>(256)), b = device(std::vector<float>(256));
  launch({4, 64, 0, nullptr, true}, reversed, a.get(), b.get(), bug);
  bool right = true;
  for (int i = 0; i < 256; ++i) right &= b[i] == static_cast<float>(255 - i);
  return right;
}
bool right_with(Bug bug) {
  if (bug == kNone)
    return sums_right(bug) && copies_right(bug) && diverges_unnoticed(bug) && counts_right(bug) && reverses_right(bug);
  if (bug <= kNoBarrierBeforeReuse) return sums_right(bug);
  if (bug <= kSharedByPointer) return copies_right(bug);
  if (bug <= kWarpOperationAgainstBarrier) return diverges_unnoticed(bug);
  return bug <= kSharedNotCleared ? counts_right(bug) : reverses_right(bug);
}
}  // namespace

int main(int count, char** words) {
  hexec::options().seed = count > 2 ? static_cast<uint64_t>(std::atoi(words[2])) : 1;
  hexec::options().resident = 8;
  int bug = 0;
  while (bug <= kBlockSkipsGridBarrier && (count < 2 || std::strcmp(words[1], kNames[bug]))) ++bug;
  if (bug > kBlockSkipsGridBarrier) {
    for (const char* name : kNames) std::puts(name);
    return 2;
  }
  try {
    const bool right = right_with(static_cast<Bug>(bug));
    std::puts(right ? "right result" : "wrong result");
    return right ? 0 : 3;
  } catch (const std::exception& e) {
    std::printf("executor: %s\n", e.what());
    return 4;
  }
}
