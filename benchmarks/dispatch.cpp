// Attention of core, one thread: seconds of both passes, each the shortest of some runs. dispatch.py compiles this
// twice, with plain flags and headroom::kernels, and header-only with -march=native, and runs both in turns.

#include <headroom/core/attention.hpp>
#include <iostream>
#include <random>
#include <vector>

#include "timing.hpp"

namespace {

using namespace headroom::core;

/// Attention of 8 heads of `length` queries and keys, as often as makes some milliseconds.
template <class T>
void measure(const char* type, Index length, Index dim) {
  constexpr Index kHeads = 8;
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<T> tensors[8];
  for (std::vector<T>& x : tensors) {
    x.resize(static_cast<std::size_t>(kHeads * length * dim));
    for (T& e : x) e = static_cast<T>(normal(generator));
  }
  std::vector<double> lse(static_cast<std::size_t>(kHeads * length));
  const auto view = [&](int i) { return dense_view(tensors[i].data(), 1, kHeads, length, dim); };
  const auto lse_view = dense_view(lse.data(), 1, kHeads, length, 1);
  const AttentionTensors<T> forward{.q = view(0), .k = view(1), .v = view(2), .output = view(3), .lse = lse_view};
  const AttentionBackwardTensors<T> backward{.q = view(0),
                                             .k = view(1),
                                             .v = view(2),
                                             .output = view(3),
                                             .lse = lse_view,
                                             .grad_output = view(4),
                                             .grad_q = view(5),
                                             .grad_k = view(6),
                                             .grad_v = view(7)};
  const Index repeats = length < 500 ? 100 : 1;
  const auto report = [&](const char* pass, auto&& run) {
    const double seconds = headroom::benchmarks::shortest_of(
        [&] {
          return headroom::benchmarks::seconds_of([&] {
            for (Index i = 0; i < repeats; ++i) run();
          });
        },
        {.least = 3, .seconds = 0.15});
    std::cout << type << ',' << length << ',' << pass << ',' << seconds / static_cast<double>(repeats) << '\n';
  };
  report("forward", [&] { attention_forward<T>(forward, {}, NoMask{}, SerialExecutor{}); });
  report("backward", [&] { attention_backward<T>(backward, {}, NoMask{}, SerialExecutor{}); });
}

}  // namespace

int main() {
  std::cout << "kernels," << instruction_set() << '\n';
  for (const Index length : {2049, 64}) {
    measure<float>("float", length, 32);
    measure<Eigen::bfloat16>("bfloat16", length, 64);
  }
}
