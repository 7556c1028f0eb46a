// The kappa of a tensor, replayed by every block that needs it from the integer counts that earlier launches left
// behind.
#pragma once
#include "common.h"
#include "kernels.h"

namespace zsq::cuda {

using Count = unsigned long long;

// Counts of a tensor, kSlots of them, zero at first.
constexpr int kLadder = kGiMaxDoublings + 1;  // slot j: changed codes at kappa = 2^j
constexpr int kMids = kLadder;                // slot kMids+j-1: at midpoint j of the bracket
constexpr int kFlags = 63;                    // what is known of the direction
constexpr int kSlots = 64;
constexpr unsigned kNonFinite = 1, kNonZero = 2;
constexpr int kSkip = -1;
static_assert(kLadder <= 32 && kMids + (1 << kGiMaxSearchSteps) - 1 <= kFlags, "a lane per candidate");

__device__ __forceinline__ int64_t elements(const GiTensor& t) { return static_cast<int64_t>(t.rows) * t.cols; }

// How often the ladder doubles before the threshold is reached; 0 is kappa = 1. kSkip: leave the tensor alone. All
// lanes call.
__device__ __forceinline__ int doublings(const Count* counts, const GiTensor& t, const GiOptions& o) {
  const Count flags = counts[kFlags];
  if (flags & kNonFinite) return kSkip;
  if (!(flags & kNonZero)) return 0;  // no step to amplify
  const int lane = static_cast<int>(threadIdx.x % 32), top = o.capped ? kGiCappedDoublings : kGiMaxDoublings;
  const bool enough =
      lane <= top && gi_share(static_cast<int64_t>(counts[lane]), elements(t)) >= static_cast<float>(o.threshold);
  const unsigned reached = __ballot_sync(kFullWarp, enough);
  return reached ? __ffs(static_cast<int>(reached)) - 1 : o.capped ? top : 0;
}

// Midpoint j of 2^steps - 1 in the bracket 2^(doubled-1) .. 2^doubled; j = 2^steps is its upper end.
__device__ __forceinline__ double kappa_at(int doubled, int j, int steps) {
  return static_cast<double>(1ll << doubled) * 0.5 * (1.0 + static_cast<double>(j) / static_cast<double>(1 << steps));
}

struct Decision {
  double kappa;
  int64_t changed;
};

// Bisection replayed from the counts; the result is the last midpoint, even one below the threshold, or, guaranteed,
// the upper end that is left.
__device__ __forceinline__ Decision decide(const Count* counts, const GiTensor& t, const GiOptions& o, int doubled) {
  if (doubled == 0 || o.search_steps == 0)
    return {static_cast<double>(1ll << doubled), static_cast<int64_t>(counts[doubled])};
  int lo = 0, hi = 1 << o.search_steps, mid = hi;
  int64_t changed = 0, changed_at_hi = static_cast<int64_t>(counts[doubled]);
  for (int i = 0; i < o.search_steps; ++i) {
    mid = (lo + hi) / 2;
    changed = static_cast<int64_t>(counts[kMids + mid - 1]);
    const float share = gi_share(changed, elements(t));
    if (share < static_cast<float>(o.threshold))
      lo = mid;
    else
      hi = mid, changed_at_hi = changed;
    if (gi_close(share, o.threshold)) break;
  }
  if (o.guaranteed) return {kappa_at(doubled, hi, o.search_steps), changed_at_hi};
  return {kappa_at(doubled, mid, o.search_steps), changed};
}

}  // namespace zsq::cuda
