#include "headroom/core/nsdr.hpp"

#include <algorithm>
#include <cmath>
#include <random>

#include "support/catch.hpp"

using namespace headroom;
using core::NsdrAccumulator;
using Eigen::MatrixXf;

namespace {

MatrixXf noise(Eigen::Index channels, Eigen::Index samples, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  return MatrixXf::NullaryExpr(channels, samples, [&] { return normal(engine); });
}

double whole(const MatrixXf& reference, const MatrixXf& estimate) {
  NsdrAccumulator accumulator;
  accumulator.add(reference, estimate);
  return accumulator.value();
}

}  // namespace

TEST_CASE("nsdr equals the ratio summed sample by sample") {
  const MatrixXf s = noise(2, 1000, 1);
  const MatrixXf e = s + 0.1f * noise(2, 1000, 2);
  long double signal = 1e-8L, error = 1e-8L;
  for (Eigen::Index i = 0; i < s.size(); ++i) {
    const long double value = s.data()[i], difference = value - e.data()[i];
    signal += value * value;
    error += difference * difference;
  }
  CHECK(whole(s, e) == Approx(static_cast<double>(10 * std::log10(signal / error))).epsilon(1e-13));
  CHECK(whole(s, 0.5f * s) == Approx(20 * std::log10(2.0)).epsilon(1e-9));  // gain counts as error
}

TEST_CASE("nsdr of blocks equals nsdr of the track, in any layout") {
  const MatrixXf s = noise(2, 1001, 3);
  const MatrixXf e = noise(2, 1001, 4);
  const Eigen::Matrix<float, 2, Eigen::Dynamic, Eigen::RowMajor> planar = e;
  NsdrAccumulator accumulator;
  for (Eigen::Index begin = 0; begin < 1001; begin += 77) {  // 13 blocks
    const Eigen::Index size = std::min<Eigen::Index>(77, 1001 - begin);
    accumulator.add(s.middleCols(begin, size), planar.middleCols(begin, size));
  }
  CHECK(accumulator.value() == Approx(whole(s, e)).epsilon(1e-13));
  CHECK(accumulator.reference_energy() == Approx(s.cast<double>().squaredNorm()).epsilon(1e-13));
}

TEST_CASE("nsdr sums in double") {
  // In float, 2^24 + 1 is 2^24: the quiet samples would leave no trace
  NsdrAccumulator accumulator;
  const Eigen::VectorXf loud = Eigen::VectorXf::Constant(1, 4096.0f);
  const Eigen::VectorXf quiet = Eigen::VectorXf::Constant(1, 1.0f);
  accumulator.add(loud, loud);
  for (int i = 0; i < 100; ++i) accumulator.add(quiet, quiet);
  CHECK(accumulator.reference_energy() == 16777316.0);
}

TEST_CASE("nsdr is defined for silence") {
  const MatrixXf s = noise(2, 500, 5);
  const MatrixXf silence = MatrixXf::Zero(2, 500);
  const double energy = s.cast<double>().squaredNorm();
  CHECK(whole(s, silence) == Approx(0).margin(1e-12));
  CHECK(whole(s, s) == Approx(10 * std::log10(energy / 1e-8 + 1)));
  CHECK(whole(silence, s) == Approx(-10 * std::log10(energy / 1e-8 + 1)));
  CHECK(whole(silence, silence) == 0);
  CHECK(NsdrAccumulator().value() == 0);
  NsdrAccumulator tolerant(1.0);
  tolerant.add(silence, s);
  CHECK(tolerant.value() == Approx(-10 * std::log10(energy + 1)));
}

TEST_CASE("nsdr errors") {
  CHECK(testing::error_of([] { NsdrAccumulator(0); }).id() == "headroom.core.nsdr.epsilon");
  const Error shape = testing::error_of([] { whole(noise(2, 10, 1), noise(2, 9, 1)); });
  CHECK(shape.id() == "headroom.core.nsdr.shape");
  CHECK(testing::contains(shape.what(), "2 x 10 and an estimate of 2 x 9"));
}
