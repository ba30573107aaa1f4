#pragma once

#include "headroom/training.hpp"

namespace headroom::benchmarks {

/// Examples of the shapes that a configuration describes, of noise.
struct NoiseSource {
  training::ShapeSource shapes;
  training::Example operator()(int64_t first, int64_t count) const {
    const auto example = shapes(first, count);
    example.stems.normal_();
    example.mixture.normal_();
    return example;
  }
};

}  // namespace headroom::benchmarks
