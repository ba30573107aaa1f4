#include "headroom/training/updates.hpp"

#include <torch/torch.h>

#include <cmath>
#include <string>
#include <vector>

#include "headroom/memory/meter.hpp"
#include "headroom/models/time_frequency_transformer.hpp"
#include "headroom/training/load_model.hpp"
#include "headroom/training/trainer.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/one_thread.hpp"
#include "support/tensors.hpp"
#include "support/tiny_training.hpp"

using namespace headroom;
using namespace headroom::training;
using headroom::testing::check_equal;
using headroom::testing::contains;
using headroom::testing::copies_of;
using headroom::testing::error_of;
using headroom::testing::noise_source;
using headroom::testing::TemporaryFolder;
using headroom::testing::tiny_config;
using torch::Tensor;

namespace {

Config transformer_config() {
  return tiny_config({{"model", {{"emb_dim", 16}}}, {"training", {{"steps_per_epoch", 3}}}});
}

/// A trainer of the transformer of a configuration, which begins the same way each time.
struct TransformerRun {
  explicit TransformerRun(const Config& config)
      : model((torch::manual_seed(7), model_options(config))), trainer(model, config, noise_source) {}
  models::TimeFrequencyTransformer model;
  Trainer trainer;
};

void check_same(const TrainingState& a, const TrainingState& b) {
  CHECK(a.step == b.step);
  CHECK(a.epoch_losses == b.epoch_losses);
  CHECK(a.plateau.lowered == b.plateau.lowered);
  CHECK(a.plateau.waited == b.plateau.waited);
  check_equal(a.model, b.model);
  check_equal(a.optimizer, b.optimizer);
  check_equal(a.lora, b.lora);
  check_equal(a.ema, b.ema);
}

}  // namespace

TEST_CASE("whatever trains, a run that is stopped and resumed ends bit-equal to one that was not") {
  const auto with = [](auto&& change) {
    Config config = transformer_config();
    change(config);
    return config;
  };
  std::vector<Config> configs;
  for (const char* optimizer : {"adamw", "radam", "muon", "prodigy", "sgd"}) {
    configs.push_back(with([&](Config& c) {
      c.training.optimizer = optimizer;
      c.training.schedule = optimizer == std::string("sgd") ? "plateau" : "linear";
      c.training.plateau_patience = 0;
      c.training.ema_decay = 0.8;
      if (optimizer == std::string("prodigy")) c.training.learning_rate = 1;
    }));
  }
  configs.push_back(with([](Config& c) { c.training.freeze = {"encoder.*"}; }));
  configs.push_back(with([](Config& c) {
    c.lora.rank = 2;
    c.training.ema_decay = 0.8;
  }));
  for (const Config& config : configs) {
    CAPTURE(config.training.optimizer, config.lora.rank, config.training.freeze.size());
    const TemporaryFolder folder;
    const auto validated = [&](int64_t& now) {
      return RunOptions{.folder = folder.path(), .validate = [&now] { return now < 5 ? 1.0 + now : 0.0; }};
    };
    int64_t step = 0;
    TransformerRun whole(config);
    RunOptions options = validated(step);
    options.on_step = [&](const StepReport& report) { step = report.step; };
    whole.trainer.run(options);
    const TrainingState expected = load_state(folder / "last.pt");
    for (const int64_t stop : {4, 9}) {
      TransformerRun part(config);
      if (stop > 4) part.trainer.resume(load_state(folder / "last.pt"), "last.pt");
      torch::manual_seed(99);
      options.stop_requested = [&, stop] { return step == stop; };
      part.trainer.run(options);
    }
    check_same(load_state(folder / "last.pt"), expected);
    CHECK(expected.ema.empty() == (config.training.ema_decay == 0));
    CHECK((expected.plateau.lowered > 0) == (config.training.schedule == "plateau"));
  }
}

TEST_CASE("a state is not resumed with another optimizer") {
  Config config = transformer_config();
  TransformerRun run(config);
  run.trainer.step(0.01);
  config.training.optimizer = "sgd";
  TransformerRun other(config);
  const Error error = error_of([&] { other.trainer.resume(run.trainer.state(), "last.pt"); });
  CHECK(error.id() == "headroom.training.state.structure");
  CHECK(contains(error.what(), "momentum_buffer"));
}

TEST_CASE("averages of weights follow them, take one copy, and are what is validated and exported") {
  Config config = transformer_config();
  config.training.ema_decay = 0.75;
  TransformerRun run(config);
  TensorMap expected;
  for (const auto& p : run.model->named_parameters()) expected.emplace(p.key(), p.value().detach().to(torch::kDouble));
  for (int step = 0; step < 6; ++step) {
    run.trainer.step(0.01);
    for (const auto& p : run.model->named_parameters()) {
      expected[p.key()] = 0.75 * expected[p.key()] + 0.25 * p.value().detach();
    }
  }
  const TrainingState state = run.trainer.state();
  REQUIRE(state.ema.size() == expected.size());
  for (const auto& [name, average] : expected) {
    CHECK(torch::allclose(state.ema.at(name).to(torch::kDouble), average, 1e-5, 1e-7));
    CHECK_FALSE(state.ema.at(name).equal(state.model.at(name)));
  }

  MemoryMeter meter;
  std::optional<WeightAverage> average;
  int64_t bytes = 0;
  for (const Tensor& p : run.model->parameters()) bytes += p.nbytes();
  CHECK(meter.measure([&] { average.emplace(*run.model, 0.9); }).held() == Approx(bytes).epsilon(0.05));
  CHECK(meter.measure([&] { average->update(); }).added_peak() == 0);
  const TensorMap before = copies_of(tensors_of(*run.model));
  CHECK(meter
            .measure([&] {
              const WeightAverage::InUse in_use(*average);
              for (const auto& [name, tensor] : average->tensors())
                CHECK(tensors_of(*run.model).at(name).equal(tensor));
            })
            .added_peak() == 0);
  check_equal(tensors_of(*run.model), before);

  const TemporaryFolder folder;
  TensorMap seen;
  run.trainer.run({.steps = 9, .folder = folder.path(), .validate = [&] {
                     seen = copies_of(tensors_of(*run.model));
                     return 1.0;
                   }});
  const TrainingState end = run.trainer.state();
  for (const auto& [name, tensor] : end.ema) CHECK(seen.at(name).equal(tensor));
  check_equal(weights::load_tensors(folder / "last.safetensors"), exported_tensors(end));
  check_equal(tensors_of(*load_model(folder / "last.pt").model), exported_tensors(end));
  check_equal(tensors_of(*load_model({.weights = folder / "last.pt", .averaged = false}).model), end.model);
  testing::write_bytes(folder / "beside.json", end.config);
  const auto beside = [&](bool averaged) {
    return load_model({.weights = folder / "last.pt", .config = folder / "beside.json", .averaged = averaged});
  };
  check_equal(tensors_of(*beside(true).model), exported_tensors(end));
  check_equal(tensors_of(*beside(false).model), end.model);
  const Error error = error_of([&] { load_model({.weights = folder / "last.safetensors", .averaged = false}); });
  CHECK(error.id() == "headroom.training.raw_weights");

  // A state without averages: they begin with its weights
  TrainingState plain = end;
  plain.ema.clear();
  TransformerRun fresh(config);
  fresh.trainer.resume(plain, "last.pt");
  for (const auto& [name, tensor] : fresh.trainer.state().ema) CHECK(tensor.equal(end.model.at(name)));
}

TEST_CASE("weights for whose averages there is no memory stay as they are") {
  torch::nn::Sequential model(torch::nn::Linear(8, 8), torch::nn::Linear(8, 8));
  model->to(torch::kBFloat16);  // the averages are in float, what is used is a copy
  const WeightAverage average(*model, 0.5);
  {
    const torch::NoGradGuard guard;
    for (const Tensor& parameter : model->parameters()) parameter.add_(1);
  }
  std::vector<Tensor> weights;
  for (const Tensor& parameter : model->parameters()) weights.push_back(parameter.detach().clone());
  for (const int64_t spared : {0, 1, 3}) {
    MemoryMeter meter;
    meter.fail_allocation(spared);
    CHECK_THROWS_AS(WeightAverage::InUse(average), c10::OutOfMemoryError);
    for (size_t i = 0; i < weights.size(); ++i) CHECK(torch::equal(model->parameters()[i], weights[i]));
  }
  const WeightAverage::InUse in_use(average);
  CHECK_FALSE(torch::equal(model->parameters()[0], weights[0]));
}

TEST_CASE("patterns: stars and question marks; one that stands for no parameter is told with the nearest names") {
  CHECK(matches("*", "a.b"));
  CHECK(matches("encoder.*.weight", "encoder.0.norm.weight"));
  CHECK(matches("a?c*", "abc"));
  CHECK(matches("*b*b", "abcb"));
  CHECK_FALSE(matches("encoder", "encoder.weight"));
  CHECK_FALSE(matches("*.bias", "a.weight"));
  CHECK_FALSE(matches("?", ""));
  const std::vector<std::string> names{"encoder.0.weight", "encoder.0.bias", "decoder.weight", "norm.gamma"};
  CHECK(matching_names({"*.bias", "norm.gamma"}, names, "key") ==
        std::set<std::string>{"encoder.0.bias", "norm.gamma"});
  const auto nearest = [&](const std::string& pattern) {
    const Error error = error_of([&] { matching_names({"*", pattern}, names, "training.freeze"); });
    CHECK(error.id() == "headroom.training.pattern");
    return std::string(error.what());
  };
  CHECK(contains(nearest("encodr.*"), "training.freeze: no parameter has a name like encodr.*"));
  CHECK(contains(nearest("encodr.*"), "the nearest are encoder.0.weight, encoder.0.bias, "));
  CHECK(contains(nearest("norm.gama"), "the nearest are norm.gamma, "));
  CHECK(contains(nearest("*.bais"), "the nearest are encoder.0.bias, "));
}

TEST_CASE("what is frozen stays as it is and takes no gradient and no state; the rest trains as before") {
  Config config = transformer_config();
  config.training.clip_grad_norm = 0;
  TransformerRun all(config);
  config.training.freeze = {"encoder.*", "*.bias"};
  TransformerRun some(config);
  const TensorMap before = copies_of(tensors_of(*some.model));
  CHECK(all.trainer.step(0.01) == some.trainer.step(0.01));
  const auto trained = all.model->named_parameters();
  int frozen = 0;
  for (const auto& parameter : some.model->named_parameters()) {
    INFO(parameter.key());
    const bool is_frozen = parameter.key().starts_with("encoder.") || parameter.key().ends_with(".bias");
    frozen += is_frozen;
    CHECK(parameter.value().grad().defined() == !is_frozen);
    CHECK(parameter.value().equal(before.at(parameter.key())) == is_frozen);
    if (!is_frozen) CHECK(parameter.value().equal(trained[parameter.key()]));
  }
  CHECK(frozen > 4);
  CHECK(some.trainer.state().optimizer.size() == 3 * (before.size() - static_cast<size_t>(frozen)));
  config.training.freeze = {"*"};
  const Error error = error_of([&] { TransformerRun none(config); });
  CHECK(error.id() == "headroom.training.pattern");
  CHECK(contains(error.what(), "leave one out to train something"));
}

TEST_CASE("LoRA trains a matrix as a graph of W + alpha / rank B A does") {
  torch::manual_seed(3);
  torch::nn::Linear layer(torch::nn::LinearOptions(6, 5));
  layer->to(torch::kDouble);
  const Tensor start = layer->weight.detach().clone(), bias = layer->bias.detach().clone();
  LoraConfig config{.rank = 2, .alpha = 3};
  torch::nn::Sequential net(layer);
  LowRank changes(*net, config);
  const NamedParameters trained = changes.parameters();
  REQUIRE(trained.size() == 2);
  CHECK(trained[0].first == "0.weight.lora_a");
  Tensor a = trained[0].second.detach().clone().requires_grad_(),
         b = trained[1].second.detach().clone().requires_grad_();
  CHECK(b.equal(torch::zeros({5, 2}, torch::kDouble)));
  CHECK(a.abs().max().item<double>() < 1 / std::sqrt(6));
  torch::optim::AdamW ours({trained[0].second, trained[1].second}, 0.1), theirs({a, b}, 0.1);
  for (int step = 0; step < 8; ++step) {
    ours.zero_grad(), theirs.zero_grad();
    for (int pass = 0; pass < 2; ++pass) {  // gradients add up
      const Tensor x = torch::randn({4, 6}, torch::kDouble), y = torch::randn({4, 5}, torch::kDouble);
      (net->forward(x) - y).square().mean().backward();
      (torch::linear(x, start + 1.5 * b.mm(a), bias) - y).square().mean().backward();
      CHECK_FALSE(layer->weight.grad().defined());
    }
    CHECK(torch::allclose(trained[0].second.grad(), a.grad(), 1e-10, 1e-14));
    CHECK(torch::allclose(trained[1].second.grad(), b.grad(), 1e-10, 1e-14));
    ours.step(), theirs.step();
    changes.apply();
    changes.apply();  // has nothing left to do
    CHECK(torch::allclose(layer->weight, start + 1.5 * b.mm(a), 1e-10, 1e-14));
  }
  CHECK(layer->bias.equal(bias));
  CHECK_FALSE(layer->bias.requires_grad());
}

TEST_CASE(
    "a model trained by LoRA is saved as a plain model, with changes of that rank in the layers that were named") {
  Config config = transformer_config();
  config.lora.rank = 2;
  config.lora.layers = {"encoder.*"};
  TransformerRun run(config);
  const TensorMap before = copies_of(tensors_of(*run.model));
  const TemporaryFolder folder;
  const Summary summary = run.trainer.run({.folder = folder.path()});
  CHECK(summary.epoch_losses.back() < summary.epoch_losses.front());
  const TensorMap plain = weights::load_tensors(folder / "last.safetensors");
  int changed = 0;
  for (const auto& [name, tensor] : before) {
    INFO(name);
    const Tensor difference = plain.at(name) - tensor;
    const bool is_named = name.starts_with("encoder.") && tensor.dim() == 2;
    CHECK(difference.equal(torch::zeros_like(difference)) == !is_named);
    if (!is_named) continue;
    ++changed;
    const Tensor values = std::get<1>(torch::linalg_svd(difference.to(torch::kDouble)));
    CHECK(values[1].item<double>() > 1e-4);
    if (values.size(0) > 2) CHECK(values[2].item<double>() < 1e-5);
  }
  CHECK(changed >= 6);
  CHECK(plain.size() == before.size());
  check_equal(tensors_of(*load_model(folder / "last.pt").model), plain);
  config.lora.layers = {"encodr.*"};
  CHECK(contains(error_of([&] { TransformerRun none(config); }).what(),
                 "lora.layers: no parameter has a name like encodr.*"));
}

TEST_CASE("memory that runs out after the passes with averages, LoRA or Prodigy is repeated to the same bits") {
  const testing::OneThread one_thread;
  for (const char* what : {"prodigy", "lora"}) {
    Config config = transformer_config();
    config.training.split_on_out_of_memory = true;
    config.training.ema_decay = 0.5;
    if (what == std::string("lora")) config.lora.rank = 2;
    if (what == std::string("prodigy")) config.training.optimizer = "prodigy";
    MemoryMeter meter;
    const auto end = [&](std::optional<int64_t> spared) {
      TransformerRun run(config);
      if (spared) meter.fail_allocation(*spared);
      run.trainer.step(0.5);
      run.trainer.step(0.5);
      return std::pair(run.trainer.microbatch(), run.trainer.state());
    };
    const TrainingState expected = end({}).second;
    TransformerRun counted(config);
    const int64_t allocations = meter.measure([&] { counted.trainer.step(0.5); }).allocations;
    constexpr int64_t kLast = 24;  // of the optimizer, LoRA and the averages
    for (int64_t spared = allocations - kLast; spared < allocations; ++spared) {
      CAPTURE(what, spared);
      const auto [microbatch, state] = end(spared);
      CHECK(microbatch == config.training.batch_size);
      check_same(state, expected);
    }
  }
}
