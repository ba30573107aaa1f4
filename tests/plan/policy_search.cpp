#include "headroom/plan/policy_search.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "headroom/memory.hpp"
#include "headroom/nn.hpp"
#include "headroom/plan.hpp"
#include "support/catch.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

/// A step of encoders over [batch, length, dim] or, with axes, over [batch, time, frequency, dim].
struct EncoderStep {
  nn::EncoderOptions options;
  std::vector<int64_t> shape;

  int64_t blocks() const { return options.layers() * (shape.size() == 4 ? 2 : 1); }
  void operator()(const StackPolicy& policy) const {
    nn::EncoderOptions with = options;
    with.gradient_checkpointing(policy);
    const auto run = [&](auto encoder) { encoder->forward(torch::randn(shape)).square().mean().backward(); };
    if (shape.size() == 4) {
      run(nn::AxialEncoder(with, nn::AxialLayerImpl::Axes{{"frequency", 2}, {"time", 1}}));
    } else {
      run(nn::Encoder(with));
    }
  }
};

const EncoderStep kSmall{nn::EncoderOptions(32, 2, {64}, 6), {3, 60, 32}};
const EncoderStep kTiled{nn::EncoderOptions(24, 2, {400}, 3), {1, 100, 160, 24}};  // large enough for slices to pay

/// Every candidate in the order in which they are tried.
std::vector<StackPolicy> candidates(int64_t blocks) {
  const std::vector<CheckpointPolicy> policies = policies_by_cost();
  std::vector<StackPolicy> all{policies.front()};
  for (size_t i = 1; i < policies.size(); ++i) {
    for (int64_t count = 1; count < blocks; ++count) {
      all.push_back(mixed_policy(policies[i - 1], policies[i], count, blocks));
    }
    all.emplace_back(policies[i]);
  }
  return all;
}

int64_t peak_of(const EncoderStep& step, const StackPolicy& policy, const DeviceProfile& device) {
  return plan([&] { step(policy); }, device, {.budget = int64_t{1} << 50}).peak_bytes;
}

}  // namespace

TEST_CASE("the cheapest policy is the first one by cost that an attempt accepts") {
  const int64_t blocks = 7;
  // All candidates in the order of their cost, and an attempt that accepts those from a place on
  std::vector<StackPolicy> order{"none"};
  const std::vector<CheckpointPolicy> policies = policies_by_cost();
  for (size_t i = 1; i < policies.size(); ++i) {
    for (int64_t count = 1; count < blocks; ++count) {
      order.push_back(mixed_policy(policies[i - 1], policies[i], count, blocks));
    }
    order.emplace_back(policies[i]);
  }
  CHECK(order[1] == StackPolicy("1*selective,none"));
  CHECK(order[2 * blocks + 1] == StackPolicy("6*full,tiled"));  // late blocks first
  const auto search = [&](size_t first, const StackPolicy& given, int64_t size = 7) {
    const auto attempt = [&](const StackPolicy& policy) -> std::optional<StackPolicy> {
      const auto place = std::ranges::find(order, policy) - order.begin();
      return place >= static_cast<int64_t>(first) ? std::optional(policy) : std::nullopt;
    };
    return cheapest_policy(attempt, size, given);
  };
  for (size_t first = 0; first < order.size(); ++first) {
    CAPTURE(first, order[first].text());
    CHECK(search(first, {}) == order[first]);
    // From what was asked for on; a mix starts at the cheapest policy in it
    CHECK(search(first, "full") == order[std::max<size_t>(first, 2 * blocks)]);
    const size_t given = 2 * blocks - 3;
    CHECK(search(first, order[given]) == order[first > given ? first : given]);
  }
  CHECK_FALSE(search(order.size() + 1, {}).has_value());
  CHECK(search(3, "nested") == StackPolicy("nested"));  // accepted, as it stands in no order
  CHECK(search(1, {}, 1) == StackPolicy("selective"));  // one block has no mix
  const auto fussy = [](const StackPolicy& policy) -> std::optional<StackPolicy> {
    return policy == StackPolicy("nested") || policy == StackPolicy("none") ? std::nullopt : std::optional(policy);
  };
  CHECK(cheapest_policy(fussy, blocks, "nested") == StackPolicy("full"));
}

TEST_CASE("peaks fall from each candidate policy to the next, so that bisection finds the first that fits") {
  for (const EncoderStep& step : {kSmall, kTiled, EncoderStep{kSmall.options, {1, 4, 32}}}) {
    for (const DeviceProfile& device : {this_machine(), device_profile("rtx-4090-24gb")}) {
      CAPTURE(step.shape, device.name);
      // Mixes are tried where the policy before them does not fit: one that needs more than it is as good as it. There
      // are such: the input of the first block, which its caller holds, is there twice when it comes back from the host
      int64_t previous = std::numeric_limits<int64_t>::max(), unmixed = previous;
      for (const StackPolicy& policy : candidates(step.blocks())) {
        CAPTURE(policy.text());
        const int64_t peak = std::min(peak_of(step, policy, device), unmixed);
        CHECK(peak <= previous);
        previous = peak;
        if (policy.first.empty()) unmixed = peak;
      }
    }
  }
}

TEST_CASE("the chosen policy is the cheapest that fits, whatever the budget") {
  std::vector<int64_t> peaks;
  const std::vector<StackPolicy> all = candidates(kTiled.blocks());
  for (const StackPolicy& policy : all) peaks.push_back(peak_of(kTiled, policy, this_machine()));
  std::set<std::string> chosen;
  for (const int64_t peak : peaks) {
    for (const int64_t budget : {peak, peak - 1, peak + (1 << 16)}) {
      const auto choice = fit_policy(kTiled, kTiled.blocks(), this_machine(), {.budget = budget});
      const auto first = std::ranges::find_if(peaks, [&](int64_t p) { return p <= budget; }) - peaks.begin();
      CAPTURE(budget, first);
      REQUIRE(choice.has_value() == (first < static_cast<int64_t>(all.size())));
      if (!choice) continue;
      CHECK(choice->policy == all[static_cast<size_t>(first)]);
      CHECK(choice->plan.fits);
      CHECK(choice->plan.peak_bytes == peaks[static_cast<size_t>(first)]);
      chosen.insert(choice->policy.text());
    }
  }
  CHECK(chosen.size() > 12);
  CHECK(chosen.contains("3*selective,none"));
  CHECK(chosen.contains("5*tiled+offload,tiled"));
}

TEST_CASE("what runs under the chosen policy stays within the budget and needs what was planned, byte for byte") {
  for (const EncoderStep& step : {kSmall, kTiled}) {
    const int64_t none = peak_of(step, "none", this_machine());
    for (const int64_t percent : {100, 90, 75, 60, 45, 30, 25}) {
      const int64_t budget = none * percent / 100;
      const auto choice = fit_policy(step, step.blocks(), this_machine(), {.budget = budget});
      CAPTURE(step.shape, percent);
      if (!choice) {
        CHECK(budget < peak_of(step, policies_by_cost().back(), this_machine()));
        continue;
      }
      CAPTURE(choice->policy.text());
      const int64_t measured = MemoryMeter().measure([&] { step(choice->policy); }).added_peak();
      CHECK(measured <= budget);
      CHECK(measured == choice->plan.peak_bytes);
    }
  }
}

TEST_CASE("a card's allocator decides for the card, and a budget for nothing is an error") {
  const DeviceProfile card = device_profile("rtx-4090-24gb");
  const auto whole = fit_policy(kTiled, kTiled.blocks(), card);
  REQUIRE(whole);
  CHECK(whole->policy == StackPolicy("none"));
  const int64_t budget = whole->plan.reserved_bytes * 2 / 3;
  const auto choice = fit_policy(kTiled, kTiled.blocks(), card, {.budget = budget});
  REQUIRE(choice);
  CHECK(choice->policy != StackPolicy("none"));
  CHECK(choice->plan.reserved_bytes <= budget);
  CHECK_FALSE(fit_policy(kSmall, kSmall.blocks(), this_machine(), {.budget = 1000}).has_value());
  CHECK(testing::error_of([] { fit_policy(kSmall, kSmall.blocks(), this_machine(), {.budget = 0}); }).id() ==
        "headroom.memory.plan.budget");
}
