#include "headroom/training/plan.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "headroom/memory/resident.hpp"
#include "headroom/plan/report.hpp"
#include "headroom/plan/report_json.hpp"
#include "headroom/training/out_of_memory.hpp"
#include "headroom/training/recommend.hpp"
#include "headroom/training/sweep.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/transformer_options.hpp"

using namespace headroom;
using testing::transformer;
using training::Config;

namespace {

Config small() {
  Config config;
  transformer(config).n_fft(126).hop_length(32).n_layers(2).emb_dim(16).n_heads(2).ffn_hidden_dim({24, 20});
  config.training.segment_length = 1200;
  config.training.batch_size = 2;
  config.training.gradient_accumulation_steps = 2;
  config.loss.windows = {256, 128};
  config.loss.min_n_fft = 256;
  return config;
}

Config guide(const std::string& name) {
  return training::load_config(std::string(HEADROOM_SOURCE_DIR) + "/examples/configs/musdb18_" + name + ".json");
}

/// What plan_training replays, with data: two steps and a segment of validation.
void train_really(const Config& config) {
  models::TimeFrequencyTransformer model(training::model_options(config));
  const auto source = [&config](int64_t, int64_t count) {
    training::Example example = training::ShapeSource{config}(0, count);
    example.mixture.normal_(), example.stems.normal_();
    return example;
  };
  training::Trainer trainer(model, config, source);
  for (int step = 0; step < 2; ++step) trainer.step(1e-3);
  const torch::NoGradGuard guard;
  model->eval();
  model->forward(source(0, 1).mixture);
}

}  // namespace

TEST_CASE("the planned peak of training is the measured one, byte for byte, under every checkpoint policy") {
  for (const char* policy : {"none", "full", "selective", "every-3", "nested", "tiled", "full+offload", "full+bf16",
                             "reversible", "3*full,none", "1*full+offload,1*selective,none"}) {
    for (const char* attention : {"automatic", "reference"}) {
      Config config = small();
      transformer(config).reversible(policy == std::string("reversible"));
      if (!transformer(config).reversible()) config.model.gradient_checkpointing = policy;
      config.model.attention = attention;
      CAPTURE(policy, attention);
      const int64_t measured = MemoryMeter().measure([&] { train_really(config); }).added_peak();
      const Plan planned = training::plan_training(config, this_machine());
      CHECK(planned.peak_bytes == measured);
      CHECK(planned.by_phase.contains("recomputation") == (policy != std::string("none")));
    }
  }
}

TEST_CASE("training under bfloat16 autocast is planned byte for byte, under every checkpoint policy") {
  for (const char* policy :
       {"none", "full", "selective", "every-3", "nested", "tiled", "full+offload", "full+bf16", "reversible"}) {
    Config config = small();
    config.training.bf16 = true;
    transformer(config).reversible(policy == std::string("reversible"));
    if (!transformer(config).reversible()) config.model.gradient_checkpointing = policy;
    CAPTURE(policy);
    const int64_t measured = MemoryMeter().measure([&] { train_really(config); }).added_peak();
    CHECK(training::plan_training(config, this_machine()).peak_bytes == measured);
  }
  Config config = small();
  const int64_t in_float = training::plan_training(config, device_profile("rtx-4090-24gb")).peak_bytes;
  config.training.bf16 = true;
  CHECK(training::plan_training(config, device_profile("rtx-4090-24gb")).peak_bytes < in_float);
}

TEST_CASE("the guide's crash: the allocation, its shape and its module") {
  Config config = guide("memory_optimized_first");
  config.model.attention = "reference";
  const Plan planned = training::plan_training(config, device_profile("rtx-pro-6000-97gb"));
  CHECK_FALSE(planned.fits);
  const auto json = nlohmann::json::parse(plan_json(planned));
  CHECK(json.at("largest_allocation").at("bytes") == 86'856'519'888);
  CHECK(json.at("largest_allocation").at("shape") == nlohmann::json({431, 12, 2049, 2049}));
  CHECK(json.at("largest_allocation").at("module") == "encoder.layers.0.frequency.attention");
  CHECK(json.at("fits") == false);
  CHECK(json.at("peak_bytes") == planned.peak_bytes);
  CHECK(testing::contains(explain(planned), "80.89 GiB [431, 12, 2049, 2049] in encoder.layers.0.frequency.attention"));

  config.model.attention = "automatic";
  const Plan tiled = training::plan_training(config, this_machine(), {.budget = int64_t{24} << 30});
  CHECK(tiled.fits);
  CHECK(tiled.largest_block()->bytes < int64_t{4} << 30);
  const auto parts = nlohmann::json::parse(plan_json(tiled)).at("parts");
  CHECK(parts.at("optimizer state").get<int64_t>() >= 2 * parts.at("parameters").get<int64_t>());
  int64_t sum = 0;
  for (const auto& [name, bytes] : parts.items()) sum += bytes.get<int64_t>();
  CHECK(sum == tiled.peak_bytes);
}

TEST_CASE("optimizers are planned byte for byte: narrow states, in the backward pass, ready to be repeated") {
  for (const char* state : {"full", "bf16", "8bit"}) {
    for (const bool in_backward : {false, true}) {
      Config config = small();
      transformer(config).emb_dim(64);
      transformer(config).ffn_hidden_dim({72});  // 64 x 72: enough for 8 bits, in whole blocks
      config.training.gradient_accumulation_steps = 1;
      config.training.clip_grad_norm = 0;
      config.training.optimizer_state = state;
      config.training.optimizer_in_backward = in_backward;
      config.training.split_on_out_of_memory = !in_backward;
      CAPTURE(state, in_backward);
      const int64_t measured = MemoryMeter().measure([&] { train_really(config); }).added_peak();
      CHECK(training::plan_training(config, this_machine()).peak_bytes == measured);
    }
  }
}

TEST_CASE("every optimizer, averages of weights, frozen parameters and LoRA are planned byte for byte") {
  const auto check = [](auto&& change) {
    Config config = small();
    transformer(config).emb_dim(64);
    transformer(config).ffn_hidden_dim({72});
    change(config);
    const int64_t measured = MemoryMeter().measure([&] { train_really(config); }).added_peak();
    CHECK(training::plan_training(config, this_machine()).peak_bytes == measured);
    return measured;
  };
  for (const char* optimizer : {"radam", "muon", "prodigy", "sgd"}) {
    for (const char* state : {"full", "8bit"}) {
      CAPTURE(optimizer, state);
      check([&](Config& c) {
        c.training.optimizer = optimizer;
        c.training.optimizer_state = state;
        c.training.split_on_out_of_memory = true;
      });
    }
  }
  const int64_t plain = check([](Config&) {});
  CHECK(check([](Config& c) { c.training.ema_decay = 0.9; }) > plain);
  CHECK(check([](Config& c) { c.training.freeze = {"encoder.layers.0.*"}; }) < plain);
  CHECK(check([](Config& c) { c.lora.rank = 4; }) < plain);
}

TEST_CASE("every term of the loss is planned byte for byte") {
  for (const char* weights : {"mse", "masked", "masked samples", "logWMSE", "frequency", "all"}) {
    Config config = small();
    config.training.segment_length = 2100;
    const bool all = weights == std::string("all");
    config.loss.stft_weight = config.loss.l1_weight = all;
    config.loss.mse_weight = all || weights == std::string("mse");
    config.loss.masked_weight = all || testing::contains(weights, "masked");
    config.loss.masked_by_example = weights != std::string("masked samples");
    config.loss.log_wmse_weight = all || weights == std::string("logWMSE");
    config.loss.frequency_weight = all || weights == std::string("frequency");
    for (const bool bf16 : {false, true}) {
      config.training.bf16 = bf16;
      CAPTURE(weights, bf16);
      const int64_t measured = MemoryMeter().measure([&] { train_really(config); }).added_peak();
      CHECK(training::plan_training(config, this_machine()).peak_bytes == measured);
      // Nothing but the loss
      const auto loss_alone = [&] {
        const training::Example example = training::ShapeSource{config}(0, 4);
        torch::Tensor estimate = torch::ones_like(example.stems).requires_grad_();
        training::make_loss(config)->forward(estimate, example.stems, example.mixture).backward();
      };
      CHECK(plan(loss_alone, this_machine()).peak_bytes == MemoryMeter().measure(loss_alone).added_peak());
    }
  }
}

TEST_CASE("memory that runs out is explained: the allocation that failed, and a change that would have fitted") {
  Config config = small();
  config.training.batch_size = 4;
  MemoryMeter meter;
  const int64_t whole = meter.measure([&] { train_really(config); }).added_peak();
  for (const int share : {40, 70, 90, 99}) {
    CAPTURE(share);
    const int64_t limit = whole * share / 100;
    std::string error;
    meter.reset_peak();
    const int64_t before = meter.live();
    meter.set_limit(before + limit);
    try {
      train_really(config);
    } catch (const c10::OutOfMemoryError& caught) {
      error = caught.what_without_backtrace();
    }
    meter.set_limit(std::nullopt);
    const std::string text = training::explain_out_of_memory(config, this_machine(), meter.peak() - before);
    INFO(error << text);
    const size_t begin = error.find("allocate ") + 9, end = error.find(" with ");
    CHECK(testing::contains(text, "out of memory: " + error.substr(begin, end - begin) + " ["));  // the same bytes
    CHECK(testing::contains(text, " in "));
    CHECK(testing::contains(text, "this fits (the same training)"));
    const auto change = training::recommend(config, this_machine(), {.budget = meter.peak() - before});
    REQUIRE(change);
    CHECK(meter.measure([&] { train_really(change->config); }).added_peak() <= limit);
  }
  CHECK(testing::contains(training::explain_out_of_memory(config, this_machine(), 2 * whole), "outside of the step"));
}

TEST_CASE("further accumulated passes need no more memory and as many more operations") {
  Config config = small();
  const Plan two = training::plan_training(config, this_machine());
  config.training.gradient_accumulation_steps = 8;
  const Plan eight = training::plan_training(config, this_machine());
  CHECK(eight.peak_bytes == two.peak_bytes);
  CHECK(eight.flops == Approx(4 * two.flops));
}

TEST_CASE("planning costs the same however long segments and however large batches are") {
  const auto plan_of = [](int64_t batch, int64_t segment) {
    Config config = small();
    config.training.batch_size = batch;
    config.training.segment_length = segment;
    return training::plan_training(config, this_machine());
  };
  const Plan few = plan_of(4, 20'000), many = plan_of(4'000, 20'000);
  CHECK(many.flops == Approx(1000 * few.flops).epsilon(1e-3));
  CHECK(many.trace.operators.size() <= few.trace.operators.size() * 11 / 10);
  const MemoryMeter meter;
  reset_peak_resident_bytes();
  const int64_t resident = resident_bytes();
  const Plan long_one = plan_of(4, 200'000'000);
  CHECK(long_one.trace.operators.size() <= few.trace.operators.size() * 11 / 10);
  CHECK(meter.peak() < 1 << 20);
  CHECK(peak_resident_bytes() - resident < 64 << 20);
}

TEST_CASE("recommendations fit, the same training first, and never get worse with a larger budget") {
  Config config = small();
  config.model.attention = "reference";
  config.training.batch_size = 4;
  const Plan whole = training::plan_training(config, this_machine());
  const auto with = [&](int64_t budget) { return training::recommend(config, this_machine(), {.budget = budget}); };
  CHECK(with(whole.peak_bytes)->changes.empty());
  int64_t previous_length = 0;
  bool previous_same = false;
  for (const int share : {3, 8, 20, 40, 70, 95}) {
    const auto found = with(whole.peak_bytes * share / 100);
    CAPTURE(share);
    if (!found) {
      CHECK(previous_length == 0);
      continue;
    }
    CHECK(found->plan.fits);
    CHECK(found->plan.peak_bytes <= whole.peak_bytes * share / 100);
    CHECK(training::plan_training(found->config, this_machine()).peak_bytes == found->plan.peak_bytes);
    const bool fewer_bits = found->config.training.bf16 || found->config.training.optimizer_state != "full";
    CHECK(found->config.training.segment_length >= previous_length);
    CHECK(found->same_training >= previous_same);
    CHECK(found->config.training.batch_size * found->config.training.gradient_accumulation_steps == 8);
    CHECK(found->same_training ==
          (found->config.training.segment_length == config.training.segment_length && !fewer_bits));
    previous_length = found->config.training.segment_length;
    previous_same = found->same_training;
  }
  CHECK(previous_same);
}

TEST_CASE("recommended policies come in the order of their operations, and smaller budgets have smaller peaks") {
  Config config = small();
  transformer(config).n_layers(4);
  config.training.batch_size = 1;
  double flops = 0;
  for (const CheckpointPolicy& policy : policies_by_cost()) {
    config.model.gradient_checkpointing = policy;
    const double now = training::plan_training(config, this_machine()).flops;
    CAPTURE(policy.text());
    CHECK(now >= flops);
    flops = now;
  }
  config.model.gradient_checkpointing = false;
  const int64_t whole = training::plan_training(config, this_machine()).peak_bytes;
  int64_t least = whole;
  double most = 0;
  std::set<std::string> chosen;
  for (int share = 100; share > 0; share -= 3) {
    const auto found = training::recommend(config, this_machine(), {.budget = whole * share / 100});
    if (!found || !found->same_training) break;
    CAPTURE(share, found->config.model.gradient_checkpointing.text());
    CHECK(found->plan.peak_bytes <= whole * share / 100);
    CHECK(found->plan.peak_bytes <= least);
    CHECK(found->plan.flops >= most);
    least = found->plan.peak_bytes;
    most = found->plan.flops;
    chosen.insert(found->config.model.gradient_checkpointing.text());
  }
  CHECK(chosen.contains("none"));
  CHECK(chosen.contains("4*selective,none"));
  CHECK(chosen.contains("4*full,selective"));
  CHECK(chosen.size() > 10);
  CHECK(least < whole * 3 / 10);
  // What was asked for stays where nothing cheaper in memory is needed
  config.model.gradient_checkpointing = "full+bf16";
  CHECK(training::recommend(config, this_machine(), {.budget = whole})->changes.empty());
}

TEST_CASE("the guide's first memory-optimized configuration fits 8 GiB, its largest 16") {
  Config config = guide("memory_optimized_first");
  config.training.gradient_accumulation_steps = 1;
  const auto found = training::recommend(config, this_machine(), {.budget = int64_t{15} << 29});
  REQUIRE(found);
  CHECK(found->same_training);
  // Half of the blocks need not go to the disk: with one less of these there it does not fit
  CHECK(found->config.model.gradient_checkpointing == StackPolicy("8*tiled+offload,tiled"));
  CHECK(found->changes == std::vector<std::string>{"model.gradient_checkpointing: 8*tiled+offload,tiled"});
  config.model.gradient_checkpointing = "7*tiled+offload,tiled";
  CHECK_FALSE(training::plan_training(config, this_machine(), {.budget = int64_t{15} << 29}).fits);
  Config largest = guide("xlarge");
  largest.training.batch_size = 1;
  largest.model.gradient_checkpointing = "tiled+offload";
  CHECK(training::plan_training(largest, this_machine(), {.budget = int64_t{16} << 30}).fits);
}

TEST_CASE("fewer bits are recommended where nothing else lets segments keep their length") {
  Config config = small();
  config.training.batch_size = 1;
  config.training.gradient_accumulation_steps = 1;
  const auto least = [&](bool bf16, const char* state) {
    Config leanest = config;
    leanest.model.gradient_checkpointing = policies_by_cost().back();
    leanest.training.bf16 = bf16;
    leanest.training.optimizer_state = state;
    return training::plan_training(leanest, this_machine()).peak_bytes;
  };
  const auto check = [&](int64_t budget, bool bf16, const char* state) {
    const auto found = training::recommend(config, this_machine(), {.budget = budget});
    REQUIRE(found);
    const training::TrainingConfig& training = found->config.training;
    CHECK(found->plan.peak_bytes <= budget);
    CHECK(training::plan_training(found->config, this_machine()).peak_bytes == found->plan.peak_bytes);
    CHECK(training.segment_length == config.training.segment_length);
    CHECK(training.bf16 == bf16);
    CHECK(training.optimizer_state == state);
    const std::string text = training::describe(found);
    CHECK(found->same_training == (!bf16 && training.optimizer_state == "full"));
    CHECK(testing::contains(text, found->same_training ? "(the same training)" : "(other training)"));
    CHECK(testing::contains(text, "training.bf16: true") == bf16);
    CHECK(testing::contains(text, "training.optimizer_state: 8bit") == (training.optimizer_state == "8bit"));
  };
  const auto check_need = [&](bool bf16, const char* state) {
    const int64_t full = least(false, "full"), narrow = least(bf16, state);
    REQUIRE(narrow < full);
    check(full, false, "full");
    check(full - 1, bf16, state);
    check(narrow, bf16, state);
  };
  SECTION("of what autocast casts, where activations decide") { check_need(true, "full"); }
  SECTION("of the optimizer's state, where weights do") {
    transformer(config).ffn_hidden_dim({512});
    check_need(false, "8bit");
  }
}

TEST_CASE("recommended mixes of policies run within the budget and need what is planned, byte for byte") {
  Config config = small();
  transformer(config).n_layers(3);
  config.training.batch_size = 1;
  const int64_t whole = training::plan_training(config, this_machine()).peak_bytes;
  for (const int share : {95, 80, 65, 50, 40}) {
    const int64_t budget = whole * share / 100;
    const auto found = training::recommend(config, this_machine(), {.budget = budget});
    REQUIRE(found);
    CAPTURE(share, found->config.model.gradient_checkpointing.text());
    CHECK_FALSE(found->config.model.gradient_checkpointing.first.empty());
    const int64_t measured = MemoryMeter().measure([&] { train_really(found->config); }).added_peak();
    CHECK(measured <= budget);
    CHECK(measured == found->plan.peak_bytes);
  }
}

TEST_CASE("recommendations keep gradients out of the way of an optimizer that works in the backward pass") {
  Config config = small();
  config.training.batch_size = 4;
  config.training.gradient_accumulation_steps = 1;
  config.training.clip_grad_norm = 0;
  config.training.optimizer_in_backward = true;
  const int64_t whole = training::plan_training(config, this_machine()).peak_bytes;
  for (const int share : {90, 60, 40}) {
    const auto found = training::recommend(config, this_machine(), {.budget = whole * share / 100});
    REQUIRE(found);
    CHECK(found->config.training.gradient_accumulation_steps == 1);
    training::parse_config(training::to_json(found->config), "the recommendation is valid");
  }
}

TEST_CASE("a bucket is read from text") {
  using training::Bucket;
  CHECK(training::parse_bucket("8x3s", 1000) == Bucket{8, 3000});
  CHECK(training::parse_bucket("1x0.5s", 44100) == Bucket{1, 22050});
  CHECK(training::parse_bucket("4x132300", 44100) == Bucket{4, 132300});
  CHECK(training::to_string(Bucket{4, 132300}) == "4x132300");
  for (const char* text : {"", "8", "x", "8x", "x3s", "0x3s", "1.5x3s", "-1x3s", "8x0", "8x-3s", "8x3m", "8sx3",
                           "8x3sx2", "8 times 3s", "infx3s", "8xnan", "8x1e30s"}) {
    CAPTURE(text);
    const Error error = testing::error_of([&] { training::parse_bucket(text, 44100); });
    CHECK(error.id() == "headroom.training.bucket");
    CHECK(testing::contains(error.what(), "8x3s"));
  }
}

TEST_CASE("buckets need what the largest of them needs, in any order, byte for byte") {
  using training::Bucket;
  Config config = small();
  const std::vector<Bucket> buckets{{4, 700}, {1, 2000}, {2, 1500}};
  // Steps of a real trainer with batches of these shapes one after the other, and a segment of validation
  const auto train_buckets = [&](const std::vector<Bucket>& steps) {
    models::TimeFrequencyTransformer model(training::model_options(config));
    size_t step = 0;
    const auto source = [&](int64_t first, int64_t) {
      const Config shape = training::with_bucket(config, steps[step]);
      auto example = training::ShapeSource{shape}(first, shape.training.batch_size);
      example.mixture.normal_(), example.stems.normal_();
      return example;
    };
    training::Trainer trainer(model, config, source);
    for (; step < steps.size(); ++step) trainer.step(1e-3);
    const torch::NoGradGuard guard;
    model->eval();
    model->forward(torch::randn({1, config.audio.channels, 2000}));
  };
  const auto measured = [&](const std::vector<Bucket>& steps) {
    return MemoryMeter().measure([&] { train_buckets(steps); }).added_peak();
  };
  for (const char* policy : {"none", "2*full,none"}) {
    CAPTURE(policy);
    config.model.gradient_checkpointing = policy;
    const training::BucketPlan all = training::plan_buckets(config, buckets, this_machine());
    std::vector<int64_t> alone;
    for (const Bucket& bucket : buckets) {
      alone.push_back(measured({bucket, bucket}));
      CHECK(training::plan_training(training::with_bucket(config, bucket), this_machine()).peak_bytes == alone.back());
    }
    CHECK(all.peaks == alone);
    CHECK(all.plan.peak_bytes == *std::ranges::max_element(alone));
    CHECK(all.largest() == Bucket{2, 1500});
    std::vector<size_t> order{0, 1, 2};
    do {
      std::vector<Bucket> steps;
      for (const size_t i : order) steps.push_back(buckets[i]);
      const training::BucketPlan again = training::plan_buckets(config, steps, this_machine());
      CHECK(again.plan.peak_bytes == all.plan.peak_bytes);
      for (size_t i = 0; i < order.size(); ++i) CHECK(again.peaks[i] == all.peaks[order[i]]);
      steps.push_back(steps.front());  // the first step has no optimizer state yet
      CHECK(measured(steps) == all.plan.peak_bytes);
    } while (std::ranges::next_permutation(order).found);
  }
}

TEST_CASE("buckets are planned together: operations, a card's segments, and what cannot be") {
  using training::Bucket;
  const Config config = small();
  const std::vector<Bucket> buckets{{4, 700}, {1, 2000}, {2, 1500}};
  const DeviceProfile card = device_profile("rtx-4060-8gb");
  const training::BucketPlan all = training::plan_buckets(config, buckets, card);
  double flops = 0;
  for (const Bucket& bucket : buckets) {
    const Plan alone = training::plan_training(training::with_bucket(config, bucket), card);
    CHECK(all.plan.reserved_bytes >= alone.reserved_bytes);
    CHECK(all.plan.peak_bytes >= alone.peak_bytes);
    flops += alone.flops;
  }
  CHECK(all.plan.flops == Approx(flops / 3));
  const training::BucketPlan one = training::plan_buckets(config, {training::bucket_of(config)}, card);
  const Plan same = training::plan_training(config, card);
  CHECK(one.plan.peak_bytes == same.peak_bytes);
  CHECK(one.plan.reserved_bytes == same.reserved_bytes);
  CHECK(one.peaks == std::vector{same.peak_bytes});
  const auto json = nlohmann::json::parse(training::plan_json(all));
  CHECK(json.at("buckets").at(1) ==
        nlohmann::json({{"batch_size", 1}, {"segment_length", 2000}, {"peak_bytes", all.peaks[1]}}));
  std::ostringstream table;
  training::print_buckets(table, all);
  CHECK(testing::contains(table.str(), "2x1500"));
  CHECK(testing::contains(table.str(), format_bytes(all.plan.peak_bytes) + "  makes the peak"));

  CHECK(testing::error_of([&] { training::plan_buckets(config, {}, card); }).id() == "headroom.training.bucket");
  for (const Bucket& wrong : {Bucket{0, 1000}, Bucket{2, 100}, Bucket{-1, 1000}}) {
    const Error error = testing::error_of([&] { training::plan_buckets(config, {{2, 1200}, wrong}, card); });
    CHECK(error.id() == "headroom.training.config");
    CHECK(testing::contains(error.what(), "bucket " + training::to_string(wrong)));
    CHECK(testing::error_of([&] { training::recommend(config, card, {}, {wrong}); }).id() ==
          "headroom.training.config");
  }
}

TEST_CASE("recommendations for buckets fit with all of them") {
  using training::Bucket;
  Config config = small();
  config.training.gradient_accumulation_steps = 1;
  const std::vector<Bucket> buckets{{4, 1200}, {8, 700}, {2, 2400}};
  const int64_t whole = training::plan_buckets(config, buckets, this_machine()).plan.peak_bytes;
  CHECK(training::recommend(config, this_machine(), {.budget = whole}, buckets)->changes.empty());
  int64_t previous = whole;
  for (const int share : {90, 70, 50, 30, 20}) {
    const auto found = training::recommend(config, this_machine(), {.budget = whole * share / 100}, buckets);
    CAPTURE(share);
    REQUIRE(found);
    CHECK(found->plan.peak_bytes <= previous);
    previous = found->plan.peak_bytes;
    REQUIRE(found->buckets.size() == buckets.size());
    for (size_t i = 0; i < buckets.size(); ++i) {
      CHECK(found->buckets[i].batch_size * found->config.training.gradient_accumulation_steps == buckets[i].batch_size);
      const auto alone = training::with_bucket(found->config, found->buckets[i]);
      CHECK(training::plan_training(alone, this_machine()).peak_bytes <= whole * share / 100);
    }
    CHECK(training::plan_buckets(found->config, found->buckets, this_machine()).plan.peak_bytes == previous);
  }
  const auto half = training::recommend(config, this_machine(), {.budget = whole * 6 / 10}, buckets);
  REQUIRE(half);
  CHECK(
      testing::contains(training::describe(half), "buckets: 2x1200 4x700 1x2400 with gradient_accumulation_steps: 2"));
}

TEST_CASE("training that cannot be planned says why") {
  CHECK(testing::error_of([&] { training::plan_training(small(), this_machine(), {.budget = 100}); }).id() ==
        "headroom.memory.plan.budget");
}

TEST_CASE("a sweep plans what each configuration would need by itself") {
  using Values = std::vector<int64_t>;
  const training::Sweep seconds = training::parse_sweep("segment_length=3s..15s", 1000);
  CHECK(seconds.section == "training");
  CHECK(seconds.values == Values{3000, 6000, 9000, 12000, 15000});
  CHECK(training::parse_sweep("training.segment_length=1.5s..2s:2", 1000).values == Values{1500, 2000});
  CHECK(training::parse_sweep("model.n_layers=1,4", 1000).values == Values{1, 4});
  for (const char* wrong : {"segment_length", "segment_length=", "segment_length=x", "segment_length=5..3", "bf16=1",
                            "audio.n_layers=1", "n_layers=1..5:1", "segment_length=3m"}) {
    CAPTURE(wrong);
    CHECK(testing::error_of([&] { training::parse_sweep(wrong, 1000); }).id() == "headroom.training.sweep");
  }
  const Config config = small();
  const training::Sweep layers = training::parse_sweep("n_layers=1,3", 1000);
  const DeviceProfile card = device_profile("rtx-4060-8gb");
  const auto rows = training::plan_sweep({{"a", config}}, layers, card);
  REQUIRE(rows.size() == 4);
  Config deep = config;
  transformer(deep).n_layers(3);
  deep.model.attention = "reference";
  const Plan single = training::plan_training(deep, card);
  CHECK(rows[2].value == 3);
  CHECK(rows[2].peak_bytes == single.peak_bytes);
  CHECK(rows[2].reserved_bytes == single.reserved_bytes);
  CHECK(rows[2].seconds == Approx(single.flops / card.flops_per_second));
  CHECK(rows[3].peak_bytes < rows[2].peak_bytes);
  std::ostringstream table;
  training::print_sweep(table, rows, layers, card, [](int64_t value) { return std::to_string(value); });
  CHECK(testing::contains(table.str(), format_bytes(rows[3].peak_bytes)));
}

TEST_CASE("device profiles from files") {
  const testing::TemporaryFolder folder;
  const std::filesystem::path path = folder / "profile.json";
  const auto write = [&](const std::string& text) { testing::write_bytes(path, text); };
  write(R"({"name": "card", "total_bytes": 1000000, "total_bytes_source": "data sheet", "context_bytes": 1000,
            "context_bytes_source": "assumption", "workspace_bytes": 0, "workspace_bytes_source": "assumption"})");
  CHECK(training::find_device_profile(path.string()).usable_bytes() == 999000);
  write(R"({"name": "card", "total_bytes": 10, "colour": "green"})");
  const Error error = testing::error_of([&] { training::load_device_profile(path); });
  CHECK(error.id() == "headroom.training.device_profile");
  CHECK(testing::contains(error.what(), "colour"));
  CHECK(testing::contains(error.what(), "context_bytes"));
  std::filesystem::remove(path);
  CHECK(testing::error_of([&] { training::load_device_profile(path); }).id() == "headroom.training.config_file");
  CHECK(training::find_device_profile("h100-80gb").name == "h100-80gb");
}
