// Compiled with optimisation, unlike the rest of the benchmarks: here the loop is what is measured.

#include "fma_peak.hpp"

#include "headroom/core/executor.hpp"
#include "headroom/core/simd.hpp"
#include "timing.hpp"

namespace headroom::benchmarks {

namespace simd = core::simd;

double fma_peak() {
  constexpr int kChains = 12;
  constexpr core::Index kRounds = 1 << 20;
  const core::DefaultExecutor threads;  // OpenMP's, which are LibTorch's
  const auto multiply_add = [](core::Index, int) {
    simd::Packet<float> x[kChains];
    for (int i = 0; i < kChains; ++i) x[i] = simd::broadcast(static_cast<float>(i));
    auto a = simd::broadcast(0.999F), b = simd::broadcast(0.001F);
    simd::keep(a), simd::keep(b);
    for (core::Index round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) x[i] = simd::pmadd(x[i], a, b);
    }
    for (int i = 1; i < kChains; ++i) x[0] = simd::padd(x[0], x[i]);
    [[maybe_unused]] volatile float used = Eigen::internal::pfirst(x[0]);  // else all is dropped
  };
  const double best = shortest_of([&] { return seconds_of([&] { threads.run(threads.workers(), multiply_add); }); },
                                  {.warm_up = false, .least = 10});
  return 2.0 * kChains * kRounds * simd::kLanes<float> * threads.workers() / best / 1e9;
}

}  // namespace headroom::benchmarks
