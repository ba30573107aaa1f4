#include "headroom/audio/metrics.hpp"

#include <torch/torch.h>

#include "support/catch.hpp"
#include "support/tensors.hpp"

using namespace headroom;
using audio::nsdr;
using testing::noise;
using torch::Tensor;

namespace {

Tensor direct(const Tensor& reference, const Tensor& estimate, double epsilon = 1e-8) {
  const Tensor s = reference.to(torch::kDouble), e = estimate.to(torch::kDouble);
  return 10 * torch::log10((s.square().sum({-2, -1}) + epsilon) / ((s - e).square().sum({-2, -1}) + epsilon));
}

}  // namespace

TEST_CASE("nsdr gives one value per leading index") {
  const Tensor s = noise({2, 4, 2, 300}, 1, torch::kFloat);
  const Tensor e = s + noise({2, 4, 2, 300}, 2, torch::kFloat) *
                           torch::linspace(0, 1, 4).reshape({4, 1, 1});  // first stem is perfect
  const Tensor values = nsdr(s, e);
  REQUIRE(values.sizes() == torch::IntArrayRef({2, 4}));
  CHECK(values.scalar_type() == torch::kDouble);
  CHECK(torch::allclose(values, direct(s, e), 1e-12, 1e-12));
  CHECK(values[0][0].item<double>() > 100);
  CHECK(torch::allclose(nsdr(s, torch::zeros_like(s)), torch::zeros({2, 4}, torch::kDouble)));
  CHECK(torch::allclose(nsdr(s[0][1], e[0][1], 0.5), direct(s[0][1], e[0][1], 0.5), 1e-12));
  CHECK(nsdr(s[0][1], e[0][1]).dim() == 0);
}

TEST_CASE("nsdr reads strided, half and double tensors") {
  const Tensor s = noise({300, 2, 3}, 1, torch::kFloat).permute({2, 1, 0}),
               e = noise({3, 2, 300}, 2, torch::kFloat);  // [3,2,300]
  CHECK(torch::allclose(nsdr(s, e), direct(s, e), 1e-12));
  CHECK(torch::equal(nsdr(s.to(torch::kHalf), e), nsdr(s.to(torch::kHalf).to(torch::kFloat), e)));
  const Tensor exact = noise({1, 50}, 3, torch::kDouble);
  const Tensor near = exact + 1e-10 * noise({1, 50}, 4, torch::kDouble);  // lost in float
  CHECK(torch::allclose(nsdr(exact, near, 1e-30), direct(exact, near, 1e-30), 1e-9));
  CHECK(torch::allclose(nsdr(s.clone().requires_grad_(), e), direct(s, e), 1e-12));
}

TEST_CASE("nsdr of tensor blocks equals nsdr of the track") {
  const Tensor s = noise({2, 1000}, 1, torch::kFloat), e = noise({2, 1000}, 2, torch::kFloat);
  audio::NsdrAccumulator accumulator;
  for (int64_t begin = 0; begin < 1000; begin += 300) {
    const int64_t end = std::min<int64_t>(begin + 300, 1000);
    audio::add(accumulator, s.slice(1, begin, end), e.slice(1, begin, end));
  }
  CHECK(accumulator.value() == Approx(nsdr(s, e).item<double>()).epsilon(1e-12));
}

TEST_CASE("nsdr tensor errors") {
  using testing::error_of;
  CHECK(error_of([] { nsdr(torch::zeros({2, 2, 9}), torch::zeros({2, 2, 8})); }).id() == "headroom.audio.nsdr.shape");
  CHECK(error_of([] { nsdr(torch::zeros({9}), torch::zeros({9})); }).id() == "headroom.audio.nsdr.shape");
  CHECK(error_of([] { nsdr(torch::zeros({2, 9}), Tensor()); }).id() == "headroom.audio.nsdr.shape");
  CHECK(error_of([] {
          nsdr(torch::zeros({2, 9}, torch::kLong), torch::zeros({2, 9}));
        }).id() == "headroom.audio.nsdr.shape");
  audio::NsdrAccumulator accumulator;
  CHECK(error_of([&] {
          audio::add(accumulator, torch::zeros({2, 9}), torch::zeros({9, 2}));
        }).id() == "headroom.audio.nsdr.shape");
}
