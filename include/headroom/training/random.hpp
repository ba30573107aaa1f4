#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace headroom::inline v0::training {

/// SplitMix64 (Steele, Lea, Flood 2014). Unlike those of <random>, its numbers are the same with every library.
class SplitMix64 {
 public:
  explicit SplitMix64(std::uint64_t state) : state_(state) {}

  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  /// In [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  /// In [least, greatest).
  double uniform(double least, double greatest) { return least + (greatest - least) * uniform(); }
  /// In {0, …, n - 1}.
  std::int64_t below(std::int64_t n) {
    return std::min(n - 1, static_cast<std::int64_t>(uniform() * static_cast<double>(n)));
  }
  bool coin() { return next() >> 63; }
  /// Of mean 0 and variance 1 (Box and Muller 1958).
  double normal() {
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return radius * std::cos(2 * std::numbers::pi * uniform());
  }

 private:
  std::uint64_t state_;
};

/// The numbers of example `index` of the sequence that `seed` stands for. Neighbouring indices do not walk through the
/// same states.
inline SplitMix64 random_of_example(std::uint64_t seed, std::int64_t index) {
  SplitMix64 mixed(SplitMix64(seed).next() + static_cast<std::uint64_t>(index));
  return SplitMix64(mixed.next());
}

}  // namespace headroom::inline v0::training
