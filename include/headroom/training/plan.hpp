#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <iomanip>
#include <numeric>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "headroom/memory/format.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/plan/plan.hpp"
#include "headroom/plan/recorder.hpp"
#include "headroom/plan/report_json.hpp"
#include "headroom/runtime/phase.hpp"
#include "headroom/training/bucket.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/device_profile.hpp"
#include "headroom/training/example.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/models.hpp"
#include "headroom/training/separate.hpp"
#include "headroom/training/trainer.hpp"

namespace headroom::inline v0::training {

/// Examples without data.
struct ShapeSource {
  const Config& config;
  Example operator()(int64_t, int64_t count) const {
    const int64_t channels = config.audio.channels, samples = config.training.segment_length;
    const auto stems = static_cast<int64_t>(config.audio.stems.size());
    return {torch::empty({count, channels, samples}), torch::empty({count, stems, channels, samples})};
  }
};

/// What training by a configuration will need, with batches of several shapes.
struct BucketPlan {
  Plan plan;  ///< of all buckets together
  std::vector<Bucket> buckets;
  std::vector<int64_t> peaks;  ///< highest sum of all tensors in a step of each bucket

  /// The bucket that makes the peak.
  const Bucket& largest() const {
    return buckets[static_cast<size_t>(std::ranges::max_element(peaks) - peaks.begin())];
  }
};

namespace detail {

/// Of the passes that gradients are accumulated over: the others need no more.
inline int64_t replayed_passes(const Config& config) {
  return std::min<int64_t>(config.training.gradient_accumulation_steps, 2);
}

/// A step of the trainer with each of `steps`, then one segment of validation: the longest. `next` is called before
/// each of these.
inline void dry_training(Config config, const std::vector<Bucket>& steps, const std::function<void()>& next) {
  config.training.gradient_accumulation_steps = replayed_passes(config);
  const models::Separator model = make_model(config);
  const auto source = [&](int64_t first, int64_t) { return ShapeSource{config}(first, config.training.batch_size); };
  Trainer trainer(model, config, source);
  for (const Bucket& bucket : steps) {
    next();
    config = with_bucket(config, bucket);
    trainer.step(config.training.learning_rate);
  }
  next();
  const Phase phase("validation");
  const torch::NoGradGuard guard;
  model->eval();
  for (const Bucket& bucket : steps) {
    config.training.segment_length = std::max(config.training.segment_length, bucket.segment_length);
  }
  if (config.training.validation == "tracks") {
    config.training.segment_length = std::max(config.training.segment_length, config.inference_segment());
  }
  model(ShapeSource{config}(0, 1).mixture);
}

/// Throws headroom.training.bucket where there is none, and headroom.training.config for one that the configuration
/// cannot have.
inline void check_buckets(const Config& config, const std::vector<Bucket>& buckets) {
  require(!buckets.empty(), "headroom.training.bucket", "there is no bucket; expected at least one, such as 8x3s");
  for (const Bucket& bucket : buckets) {
    parse_config(to_json(with_bucket(config, bucket)), "bucket " + to_string(bucket));
  }
}

/// The plan of plan_buckets, without its checks.
HEADROOM_TRAINING BucketPlan plan_steps(const Config& config, const std::vector<Bucket>& buckets,
                                        const DeviceProfile& device, PlanOptions options);

#ifdef HEADROOM_TRAINING_HERE
HEADROOM_TRAINING BucketPlan plan_steps(const Config& config, const std::vector<Bucket>& buckets,
                                        const DeviceProfile& device, PlanOptions options) {
  options.value = 1;  // losses and norms, which the trainer checks and reports
  // The first step makes the optimizer's state. The largest bucket comes first, so that others find what it left in
  // the allocator's cache, and once more at the end, where it finds what they left
  std::vector<size_t> order(buckets.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::stable_sort(order, std::ranges::greater(), [&](size_t i) {
    return std::pair(buckets[i].batch_size * buckets[i].segment_length, buckets[i].segment_length);
  });
  order.push_back(order.front());
  std::vector<Bucket> steps;
  for (const size_t i : order) steps.push_back(buckets[i]);
  std::vector<int64_t> starts;
  const auto start = [&] { starts.push_back(TraceRecorder::current()->now()); };

  BucketPlan result{plan([&] { dry_training(config, steps, start); }, device, options), buckets,
                    std::vector<int64_t>(buckets.size())};
  int64_t live = 0;
  size_t step = 0;
  for (const auto& event : headroom::detail::block_events(result.plan.trace)) {
    const int64_t bytes = result.plan.trace.blocks[event.block].bytes;
    live += event.begins ? bytes : -bytes;
    while (step < order.size() && event.time >= starts[step + 1]) ++step;
    if (step == order.size()) break;
    int64_t& peak = result.peaks[order[step]];
    peak = std::max(peak, live);
  }
  double flops = 0;  // of all steps but the first one: each bucket once
  for (const auto& op : result.plan.trace.operators) {
    if (op.begin >= starts[1] && op.begin < starts.back()) flops += op.flops;
  }
  result.plan.flops = flops / static_cast<double>(buckets.size()) *
                      static_cast<double>(config.training.gradient_accumulation_steps) /
                      static_cast<double>(replayed_passes(config));
  return result;
}
#endif

}  // namespace detail

/// What training by a configuration will need on a device, the first step and validation included; `flops` are those of
/// one optimizer step. Throws headroom.memory.plan.budget.
inline Plan plan_training(const Config& config, const DeviceProfile& device, const PlanOptions& options = {}) {
  return detail::plan_steps(config, {bucket_of(config)}, device, options).plan;
}

/// The same for steps of several buckets that follow each other in any order, in the place of the configuration's
/// batch_size and segment_length: the sum of all tensors is at most the peak, and a caching allocator is left the
/// segments of other buckets. `flops` are the mean of the buckets. Throws headroom.training.bucket where there is none,
/// headroom.training.config for one that the configuration cannot have, and as plan_training does.
inline BucketPlan plan_buckets(const Config& config, const std::vector<Bucket>& buckets, const DeviceProfile& device,
                               const PlanOptions& options = {}) {
  detail::check_buckets(config, buckets);
  return detail::plan_steps(config, buckets, device, options);
}

/// What each bucket needs, as a table for people.
inline void print_buckets(std::ostream& out, const BucketPlan& plan) {
  out << "highest in a step of the bucket\n";
  for (size_t i = 0; i < plan.buckets.size(); ++i) {
    out << "  " << std::left << std::setw(40) << to_string(plan.buckets[i]) << std::right << std::setw(12)
        << format_bytes(plan.peaks[i]) << (plan.buckets[i] == plan.largest() ? "  makes the peak" : "") << "\n";
  }
}

/// The plan as a JSON document, with "buckets": [{"batch_size", "segment_length", "peak_bytes"}].
inline std::string plan_json(const BucketPlan& plan) {
  auto json = Json::parse(headroom::plan_json(plan.plan));
  for (size_t i = 0; i < plan.buckets.size(); ++i) {
    const auto& [batch_size, segment_length] = plan.buckets[i];
    json["buckets"].push_back(
        {{"batch_size", batch_size}, {"segment_length", segment_length}, {"peak_bytes", plan.peaks[i]}});
  }
  return json.dump(2) + "\n";
}

}  // namespace headroom::inline v0::training
