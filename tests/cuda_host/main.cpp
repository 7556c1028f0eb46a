// Runs every kernel on shapes that reach each of its paths, for the sanitizer builds. Buffers have exactly the
// documented sizes, so that a sanitizer sees an access one element outside. Results must not depend on the order of
// threads, and weights are checked against a plain loop (everything else is compared with the reference by
// test_cuda_host.py). Usage: main SEEDS
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "host_exec.h"

namespace {
using namespace zsq::cuda;
template <class T>
using Buffer = std::vector<T>;
std::mt19937 rng;

void must(bool ok, const char* what) {
  if (ok) return;
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}
void done(cudaError_t e, const char* what) { must(e == cudaSuccess, what); }

template <class T>
Buffer<T> normal(size_t n, double size = 1) {
  std::normal_distribution<double> d(0, size);
  Buffer<T> b(n);
  for (T& x : b) x = static_cast<T>(d(rng));
  return b;
}
template <class T>
void append(Buffer<double>& log, const Buffer<T>& b) {
  log.insert(log.end(), b.begin(), b.end());
}

#include "main_bn_act.inc"
#include "main_bn_stats.inc"
#include "main_fake_quant.inc"
#include "main_gi_sgd.inc"
#include "main_learned_step.inc"
#include "main_losses.inc"
}  // namespace

int main(int argc, char** argv) {
  const int seeds = argc > 1 ? std::atoi(argv[1]) : 2;
  Buffer<double> first;
  for (int seed = 0; seed < seeds; ++seed) {
    hexec::options().seed = static_cast<uint64_t>(seed);
    rng.seed(7);
    Buffer<double> log;
    run_bn_act(log), run_bn_stats(log), run_fake_quant(log), run_gi_sgd(log), run_learned_step(log), run_losses(log);
    if (seed == 0) first = log;
    must(log == first, "results depend on the order of threads");
  }
  std::printf("all kernels ran: %llu launches, %zu values\n", hexec::launches(), first.size());
}
