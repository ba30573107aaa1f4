#include "headroom/training/trainer.hpp"

#include <algorithm>
#include <filesystem>
#include <map>
#include <numeric>
#include <random>

#include "headroom/training/load_model.hpp"
#include "headroom/training/redraw.hpp"
#include "headroom/training/validation.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/one_thread.hpp"
#include "support/tensors.hpp"
#include "support/tiny_separator.hpp"
#include "support/tiny_training.hpp"
#include "support/transformer_options.hpp"

using namespace headroom;
using namespace headroom::training;
using headroom::testing::check_equal;
using headroom::testing::contains;
using headroom::testing::copies_of;
using headroom::testing::error_of;
using headroom::testing::noise_examples;
using headroom::testing::noise_source;
using headroom::testing::TemporaryFolder;
using headroom::testing::tiny_config;
using headroom::testing::TinySeparator;
using headroom::testing::transformer;

namespace {

struct Run {
  TinySeparator model;
  Trainer trainer;
};

/// A trainer whose model starts the same way each time.
Run make_trainer(const Config& config, double dropout = 0.2) {
  torch::manual_seed(7);
  TinySeparator model(6, dropout);
  return {model, Trainer(model, config, noise_source)};
}

/// The noise, whose examples first, …, last - 1 hold a NaN.
BatchSource with_bad_examples(int64_t first_bad, int64_t last_bad) {
  return [=](int64_t first, int64_t count) {
    Example examples = noise_source(first, count);
    for (int64_t i = std::max(first, first_bad); i < std::min(first + count, last_bad); ++i) {
      examples.mixture[i - first][0][5] = std::nan("");
    }
    return examples;
  };
}

}  // namespace

TEST_CASE("training lowers the loss, and twice the same run gives the same bits") {
  const Config config = tiny_config();
  std::vector<std::vector<double>> losses;
  std::vector<TensorMap> ends;
  for (int run = 0; run < 2; ++run) {
    auto [model, trainer] = make_trainer(config);
    const Summary summary = trainer.run({.steps = 24});
    CHECK(summary.steps == 24);
    CHECK(summary.epoch_losses.size() == 6);
    CHECK(summary.epoch_losses.back() < 0.9 * summary.epoch_losses.front());
    CHECK(summary.peak_bytes > 0);
    CHECK(summary.best_metric == "training loss");
    losses.push_back(summary.epoch_losses);
    ends.push_back(copies_of(trainer.state().model));
  }
  CHECK(losses[0] == losses[1]);
  check_equal(ends[0], ends[1]);
}

TEST_CASE("a run that is stopped and resumed in new objects ends bit-equal to one that was not") {
  const TemporaryFolder whole, parts;
  const Config config = tiny_config();
  std::vector<double> rates, rates_in_parts;
  auto [model, trainer] = make_trainer(config);
  const Summary summary =
      trainer.run({.folder = whole.path(), .on_step = [&](const StepReport& p) { rates.push_back(p.learning_rate); }});
  CHECK(summary.steps == 12);  // epochs x steps_per_epoch

  Summary last;
  int runs = 0;
  for (const int stop_after : {6, 8, 12}) {  // in the middle of an epoch, at its end, never
    auto [fresh_model, fresh] = make_trainer(config);
    if (runs++ > 0) {
      fresh.resume(load_state(parts / "last.pt"), "last.pt");
    }
    int64_t now = 0;
    last = fresh.run({.folder = parts.path(),
                      .on_step =
                          [&](const StepReport& p) {
                            now = p.step;
                            rates_in_parts.push_back(p.learning_rate);
                          },
                      .stop_requested = [&] { return now == stop_after; }});
    CHECK(last.stopped == (stop_after < 12));
    CHECK(last.steps == stop_after);
    torch::manual_seed(99);  // a resumed run owes nothing to the generator of this process
  }
  CHECK(rates == rates_in_parts);
  CHECK(last.epoch_losses == summary.epoch_losses);
  CHECK(last.best_score == summary.best_score);
  for (const std::string name : {"last", "best"}) {
    INFO(name);
    const TrainingState a = load_state(whole / (name + ".pt")), b = load_state(parts / (name + ".pt"));
    CHECK(a.step == b.step);
    CHECK(a.epoch_losses == b.epoch_losses);
    CHECK(a.random.equal(b.random));
    check_equal(a.model, b.model);
    check_equal(a.optimizer, b.optimizer);
    CHECK(a.optimizer.at("first.weight.step").item<int64_t>() == a.step);
    const auto beside = parts / (name + ".safetensors");
    check_equal(weights::load_tensors(beside), b.model);
    CHECK(testing::read_bytes(beside) == testing::read_bytes(whole / (name + ".safetensors")));
  }
}

TEST_CASE("accumulated passes give the gradients and the loss of the whole batch") {
  Config config = tiny_config();
  config.training.batch_size = 8;
  auto [whole, one] = make_trainer(config, 0.0);
  config.training.batch_size = 1;
  config.training.gradient_accumulation_steps = 8;
  auto [parts, eight] = make_trainer(config, 0.0);
  CHECK(one.step(0.0) == Approx(eight.step(0.0)).epsilon(1e-6));
  const auto expected = whole->named_parameters();
  for (const auto& parameter : parts->named_parameters()) {
    INFO(parameter.key());
    const torch::Tensor reference = expected[parameter.key()].grad();
    CHECK((parameter.value().grad() - reference).norm().item<double>() < 1e-6 * reference.norm().item<double>() + 1e-9);
    CHECK(reference.norm().item<double>() > 1e-4);
  }
  // The second step takes the next eight examples, not the same ones
  CHECK(one.step(0.0) == Approx(eight.step(0.0)).epsilon(1e-6));
  const Example next = noise_source(16, 8);
  const double expected_loss = make_loss(config)->forward(whole->forward(next.mixture), next.stems).item<double>();
  CHECK(one.step(0.0) == Approx(expected_loss).epsilon(1e-6));
}

TEST_CASE("gradients are clipped together to clip_grad_norm") {
  Config config = tiny_config();
  const auto norm_after_step = [&](double limit) {
    config.training.clip_grad_norm = limit;
    auto [model, trainer] = make_trainer(config);
    trainer.step(0.0);
    double sum = 0;
    for (const torch::Tensor& parameter : model->parameters()) sum += parameter.grad().square().sum().item<double>();
    return std::sqrt(sum);
  };
  const double unclipped = norm_after_step(0);
  CHECK(unclipped > 0.1);
  CHECK(norm_after_step(0.05) == Approx(0.05).epsilon(1e-4));
  CHECK(norm_after_step(2 * unclipped) == Approx(unclipped).epsilon(1e-6));
}

TEST_CASE("every allocation of a training step may fail: it is repeated, in parts where that helps") {
  const testing::OneThread one_thread;
  Config config = tiny_config();
  const auto state_after_two_steps = [](auto& trainer) {
    trainer.step(0.01);
    trainer.step(0.01);
    return trainer.state();
  };
  std::map<int64_t, TrainingState> undisturbed;
  for (const int64_t part : {2, 1}) {
    config.training.batch_size = part;
    config.training.gradient_accumulation_steps = 2 / part;
    auto [model, trainer] = make_trainer(config);
    undisturbed[part] = state_after_two_steps(trainer);
    undisturbed[part].model = copies_of(undisturbed[part].model);
    undisturbed[part].optimizer = copies_of(undisturbed[part].optimizer);
  }
  config = tiny_config();
  config.training.split_on_out_of_memory = true;
  MemoryMeter meter;
  int64_t allocations = 0;
  {
    auto [model, trainer] = make_trainer(config);
    allocations = meter.measure([&, &t = trainer] { t.step(0.01); }).allocations;
  }
  std::map<int64_t, int> ended_with;
  for (int64_t spared = 0; spared < allocations; ++spared) {
    CAPTURE(spared);
    auto [model, trainer] = make_trainer(config);
    meter.fail_allocation(spared);
    const TrainingState state = state_after_two_steps(trainer);
    const int64_t part = trainer.microbatch();
    ++ended_with[part];
    const TrainingState& expected = undisturbed.at(part);
    CHECK(state.microbatch == (part == 2 ? 0 : part));
    CHECK(state.random.equal(expected.random));
    check_equal(state.model, expected.model);
    check_equal(state.optimizer, expected.optimizer);
  }
  CHECK(ended_with[1] > 100);  // forward and backward
  CHECK(ended_with[2] > 20);   // clipping and AdamW
}

TEST_CASE("without the option, and when single examples are too many, memory that ran out is an error") {
  Config config = tiny_config();
  for (const bool split : {false, true}) {
    config.training.split_on_out_of_memory = split;
    auto [model, trainer] = make_trainer(config);
    MemoryMeter meter;
    meter.set_limit(meter.live() + 20'000);
    CHECK_THROWS_AS(trainer.step(0.01), c10::OutOfMemoryError);
    meter.set_limit(std::nullopt);
    CHECK_NOTHROW(trainer.step(0.01));
    CHECK(trainer.microbatch() == 2);
  }
}

TEST_CASE("a run that went on in parts resumes in parts, with the same bits") {
  const TemporaryFolder folder;
  Config config = tiny_config();
  config.training.split_on_out_of_memory = true;
  const auto cut = [](auto& trainer) {
    MemoryMeter meter;
    meter.fail_allocation(100);
    trainer.step(0.01);
  };
  auto [model, whole] = make_trainer(config);
  cut(whole);
  std::vector<int64_t> parts;
  whole.run({.steps = 6, .on_step = [&](const StepReport& p) { parts.push_back(p.microbatch); }});
  CHECK(parts == std::vector<int64_t>(5, 1));
  {
    auto [first_model, first] = make_trainer(config);
    cut(first);
    first.run({.steps = 6, .folder = folder.path(), .stop_requested = [] { return true; }});
  }
  auto [second_model, second] = make_trainer(config);
  second.resume(load_state(folder / "last.pt"), "last.pt");
  CHECK(second.microbatch() == 1);
  second.run({.steps = 6});
  check_equal(second.state().model, whole.state().model);
}

TEST_CASE("the optimizer in the backward pass trains as the one after it, bit for bit, and holds no gradients") {
  Config config = tiny_config();
  config.training.clip_grad_norm = 0;
  auto [model, after] = make_trainer(config);
  config.training.optimizer_in_backward = true;
  auto [other_model, within] = make_trainer(config);
  torch::manual_seed(3);
  after.run({.steps = 6});
  torch::manual_seed(3);
  within.run({.steps = 6});
  check_equal(within.state().model, after.state().model);
  check_equal(within.state().optimizer, after.state().optimizer);
  for (const torch::Tensor& parameter : other_model->parameters()) CHECK_FALSE(parameter.grad().defined());
}

TEST_CASE("a gradient that is not finite ends a run with the optimizer in the backward pass; a loss is skipped") {
  Config config = tiny_config();
  config.training.clip_grad_norm = 0;
  config.training.optimizer_in_backward = true;
  torch::manual_seed(7);
  TinySeparator model;
  const auto infinite_slope = [](const torch::Tensor& estimate, const torch::Tensor&) {
    return (estimate * 0).sqrt().sum();
  };
  Trainer trainer(model, config, noise_source, infinite_slope);
  const Error error = error_of([&] { trainer.step(0.01); });
  CHECK(error.id() == "headroom.training.non_finite");
  CHECK(contains(error.what(), "the gradient norm is"));

  TinySeparator other;
  Trainer skips(other, config, with_bad_examples(0, 1));
  const TensorMap before = copies_of(skips.state().model);
  CHECK_FALSE(std::isfinite(skips.step(0.01)));
  check_equal(before, skips.state().model);
  CHECK(std::isfinite(skips.step(0.01)));
}

TEST_CASE("narrow optimizer states are saved and resumed with the same bits; other formats are refused") {
  const TemporaryFolder folder;
  for (const std::string format : {"bf16", "8bit"}) {
    Config config = tiny_config();
    config.training.optimizer_state = format;
    torch::manual_seed(7);
    TinySeparator model(400), fresh_model(400);  // 7200 weights: enough for 8 bits
    Trainer trainer(model, config, noise_source);
    trainer.run({.steps = 3, .folder = folder.path()});
    const TrainingState saved = load_state(folder / "last.pt");
    const auto type = saved.optimizer.at("first.weight.exp_avg").scalar_type();
    CHECK(type == (format == "bf16" ? torch::kBFloat16 : torch::kByte));
    trainer.run({.steps = 6});
    Trainer fresh(fresh_model, config, noise_source);
    fresh.resume(saved, "last.pt");
    fresh.run({.steps = 6});
    check_equal(fresh.state().model, trainer.state().model);
    check_equal(fresh.state().optimizer, trainer.state().optimizer);

    config.training.optimizer_state = "full";
    Trainer other(TinySeparator(400), config, noise_source);
    const Error error = error_of([&] { other.resume(saved, "last.pt"); });
    CHECK(error.id() == "headroom.training.state.structure");
    CHECK(contains(error.what(), "first.weight.exp_avg"));
  }
}

TEST_CASE("a step is AdamW's, without weight decay on norms and biases") {
  Config config = tiny_config();
  config.training.weight_decay = 0.5;
  config.training.betas = {0.8, 0.9};
  auto [model, trainer] = make_trainer(config);
  const TensorMap before = copies_of(tensors_of(*model));
  trainer.step(0.01);
  for (const auto& parameter : model->named_parameters()) {
    INFO(parameter.key());
    // First step: moments are (1-β)·g and (1-β)·g², after bias correction g and g²
    const torch::Tensor g = parameter.value().grad();
    const double decay = parameter.value().dim() >= 2 ? 0.5 : 0.0;
    const torch::Tensor expected = before.at(parameter.key()) * (1 - 0.01 * decay) - 0.01 * g / (g.abs() + 1e-8);
    CHECK(torch::allclose(parameter.value(), expected, 1e-5, 1e-6));
  }
}

TEST_CASE("bf16 runs the forward pass in bfloat16 and leaves autocast as it was") {
  Config config = tiny_config();
  config.training.bf16 = true;
  torch::manual_seed(7);
  TinySeparator model(6, 0.0);
  torch::ScalarType seen = torch::kFloat;
  const auto watch = [&](const torch::Tensor& estimate, const torch::Tensor& stems) {
    seen = estimate.scalar_type();
    return (estimate - stems).abs().mean();
  };
  Trainer trainer(model, config, noise_source, watch);
  const double loss = trainer.step(0.0);
  CHECK(seen == torch::kFloat);  // the loss is computed in float …
  const Example example = noise_source(0, 2);
  const double exact = (model->forward(example.mixture) - example.stems).abs().mean().item<double>();
  CHECK(loss == Approx(exact).epsilon(0.01));
  CHECK(loss != exact);  // … of an estimate that was rounded
  CHECK_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
  CHECK(model->first->weight.scalar_type() == torch::kFloat);
  CHECK(model->first->weight.grad().scalar_type() == torch::kFloat);
}

TEST_CASE("where nothing is skipped a loss that is not finite stops the run before it changes anything") {
  const TemporaryFolder folder;
  Config config = tiny_config();
  config.training.skip_non_finite = 0;
  torch::manual_seed(7);
  TinySeparator model;
  Trainer trainer(model, config, with_bad_examples(13, 14));
  TensorMap before;
  const Error error = error_of([&] {
    trainer.run({.folder = folder.path(), .on_step = [&](const StepReport& p) {
                   if (p.step == 6) before = copies_of(trainer.state().model);
                 }});
  });
  CHECK(error.id() == "headroom.training.non_finite");
  CHECK(contains(error.what(), "the loss is nan at step 7, examples 12 to 13"));
  check_equal(before, trainer.state().model);
  CHECK(load_state(folder / "last.pt").step == 4);
  CHECK(load_state(folder / "best.pt").step == 4);
}

TEST_CASE("best.pt is the epoch with the best validation, or without one the least loss") {
  const TemporaryFolder folder;
  Config config = tiny_config();
  config.training.validation_every = 2;
  auto [model, trainer] = make_trainer(config);
  std::vector<double> scores = {1.0, 5.0, 3.0};
  std::size_t asked = 0;
  const Summary summary =
      trainer.run({.steps = 24, .folder = folder.path(), .validate = [&] { return scores.at(asked++); }});
  CHECK(asked == 3);  // after epochs 2, 4, 6
  CHECK(summary.validation == 3.0);
  CHECK(summary.best_metric == "validation nSDR");
  CHECK(summary.best_score == 5.0);
  CHECK(load_state(folder / "best.pt").step == 16);
  CHECK(load_state(folder / "last.pt").step == 24);
  CHECK(load_state(folder / "last.pt").best_score == 5.0);
}

TEST_CASE("a run ends early after validations that are no better, also when it is stopped and resumed in between") {
  Config config = tiny_config();
  config.training.epochs = 12;
  config.training.patience = 3;
  const std::vector<double> scores = {1, 5, 3, 5, 6, 2, 6, 4, 9};  // 6 is the best before three others
  const auto run = [&](Trainer& trainer, const TemporaryFolder& folder, int64_t stop_after) {
    int64_t now = 0;
    return trainer.run({.folder = folder.path(),
                        .validate = [&] { return scores.at(static_cast<std::size_t>(now / 4 - 1)); },
                        .on_step = [&](const StepReport& report) { now = report.step; },
                        .stop_requested = [&] { return now == stop_after; }});
  };
  const TemporaryFolder whole, parts;
  auto [model, trainer] = make_trainer(config);
  const Summary summary = run(trainer, whole, -1);
  CHECK(summary.steps == 8 * 4);
  CHECK(summary.out_of_patience);
  CHECK_FALSE(summary.stopped);
  CHECK(summary.best_score == 6);
  CHECK(load_state(whole / "best.pt").step == 5 * 4);
  CHECK(load_state(whole / "best.pt").validations_since_best == 0);
  Summary last;
  for (const int64_t stop_after : {26, 28, -1}) {  // within an epoch, at the end of one, never
    auto [fresh_model, fresh] = make_trainer(config);
    if (stop_after != 26) fresh.resume(load_state(parts / "last.pt"), "last.pt");
    last = run(fresh, parts, stop_after);
  }
  CHECK(last.steps == summary.steps);
  CHECK(last.out_of_patience);
  check_equal(load_state(parts / "last.pt").model, load_state(whole / "last.pt").model);

  // Out of patience it stays at its end, and goes on with more
  auto [again_model, again] = make_trainer(config);
  again.resume(load_state(parts / "last.pt"), "last.pt");
  CHECK(run(again, parts, -1).steps == summary.steps);
  config.training.patience = 4;
  auto [patient_model, patient] = make_trainer(config);
  patient.resume(load_state(parts / "last.pt"), "last.pt");
  const Summary more = run(patient, parts, 36);
  CHECK(more.steps == 36);
  CHECK(more.best_score == 9);

  // What another metric waited for counts for nothing
  config.training.best_metric = "si_sdr";
  auto [other_model, other] = make_trainer(config);
  other.resume(load_state(whole / "last.pt"), "last.pt");
  CHECK(run(other, whole, 36).steps == 36);
}

TEST_CASE("a step tells its loss, the norm of its gradient and what its phases took") {
  Config config = tiny_config();
  config.training.gradient_accumulation_steps = 2;
  auto [model, trainer] = make_trainer(config);
  std::vector<StepReport> reports;
  const Summary summary = trainer.run({.steps = 4, .on_step = [&](const StepReport& p) { reports.push_back(p); }});
  double sum = 0;
  for (const StepReport& report : reports) {
    sum += report.step_loss;
    CHECK(report.loss == Approx(sum / static_cast<double>(report.step)));
    CHECK(report.examples == 4);
    CHECK(report.gradient_norm.value() > 0);
    std::vector<std::string> names;
    double seconds = 0;
    for (const PhaseUse& use : report.phases) {
      names.push_back(use.name);
      seconds += use.seconds;
      CHECK(use.peak_bytes > 0);
      CHECK(use.peak_bytes <= report.peak_bytes);
    }
    CHECK(names == std::vector<std::string>{"data", "forward", "loss", "backward", "optimizer"});
    CHECK(seconds <= report.seconds);
    const auto bytes = [&](std::size_t phase) { return report.phases[phase].peak_bytes; };
    CHECK(bytes(0) < bytes(1));  // activations
    CHECK(bytes(1) < bytes(3));  // gradients
  }
  const auto highest = std::ranges::max(summary.phases, {}, &PhaseUse::peak_bytes);
  CHECK(highest.peak_bytes == summary.peak_bytes);
  CHECK(highest.name == "backward");
}

TEST_CASE("a run that is resumed for a time goes on at the pace and the learning rate of its schedule") {
  Config config = tiny_config();
  config.training.min_learning_rate_ratio = 0;
  auto [model, trainer] = make_trainer(config);
  double now = 100;
  std::vector<double> rates;
  const auto on_step = [&](const StepReport& p) {
    rates.push_back(p.learning_rate);
    now += 0.5;
  };
  const RunOptions options{.seconds = 10.0, .on_step = on_step, .clock = [&] { return now; }};
  REQUIRE(trainer.run(options).steps == 20);
  const TrainingState state = trainer.state();
  CHECK(state.seconds_per_step == Approx(0.5));
  auto [again, resumed] = make_trainer(config);
  resumed.resume(state, "state");
  rates.clear();
  REQUIRE(resumed.run(options).steps == 40);
  const Schedule schedule{.learning_rate = 0.01, .warmup_steps = 2, .min_ratio = 0};
  for (int step = 0; step < 20; ++step) CHECK(rates[step] == Approx(learning_rate_at(schedule, 20 + step, 40)));

  // A run that was not limited by time has no pace; what is left on disk must not depend on the clock
  auto [third, steps] = make_trainer(config);
  steps.run({.steps = 20, .on_step = on_step, .clock = [&] { return now; }});
  CHECK(steps.state().seconds_per_step == 0);
  rates.clear();
  steps.run(options);
  CHECK(rates[0] < 0.0001);
  CHECK(rates[1] == Approx(learning_rate_at(schedule, 21, 40)));
}

TEST_CASE("a time budget ends the run and takes the learning rate to its end") {
  Config config = tiny_config();
  config.training.min_learning_rate_ratio = 0;
  auto [model, trainer] = make_trainer(config);
  double now = 100;
  std::vector<double> rates;
  const auto on_step = [&](const StepReport& p) {
    rates.push_back(p.learning_rate);
    now += p.step <= 10 ? 0.5 : 1.0;  // the machine gets busy: 5 s for 10 steps, then 1 s a step
  };
  const Summary summary = trainer.run({.seconds = 15.0, .on_step = on_step, .clock = [&] { return now; }});
  CHECK(summary.steps == 20);
  CHECK(summary.seconds == 15.0);
  CHECK_FALSE(summary.stopped);
  const Schedule schedule{.learning_rate = 0.01, .warmup_steps = 2, .min_ratio = 0};
  REQUIRE(rates.size() == 20);
  CHECK(rates[1] == Approx(0.01));
  CHECK(rates[9] == Approx(learning_rate_at(schedule, 9, 30)));    // it looked like 30 steps
  CHECK(rates[19] == Approx(learning_rate_at(schedule, 19, 20)));  // and became 20: 19 steps in 14 s of 15
  CHECK(rates[19] < 0.0002);
  // The number of steps is an end too
  CHECK(trainer.run({.steps = 21, .seconds = 100.0, .clock = [&] { return now; }}).steps == 21);
}

TEST_CASE("the trainer trains the time-frequency transformer") {
  const TemporaryFolder folder;
  const Config config = tiny_config();
  torch::manual_seed(0);
  models::TimeFrequencyTransformer model(model_options(config));
  Trainer trainer(model, config, noise_source);
  const Summary summary = trainer.run({.steps = 8, .folder = folder.path()});
  CHECK(summary.epoch_losses[1] < summary.epoch_losses[0]);
  LoadedModel loaded = load_model(folder / "last.pt");
  model->eval();
  const torch::Tensor mixture = noise_source(50, 1).mixture;
  CHECK(loaded.model(mixture).equal(model->forward(mixture)));
}

TEST_CASE("a run that is resumed with longer or shorter epochs has true means") {
  Config config = tiny_config();
  config.training.steps_per_epoch = 5;
  std::vector<double> losses;  // of each step
  double sum = 0;
  const auto on_step = [&](const StepReport& p) {
    const double before = p.epoch_step == 1 ? 0 : sum;
    sum = p.loss * static_cast<double>(p.epoch_step);
    losses.push_back(sum - before);
  };
  const auto mean = [&](std::size_t first, std::size_t last) {
    return std::accumulate(losses.begin() + static_cast<std::ptrdiff_t>(first),
                           losses.begin() + static_cast<std::ptrdiff_t>(last), 0.0) /
           static_cast<double>(last - first);
  };
  auto [model, first] = make_trainer(config);
  first.run({.steps = 12, .on_step = on_step});
  const TrainingState at_twelve = first.state();
  CHECK(at_twelve.unfinished_steps == 2);
  TrainingState of_older_version = at_twelve;
  of_older_version.unfinished_steps = -1;

  config.training.steps_per_epoch = 50;
  auto [other_model, longer] = make_trainer(config);
  const auto changes = longer.resume(of_older_version, "last.pt");
  REQUIRE(changes.size() == 1);
  CHECK(describe(changes[0]) == "training.steps_per_epoch: 5 became 50");
  std::vector<int64_t> epochs, steps;
  const Summary summary = longer.run({.steps = 14, .on_step = [&](const StepReport& p) {
                                        on_step(p);
                                        epochs.push_back(p.epoch);
                                        steps.push_back(p.epoch_step);
                                      }});
  CHECK(epochs == std::vector<int64_t>{3, 3});
  CHECK(steps == std::vector<int64_t>{3, 4});
  REQUIRE(summary.epoch_losses.size() == 3);
  CHECK(summary.epoch_losses[1] == Approx(mean(5, 10)));
  CHECK(summary.epoch_losses[2] == Approx(mean(10, 14)));
  CHECK(summary.best_score == Approx(std::min({mean(0, 5), mean(5, 10), mean(10, 14)})));

  config.training.steps_per_epoch = 2;  // the epoch under way has as many already
  auto [last_model, shorter] = make_trainer(config);
  shorter.resume(longer.state(), "last.pt");
  const auto shorter_losses = shorter.run({.steps = 17, .on_step = on_step}).epoch_losses;
  REQUIRE(shorter_losses.size() == 4);
  CHECK(shorter_losses[2] == Approx(mean(10, 15)));
  CHECK(shorter_losses[3] == Approx(mean(15, 17)));
}

TEST_CASE("a run is not resumed as another model, with every reason; what else changed is told") {
  const Config config = tiny_config();
  auto [model, trainer] = make_trainer(config);
  trainer.run({.steps = 5});
  const TrainingState state = trainer.state();
  const auto refused = [&](auto&& change) {
    Config other = config;
    change(other);
    auto [fresh_model, fresh] = make_trainer(other);
    const TensorMap before = copies_of(tensors_of(*fresh_model));
    const Error error = error_of([&, &fresh = fresh] { fresh.resume(state, "runs/last.pt"); });
    CHECK(error.id() == "headroom.training.state.config");
    CHECK(contains(error.what(), "runs/last.pt was trained as another model"));
    check_equal(before, tensors_of(*fresh_model));
    return std::string(error.what());
  };
  const std::string several = refused([](Config& c) {
    transformer(c).n_heads(4);
    transformer(c).hop_length(16);
    transformer(c).reversible(true);
    c.audio.sample_rate = 48000;
    c.training.learning_rate = 1;
  });
  for (const char* part : {"\n  model.n_heads: 2 became 4", "\n  model.hop_length: 32 became 16",
                           "\n  model.reversible: false became true", "\n  audio.sample_rate: 44100 became 48000"}) {
    CHECK(contains(several, part));
  }
  CHECK_FALSE(contains(several, "learning_rate"));
  CHECK(contains(refused([](Config& c) { std::swap(c.audio.stems[0], c.audio.stems[1]); }),
                 R"(audio.stems: ["vocals","drums","bass","other"] became ["drums","vocals","bass","other"])"));
  CHECK(contains(refused([](Config& c) { c.audio.stems[3] = "rest"; }), R"("bass","rest"])"));

  Config other = config;
  other.training.learning_rate = 0.02;
  other.model.gradient_checkpointing = true;
  auto [fresh_model, fresh] = make_trainer(other);
  const auto changes = fresh.resume(state, "last.pt");
  REQUIRE(changes.size() == 2);
  CHECK(describe(changes[0]) == "model.gradient_checkpointing: false became true");
  CHECK(describe(changes[1]) == "training.learning_rate: 0.01 became 0.02");
  CHECK(fresh.state().best_metric == "training loss");
  CHECK(fresh.state().unfinished_steps == 1);
}

TEST_CASE("losses and scores of another kind are not compared with those of before") {
  const Config config = tiny_config();
  auto [model, trainer] = make_trainer(config);
  trainer.run({.steps = 5});
  const auto after = [&](const TrainingState& state, auto&& change) {
    Config other = config;
    change(other);
    auto [fresh_model, fresh] = make_trainer(other);
    fresh.resume(state, "last.pt");
    return fresh.state();
  };
  const TrainingState by_loss = trainer.state();
  const TrainingState other_loss = after(by_loss, [](Config& c) { c.loss.stft_weight = 100; });
  CHECK(other_loss.best_metric.empty());
  CHECK(other_loss.unfinished_steps == 0);
  CHECK(other_loss.unfinished_loss == 0);
  CHECK(after(by_loss, [](Config& c) { c.data.path = "moved"; }).best_metric == "training loss");
  TrainingState by_score = by_loss;
  by_score.best_metric = "validation nSDR";
  CHECK(after(by_score, [](Config& c) { c.loss.stft_weight = 100; }).best_metric == "validation nSDR");
  by_score.validations_since_best = 2;
  CHECK(after(by_score, [](Config& c) { c.training.validation_segments = 3; }).best_metric.empty());
  CHECK(after(by_score, [](Config& c) { c.training.validation_segments = 3; }).validations_since_best == 0);
  CHECK(after(by_score, [](Config& c) { c.training.validation = "tracks"; }).best_metric.empty());
  CHECK(after(by_score, [](Config& c) { c.inference.overlap = 0.5; }).validations_since_best == 2);
}

TEST_CASE("a state without a random generator's state is refused before anything changes") {
  const Config config = tiny_config();
  auto [model, trainer] = make_trainer(config);
  for (const torch::Tensor& random : {torch::Tensor(), torch::zeros({3}), torch::zeros({5056}, torch::kByte)}) {
    TrainingState state = trainer.state();
    state.random = random;
    const torch::Tensor before = random_state();
    const Error error = error_of([&, &t = trainer] { t.resume(state, "last.pt"); });
    CHECK(error.id() == "headroom.training.state.random");
    CHECK(contains(error.what(), "last.pt holds no state"));
    CHECK_FALSE(contains(error.what(), "\n"));
    CHECK(random_state().equal(before));
  }
}

TEST_CASE("a step whose loss is not finite is skipped and told: parameters, buffers and optimizer stay") {
  for (const int64_t accumulation : {1, 2}) {
    CAPTURE(accumulation);
    Config config = tiny_config();
    config.training.batch_size = 2 / accumulation;
    config.training.gradient_accumulation_steps = accumulation;
    torch::manual_seed(7);
    TinySeparator model;
    const Loss loss = [&](const torch::Tensor& estimate, const torch::Tensor& stems) {
      const torch::NoGradGuard guard;
      if (!torch::isfinite(estimate).all().item<bool>()) model->scale.fill_(5);  // as running means would be spoiled
      const torch::AutoGradMode gradients(true);
      return (estimate - stems).abs().mean();
    };
    Trainer trainer(model, config, with_bad_examples(13, 14), loss);  // the last of step 7
    std::vector<std::string> notices;
    std::vector<TrainingState> states;
    std::vector<double> means;
    const Summary summary = trainer.run({.steps = 8,
                                         .on_step =
                                             [&](const StepReport& p) {
                                               states.push_back(trainer.state());
                                               states.back().model = copies_of(states.back().model);
                                               states.back().optimizer = copies_of(states.back().optimizer);
                                               means.push_back(p.loss);
                                               CHECK(p.skipped_steps == (p.step < 7 ? 0 : 1));
                                               CHECK(p.gradient_norm.has_value() == (p.step != 7));
                                             },
                                         .on_notice = [&](const std::string& text) { notices.push_back(text); },
                                         .origin = [](int64_t i) { return "song " + std::to_string(i); }});
    REQUIRE(states.size() == 8);
    check_equal(states[6].model, states[5].model);
    check_equal(states[6].optimizer, states[5].optimizer);
    CHECK(states[6].examples == 14);
    CHECK(states[6].skipped_in_a_row == 1);
    CHECK(states[7].skipped_in_a_row == 0);
    CHECK(states[7].optimizer.at("first.weight.step").item<int64_t>() == 7);
    CHECK_FALSE(states[7].model.at("first.weight").equal(states[6].model.at("first.weight")));
    CHECK(means[6] == means[5]);  // the mean is one of the steps that were taken
    CHECK(std::isfinite(summary.epoch_losses.at(1)));
    CHECK(summary.skipped_steps == 1);
    REQUIRE(notices.size() == 1);
    CHECK(contains(notices[0], "this step is skipped: the loss is nan at step 7, examples " +
                                   std::string(accumulation == 1 ? "12" : "13") + " to 13; not finite: "));
    CHECK(contains(notices[0], "the mixture of example 13, the estimate of example 13; example 13: song 13"));
  }
}

TEST_CASE("a step whose gradient is not finite is skipped; too many in a row stop the run with what is known") {
  Config config = tiny_config();
  config.training.skip_non_finite = 3;
  torch::manual_seed(7);
  TinySeparator model(6, 0.0);
  int64_t now = 0;
  const auto bad = [&] { return now == 2 || now == 3 || now >= 6; };
  const Loss loss = [&](const torch::Tensor& estimate, const torch::Tensor& stems) {
    const torch::Tensor usual = (estimate - stems).abs().mean();
    return bad() ? usual + (model->last->bias * 0).sqrt().sum() : usual;  // 0, and a slope that is infinite times 0
  };
  Trainer trainer(model, config, noise_source, loss);
  TensorMap before;
  std::vector<int64_t> in_a_row;
  const Error error = error_of([&] {
    trainer.run({.on_step =
                     [&](const StepReport& p) {
                       in_a_row.push_back(trainer.state().skipped_in_a_row);
                       if (p.step == 6) before = copies_of(trainer.state().model);
                       now = p.step;
                     },
                 .origin = [](int64_t i) { return "song " + std::to_string(i); }});
  });
  CHECK(error.id() == "headroom.training.non_finite");
  CHECK(in_a_row == std::vector<int64_t>{0, 0, 1, 2, 0, 0, 1, 2, 3});
  CHECK(contains(error.what(),
                 "the gradient norm is nan at step 10, examples 18 to 19; not finite: the gradient of "
                 "last.bias; example 18: song 18, 19: song 19; the 3 steps before it were skipped"));
  check_equal(before, trainer.state().model);
  CHECK(trainer.state().step == 9);
  CHECK(trainer.state().skipped_steps == 5);
  CHECK(trainer.state().optimizer.at("first.weight.step").item<int64_t>() == 4);
}

TEST_CASE("parameters that are not finite are named") {
  const Config config = tiny_config();
  auto [model, trainer] = make_trainer(config);
  std::string notice;
  {
    const torch::NoGradGuard guard;
    model->norm->weight[2] = std::numeric_limits<double>::infinity();
  }
  trainer.run({.steps = 1, .on_notice = [&](const std::string& text) { notice = text; }});
  CHECK(
      contains(notice, "not finite: the parameter norm.weight, the estimate of example 0, the estimate of example 1"));
}

TEST_CASE("a run stopped at random steps and resumed leaves the files of one that was not, byte for byte") {
  std::mt19937 random(5);
  const auto draw = [&](int least, int most) { return std::uniform_int_distribution(least, most)(random); };
  for (int round = 0; round < 12; ++round) {
    CAPTURE(round);
    Config config = tiny_config();
    config.training.batch_size = draw(1, 3);
    config.training.gradient_accumulation_steps = draw(1, 2);
    config.training.steps_per_epoch = draw(1, 5);
    config.training.checkpoint_every_steps = draw(0, 3);
    config.training.optimizer_state = round % 2 == 0 ? "full" : "8bit";
    config.training.bf16 = draw(0, 1) == 1;
    config.training.split_on_out_of_memory = draw(0, 1) == 1;
    config.training.warmup_steps = draw(0, 1);
    config.training.validation_every = draw(1, 2);
    const int64_t bad = draw(0, 20), width = round % 2 == 0 ? 6 : 400;
    const auto make = [&](auto&& use) {
      torch::manual_seed(7);
      const TinySeparator model(width);
      Trainer trainer(model, config, with_bad_examples(bad, bad + 4));
      const auto validate = [&] { return model->norm->weight.sum().item<double>(); };
      use(trainer, RunOptions{.steps = 10, .validate = round % 3 == 0 ? std::function<double()>(validate) : nullptr});
    };
    const TemporaryFolder whole, parts;
    make([&](Trainer& trainer, RunOptions options) {
      options.folder = whole.path();
      trainer.run(options);
    });
    for (int64_t done = 0; done < 10;) {
      make([&](Trainer& trainer, RunOptions options) {
        if (done > 0) {
          torch::rand({draw(1, 100)});  // what this process has drawn before counts for nothing
          trainer.resume(find_state(parts.path()).state, "last.pt");
        }
        const int64_t stop_at = done + draw(1, 10);
        options.folder = parts.path();
        options.on_step = [&](const StepReport& p) { done = p.step; };
        options.stop_requested = [&] { return done >= stop_at; };
        trainer.run(options);
      });
    }
    for (const char* name : {"last.pt", "best.pt", "last.safetensors", "best.safetensors"}) {
      INFO(name);
      const bool same = testing::read_bytes(whole / name) == testing::read_bytes(parts / name);
      CHECK(same);
    }
  }
}

TEST_CASE("everything in a state comes back from a resume, byte for byte") {
  const TemporaryFolder folder;
  Config config = tiny_config();
  config.training.split_on_out_of_memory = true;
  auto [model, trainer] = make_trainer(config);
  trainer.run({.steps = 7});
  TrainingState state = trainer.state();
  state.examples = 1001;
  state.unfinished_skipped = 1;
  state.skipped_steps = 12;
  state.skipped_in_a_row = 4;
  state.microbatch = 1;
  state.seconds_per_step = 0.25;
  save_state(folder / "a.pt", state);
  auto [fresh_model, fresh] = make_trainer(config);
  fresh.resume(load_state(folder / "a.pt"), "a.pt");
  save_state(folder / "b.pt", fresh.state());
  CHECK(testing::read_bytes(folder / "a.pt") == testing::read_bytes(folder / "b.pt"));
}

TEST_CASE("states are saved by steps and by minutes, within epochs too, and the last ones are kept") {
  const TemporaryFolder folder;
  Config config = tiny_config();  // 4 steps an epoch
  config.training.checkpoint_every = 100;
  config.training.checkpoint_every_steps = 3;
  config.training.checkpoints_kept = 3;
  auto [model, trainer] = make_trainer(config);
  double now = 0;
  const auto steps_saved = [&] {
    std::vector<int64_t> steps;
    for (int64_t age = 0; std::filesystem::exists(folder / last_state_name(age)); ++age) {
      steps.push_back(load_state(folder / last_state_name(age)).step);
    }
    return steps;
  };
  const RunOptions options{.steps = 11,
                           .folder = folder.path(),
                           .on_step = [&](const StepReport&) { now += 30; },
                           .clock = [&] { return now; }};
  trainer.run(options);
  CHECK(steps_saved() == std::vector<int64_t>{11, 9, 6});  // 3 went

  config.training.checkpoint_every_steps = 0;
  config.training.checkpoint_every_minutes = 1;
  auto [other_model, by_time] = make_trainer(config);
  by_time.resume(load_state(folder / "last.pt"), "last.pt");
  RunOptions longer = options;
  longer.steps = 16;
  by_time.run(longer);
  CHECK(steps_saved() == std::vector<int64_t>{16, 15, 13});  // every second step
}

TEST_CASE("a folder that cannot take the states of a run is told before the first step") {
  const TemporaryFolder folder;
  const Config config = tiny_config();
  auto [model, trainer] = make_trainer(config);
  const RunOptions options{.steps = 1, .folder = folder.path()};
  const Error error = [&, &t = trainer] {
    const testing::FileSizeLimit limit(4096);
    return error_of([&] { t.run(options); });
  }();
  CHECK(error.id() == "headroom.training.state.room");
  CHECK(contains(error.what(), folder.path().string() + " cannot take the saved states of the run, 3 of "));
  CHECK(contains(error.what(), "File too large"));
  CHECK(trainer.state().step == 0);
  CHECK(folder.names().empty());

  // What is planned before the optimizer knows anything holds what is written
  const std::uint64_t planned = Updates(*model, config).file_bytes(trainer.state());
  trainer.run(options);
  CHECK(std::filesystem::file_size(folder / "last.pt") <= planned);
  CHECK(std::filesystem::file_size(folder / "last.pt") + (1 << 19) > planned);
  CHECK(std::filesystem::file_size(folder / "last.safetensors") <= file_bytes(trainer.state().model));
}

TEST_CASE("examples whose files fail are drawn anew, the same ones in any batches, and each file is told once") {
  const auto fails = [](int64_t index) { return index % 3 == 1; };
  const BatchSource broken = [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      require(!fails(i), "headroom.audio.file.truncated", "\"a.wav\" ends at frame ", i);
    }
    const torch::Tensor values = torch::arange(first, first + count, torch::kDouble).view({count, 1, 1});
    return Example{values.expand({count, 2, 8}), values.unsqueeze(1).expand({count, 4, 2, 8})};
  };
  std::vector<std::string> notices;
  Redraw redraw(broken, [&](const std::string& text) { notices.push_back(text); });
  const Example all = redraw(0, 6);
  for (int64_t i = 0; i < 6; ++i) {
    const Example one = redraw(i, 1);
    CHECK(one.stems[0].equal(all.stems[i]));
    CHECK(one.mixture[0].equal(all.mixture[i]));
    CHECK(one.mixture[0][0][0].item<double>() == static_cast<double>(redraw.drawn_as(i)));
    CHECK((redraw.drawn_as(i) == i) == !fails(i));
  }
  REQUIRE(notices.size() == 1);
  CHECK(contains(notices[0], "\"a.wav\" ends at frame 1. The track is left out"));

  Redraw all_broken([](int64_t, int64_t) -> Example { fail("headroom.audio.file.missing", "\"b.wav\""); }, {});
  CHECK(error_of([&] { all_broken(0, 1); }).id() == "headroom.audio.file.missing");
  Redraw other_error([](int64_t, int64_t) -> Example { fail("headroom.training.dataset.options", "x"); }, {});
  CHECK(error_of([&] { other_error(0, 1); }).id() == "headroom.training.dataset.options");
}
