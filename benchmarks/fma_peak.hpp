#pragma once

namespace headroom::benchmarks {

/// Fused multiply-adds of independent registers on all of LibTorch's threads: GF/s that no kernel can exceed.
double fma_peak();

}  // namespace headroom::benchmarks
