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

template <class T>
void weights(Buffer<double>& log, int64_t rows, int64_t cols, int offset) {
  const auto w = normal<T>(static_cast<size_t>(rows * cols + offset));
  Buffer<T> out(w.size()), codes(w.size()), scale(static_cast<size_t>(rows)), lo(scale);
  done(fake_quant_weight(w.data() + offset, out.data() + offset, rows, cols, 4, nullptr), "fake_quant_weight");
  done(weight_codes(w.data() + offset, codes.data() + offset, scale.data(), lo.data(), rows, cols, 4, nullptr),
       "weight_codes");
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = w.data() + offset + r * cols;
    T least = row[0], most = row[0];
    for (int64_t i = 0; i < cols; ++i) least = std::fmin(least, row[i]), most = std::fmax(most, row[i]);
    const auto g = zsq::make_grid(least, most, 4);
    for (int64_t i = 0; i < cols; ++i)
      must(out[static_cast<size_t>(offset + r * cols + i)] == zsq::fake_quant(row[i], g), "weight value");
  }
  append(log, codes), append(log, scale), append(log, lo);
}

template <class T>
void activations(Buffer<double>& log, int64_t n, int offset) {
  const auto x = normal<T>(static_cast<size_t>(n + offset));
  Buffer<T> out(x.size()), state{0, 0, 1};
  Buffer<unsigned char> scratch(fake_quant_act_running_workspace(sizeof(T)), 0xA5);
  for (int step = 0; step < 2; ++step) {
    done(fake_quant_act_running(x.data() + offset, &state[0], &state[1], &state[2], out.data() + offset, n, 4, 0.9,
                                step == 1, scratch.data(), nullptr),
         "fake_quant_act_running");
  }
  append(log, out), append(log, state);
}

template <class T>
void statistics(Buffer<double>& log, int64_t n, int64_t c, int64_t s, int offset) {
  const auto x = normal<T>(static_cast<size_t>(n * c * s + offset)), mean = normal<T>(static_cast<size_t>(c)),
             var = normal<T>(static_cast<size_t>(c));
  for (bool last : {false, true}) {
    Buffer<T> loss(1), bm(mean.size()), bv(mean.size()), grad(x.size());
    Buffer<unsigned char> scratch(bn_stats_workspace(n, c, s, last, sizeof(T)), 0xA5);
    done(bn_stats(x.data() + offset, mean.data(), var.data(), loss.data(), bm.data(), bv.data(), n, c, s, last,
                  scratch.data(), nullptr),
         "bn_stats");
    done(bn_stats_backward(loss.data(), x.data() + offset, mean.data(), var.data(), bm.data(), bv.data(),
                           grad.data() + offset, n, c, s, last, nullptr),
         "bn_stats_backward");
    must(std::isfinite(static_cast<double>(loss[0])), "finite loss");
    append(log, loss), append(log, bm), append(log, bv), append(log, grad);
  }
}

void inundation(Buffer<double>& log, bool capped, double weight_decay) {
  const int cols[] = {1, 9, 27, 700, 5200, 16}, rows[] = {3, 9, 4, 2, 1, 0};
  const int count = 6;
  Buffer<Buffer<float>> w, g, v;
  Buffer<GiTensor> table;
  for (int i = 0; i < count; ++i) {
    const size_t n = static_cast<size_t>(rows[i]) * static_cast<size_t>(cols[i]);
    w.push_back(normal<float>(n)), g.push_back(normal<float>(n, 1e-3)), v.push_back(normal<float>(n, 1e-3));
    table.push_back({w[static_cast<size_t>(i)].data(), g[static_cast<size_t>(i)].data(),
                     v[static_cast<size_t>(i)].data(), rows[i], cols[i]});
  }
  Buffer<float> kappa(count);
  Buffer<int64_t> changed(count);
  Buffer<unsigned char> scratch(gi_sgd_workspace(count), 0xA5);
  const zsq::GiOptions o{0.03, 0.9, weight_decay, 1e-2, 4, 2, true, capped};
  done(gi_sgd(table.data(), count, kappa.data(), changed.data(), o, scratch.data(), nullptr), "gi_sgd");
  must(kappa[1] > 1 && changed[3] > 0, "a tensor was amplified");
  for (const auto& t : w) append(log, t);
  for (const auto& t : v) append(log, t);
  append(log, kappa), append(log, changed);
}

template <class T>
void everything(Buffer<double>& log) {
  for (int64_t cols : {9, 16, 27, 144, 1300}) weights<T>(log, 3, cols, 0), weights<T>(log, 2, cols, 1);
  weights<T>(log, 1, 12001, 0);
  activations<T>(log, 9001, 0), activations<T>(log, 4097, 1), activations<T>(log, 3, 0);
  statistics<T>(log, 2, 3, 2500, 0), statistics<T>(log, 3, 36, 8, 0), statistics<T>(log, 2, 5, 7, 1),
      statistics<T>(log, 600, 4, 1, 0);
}
}  // namespace

int main(int argc, char** argv) {
  const int seeds = argc > 1 ? std::atoi(argv[1]) : 2;
  Buffer<double> first;
  for (int seed = 0; seed < seeds; ++seed) {
    hexec::options().seed = static_cast<uint64_t>(seed);
    rng.seed(7);
    Buffer<double> log;
    everything<float>(log), everything<double>(log);
    inundation(log, false, 0), inundation(log, true, 0.1);
    if (seed == 0) first = log;
    must(log == first, "results depend on the order of threads");
  }
  std::printf("all kernels ran: %llu launches, %zu values\n", hexec::launches(), first.size());
}
