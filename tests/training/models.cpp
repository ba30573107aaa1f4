#include "headroom/training/models.hpp"

#include <torch/torch.h>

#include "headroom/audio/separator.hpp"
#include "headroom/checkpoint/stack.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/training/demucs_bag.hpp"
#include "headroom/training/load_model.hpp"
#include "headroom/training/plan.hpp"
#include "headroom/training/recommend.hpp"
#include "headroom/training/state.hpp"
#include "headroom/training/trainer.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tiny_separator.hpp"
#include "support/transformer_options.hpp"

using namespace headroom;
using namespace headroom::training;
using headroom::testing::contains;
using headroom::testing::error_of;
using headroom::testing::read_bytes;
using headroom::testing::TemporaryFolder;
using headroom::testing::transformer;
using headroom::testing::write_bytes;

namespace {

constexpr int64_t kFrame = 32;

/// Perceptrons over frames of the waveform, one after the other: a model with a stack of blocks and no attention.
class FrameMlpImpl : public torch::nn::Module {
 public:
  FrameMlpImpl(int64_t depth, int64_t channels, int64_t stems, StackPolicy policy)
      : channels_(channels), stems_(stems), policy_(std::move(policy)) {
    const int64_t width = channels * kFrame;
    for (int64_t i = 0; i < depth; ++i) layers->push_back(torch::nn::Linear(width, width));
    register_module("layers", layers);
    last = register_module("last", torch::nn::Linear(width, stems * width));
  }

  torch::Tensor forward(const torch::Tensor& mixture) {
    const torch::Tensor frames = mixture.unflatten(2, {-1, kFrame}).transpose(1, 2).flatten(2);  // [B,T,C·F]
    std::vector<StackBlock> blocks;
    for (const auto& module : *layers) {
      const auto layer = std::dynamic_pointer_cast<torch::nn::LinearImpl>(module);
      const auto block = [layer](const at::Tensor& x) { return x + torch::gelu(layer->forward(x)); };
      blocks.push_back({{{block, layer->parameters(), {0, 1}}}});
    }
    const torch::Tensor stems = last(run_stack(blocks, frames, policy_));                        // [B,T,N·C·F]
    return stems.unflatten(2, {stems_, channels_, kFrame}).permute({0, 2, 3, 1, 4}).flatten(3);  // [B,N,C,S]
  }

  torch::nn::ModuleList layers;
  torch::nn::Linear last{nullptr};

 private:
  int64_t channels_, stems_;
  StackPolicy policy_;
};
TORCH_MODULE(FrameMlp);

struct FrameMlpOptions {
  int64_t depth = 0;

  static void describe(auto& self, auto&& field) {
    field("depth", self.depth, {.required = true, .at_least = 1, .at_most = 100, .bound = true}, "blocks");
  }
};

int64_t own_losses = 0;

void register_frame_mlp() {
  if (model_types().contains("frame_mlp")) return;
  register_model<FrameMlpOptions>("frame_mlp",
                                  {.make =
                                       [](const FrameMlpOptions& options, const Config& config) {
                                         return FrameMlp(options.depth, config.audio.channels,
                                                         static_cast<int64_t>(config.audio.stems.size()),
                                                         config.model.gradient_checkpointing);
                                       },
                                   .loss =
                                       [](const FrameMlpOptions&, const Config&) {
                                         return [](const torch::Tensor& estimate, const torch::Tensor& stems) {
                                           ++own_losses;
                                           return (estimate - stems).square().mean();
                                         };
                                       },
                                   .blocks = [](const FrameMlpOptions& options) { return options.depth; },
                                   .check =
                                       [](const FrameMlpOptions&, const Config& config, Rules& rule) {
                                         const int64_t samples = config.training.segment_length;
                                         rule(
                                             {"training.segment_length"}, [&] { return samples % kFrame == 0; }, "got ",
                                             samples, ", expected a multiple of ", kFrame);
                                       }});
}

Config frame_mlp_config(const std::string& more = "") {
  register_frame_mlp();
  return parse_config(R"({"model": {"type": "frame_mlp", "depth": 6)" + more + R"(},
    "training": {"segment_length": 4096, "batch_size": 4, "steps_per_epoch": 4, "epochs": 3, "warmup_steps": 2,
                 "learning_rate": 0.01},
    "loss": {"stft_weight": 0}})",
                      "own.json");
}

Example noise(int64_t first, int64_t count) { return testing::noise_examples(first, count, 4096); }

/// What plan_training replays: two steps and a segment of validation.
int64_t measured_peak(const Config& config) {
  const auto train = [&] {
    const models::Separator model = make_model(config);
    Trainer trainer(model, config, noise);
    for (int step = 0; step < 2; ++step) trainer.step(1e-3);
    const torch::NoGradGuard guard;
    model->eval();
    model(noise(0, 1).mixture);
  };
  return MemoryMeter().measure(train).added_peak();
}

/// Trains the model of a configuration, saves it, loads it and separates with it.
void check_training(const Config& config) {
  const TemporaryFolder folder;
  torch::manual_seed(1);
  Trainer trainer(make_model(config), config, noise);
  trainer.run({.folder = folder.path()});
  auto [saved, separator] = load_model(folder / "last.pt");
  CHECK(to_json(saved) == to_json(config));
  const torch::Tensor stems = audio::separate(torch::randn({2, 10'001}), separator, {.segments = {.length = 4096}});
  CHECK(stems.sizes() == torch::IntArrayRef({4, 2, 10'001}));
  CHECK(stems.isfinite().all().item<bool>());
}

}  // namespace

TEST_CASE("a model of the program's own is described, checked and written like those of the library") {
  const Config config = frame_mlp_config(R"(, "gradient_checkpointing": "2*full,none")");
  CHECK(config.model.type() == "frame_mlp");
  CHECK(config.model.as<FrameMlpOptions>().depth == 6);
  CHECK(config.model.blocks() == 6);
  CHECK(to_json(parse_config(to_json(config), "again")) == to_json(config));
  CHECK(contains(to_json(config), R"("type": "frame_mlp")"));
  CHECK_FALSE(contains(to_json(config), R"("n_fft")"));
  CHECK(contains(model_table("frame_mlp"), "| `model.depth` | required | an integer >= 1 and <= 100 | blocks |\n"));
  CHECK_FALSE(contains(model_table("frame_mlp"), "model.attention"));  // it has none

  const auto refused = [](const std::string& model, const std::string& segment) {
    const std::string text = R"({"model": )" + model + R"(, "training": {"batch_size": 1, "segment_length": )" +
                             segment + R"(}, "loss": {"stft_weight": 0}})";
    return std::string(error_of([&] { parse_config(text, "a.json"); }).what());
  };
  const std::string all = refused(
      R"({"type": "frame_mlp", "dept": 3, "gradient_checkpointing": "7*full,none", "attention": "tiled"})", "50");
  CHECK(contains(all, "a.json: model.depth: missing; expected an integer >= 1 and <= 100 (blocks)"));
  CHECK(contains(all, "a.json: model.dept: unknown key; did you mean `depth`?"));
  CHECK(contains(all, "a.json: model.attention: unknown key"));
  CHECK(contains(all, "a.json: training.segment_length: got 50, expected a multiple of 32"));
  CHECK(contains(refused(R"({"type": "frame_mlp", "depth": 3, "gradient_checkpointing": "7*full,none"})", "64"),
                 "which names 7 blocks, expected at most the 3 of the model"));
}

TEST_CASE("a type of model that nobody registered is told with the known ones and the nearest of them") {
  register_frame_mlp();
  const Error error = error_of([] {
    parse_config(R"({"model": {"type": "time_frequency_transfomer", "n_layer": 3}, "training": {"batch_size": 1}})",
                 "a");
  });
  CHECK(error.id() == "headroom.training.config");
  CHECK(contains(error.what(), "2 problems in a\n"));  // nothing is known of the model's other keys
  CHECK(contains(error.what(),
                 "a: model.type: got \"time_frequency_transfomer\", expected one of \"bs_roformer\", "
                 "\"frame_mlp\", \"htdemucs\", \"mel_band_roformer\", \"time_frequency_transformer\"; did you mean "
                 "`time_frequency_transformer`?"));
  CHECK(contains(error.what(), "a: training.segment_length: missing"));
  CHECK(contains(error_of([] { parse_config(R"({"model": {"type": 3}})", "a"); }).what(), "model.type: got \"3\""));
  const Error direct = error_of([] { ModelConfig("frame_mpl"); });
  CHECK(direct.id() == "headroom.training.model_type");
  CHECK(contains(direct.what(), "did you mean `frame_mlp`?"));
}

TEST_CASE(
    "types of models are registered once, with a function that makes the model, and asked for their own options") {
  register_frame_mlp();
  const auto make = [](const FrameMlpOptions&, const Config&) { return testing::TinySeparator(); };
  const Error taken = error_of([&] { register_model<FrameMlpOptions>("frame_mlp", {.make = make}); });
  CHECK(taken.id() == "headroom.training.model_registered");
  CHECK(error_of([] { register_model<FrameMlpOptions>("other", {}); }).id() == "headroom.training.model_registered");
  CHECK_FALSE(model_types().contains("other"));
  const Config config = frame_mlp_config();
  const Error other = error_of([&] { model_options(config); });
  CHECK(other.id() == "headroom.training.model_options");
  CHECK(contains(other.what(), "model.type is frame_mlp"));
}

TEST_CASE("a model of the program's own is planned byte for byte and fitted block by block into a budget") {
  Config config = frame_mlp_config();
  for (const char* policy : {"none", "full", "2*full,none", "tiled"}) {
    CAPTURE(policy);
    config.model.gradient_checkpointing = policy;
    CHECK(plan_training(config, this_machine()).peak_bytes == measured_peak(config));
  }
  config.training.optimizer_in_backward = true;  // batches are not split then
  config.training.clip_grad_norm = 0;
  config.model.gradient_checkpointing = "none";
  const int64_t whole = plan_training(config, this_machine()).peak_bytes;
  const auto found = recommend(config, this_machine(), {.budget = whole * 9 / 10});
  REQUIRE(found);
  CHECK(found->same_training);
  CHECK_FALSE(found->config.model.gradient_checkpointing.first.empty());
  CHECK(measured_peak(found->config) <= whole * 9 / 10);
}

TEST_CASE("a model of the program's own is trained with its loss, saved, resumed and separates") {
  const TemporaryFolder folder;
  const Config config = frame_mlp_config();
  torch::manual_seed(1);
  Trainer whole(make_model(config), config, noise);
  own_losses = 0;
  const Summary summary = whole.run({});
  CHECK(own_losses == 12);
  CHECK(summary.epoch_losses.back() < summary.epoch_losses.front());
  torch::manual_seed(1);
  Trainer first(make_model(config), config, noise);
  first.run({.folder = folder.path(), .stop_requested = [taken = 0]() mutable { return ++taken == 6; }});
  Trainer second(make_model(config), config, noise);
  CHECK(second.resume(load_state(folder / "last.pt"), "last.pt").empty());
  CHECK(second.run({.folder = folder.path()}).epoch_losses == summary.epoch_losses);

  auto [saved, model] = load_model(folder / "last.pt");
  CHECK(saved.model.type() == "frame_mlp");
  const torch::Tensor stems = audio::separate(torch::randn({2, 10'000}), model, {.segments = {.length = 4096}});
  CHECK(stems.sizes() == torch::IntArrayRef({4, 2, 10'000}));

  // As another type it is another model, whatever else agrees
  Config other = parse_config(R"({"model": {"n_fft": 64, "hop_length": 32, "n_layers": 1, "emb_dim": 8, "n_heads": 2,
    "ffn_hidden_dim": [16]}, "training": {"segment_length": 4096, "batch_size": 4}})",
                              "other");
  Trainer transformers(make_model(other), other, noise);
  const Error refused = error_of([&] { transformers.resume(load_state(folder / "last.pt"), "last.pt"); });
  CHECK(refused.id() == "headroom.training.state.config");
  CHECK(contains(refused.what(), R"(model.type: "frame_mlp" became "time_frequency_transformer")"));
}

TEST_CASE("RoFormers are planned byte for byte, trained, saved and separate, by configuration") {
  const std::string shared = R"("dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "time_transformer_depth": 1,
    "freq_transformer_depth": 1, "stft_n_fft": 64, "stft_hop_length": 16, "stft_win_length": 64)";
  for (const std::string& model : {R"("type": "bs_roformer", "freqs_per_bands": [4, 4, 8, 17], )" + shared,
                                   R"("type": "mel_band_roformer", "num_bands": 6, )" + shared,
                                   R"("type": "bs_roformer", "freqs_per_bands": [4, 4, 8, 17], "use_pope": true,
                                      "num_residual_streams": 2, "add_value_residual": true, "time_window": 9,
                                      "time_sinks": 2, )" +
                                       shared}) {
    CAPTURE(model);
    Config config = parse_config(R"({"model": {)" + model + R"(}, "training": {"segment_length": 4096, "batch_size": 2,
      "steps_per_epoch": 3, "epochs": 1, "warmup_steps": 1}, "loss": {"windows": [256], "hop": 64, "min_n_fft": 256}})",
                                 "roformer.json");
    CHECK(config.model.blocks() == 4);
    CHECK(stored_scores_bytes(config).value() > 0);
    for (const char* policy : {"none", "full", "2*selective,none", "tiled+offload"}) {
      CAPTURE(policy);
      config.model.gradient_checkpointing = policy;
      CHECK(plan_training(config, this_machine()).peak_bytes == measured_peak(config));
    }
    check_training(config);
  }
}

TEST_CASE("HTDemucs is planned byte for byte, trained, saved and separates, by configuration") {
  Config config = parse_config(R"({"model": {"type": "htdemucs", "channels": 4, "nfft": 256, "depth": 2,
    "dconv_mode": 3, "dconv_comp": 2, "bottom_channels": 8, "t_layers": 2, "t_heads": 2}, "loss": {"stft_weight": 0},
    "training": {"segment_length": 4096, "batch_size": 2, "steps_per_epoch": 3, "epochs": 1, "warmup_steps": 1}})",
                               "htdemucs.json");
  CHECK(config.model.blocks() == 2);
  CHECK(stored_scores_bytes(config).value() == 2 * 2 * 4 * (512 * 512 + 256 * 256 + 2 * 512 * 256));
  for (const char* policy : {"none", "full", "1*full,none"}) {
    CAPTURE(policy);
    config.model.gradient_checkpointing = policy;
    CHECK(plan_training(config, this_machine()).peak_bytes == measured_peak(config));
  }
  check_training(config);
  const Error error = error_of([] {
    parse_config(R"({"model": {"type": "htdemucs", "kernel_size": 6, "t_emb": "cape"},
                     "training": {"segment_length": 4096, "batch_size": 2}})",
                 "a.json");
  });
  CHECK(contains(error.what(), "a.json: model.t_emb: unknown key"));
}

TEST_CASE("a checkpoint of demucs is a model with its configuration, and nothing of it is executed") {
  const std::string file = HEADROOM_SOURCE_DIR "/tests/tools/demucs/tiny.th";
  auto [config, model] = load_model(file);
  CHECK(config.audio.stems == std::vector<std::string>{"drums", "vocals"});
  CHECK(config.training.segment_length == 882);  // 1/50 s
  CHECK(config.inference.normalize);
  CHECK(config.model.as<models::HTDemucsOptions>().t_dropout() == 0.02);
  CHECK(model(torch::ones({1, 2, 100})).sizes() == torch::IntArrayRef({1, 2, 2, 100}));

  const auto refused = [](const std::string& klass, const std::string& args, const std::string& kwargs) {
    const Json package = {{"klass", klass}, {"args", Json::parse(args)}, {"kwargs", Json::parse(kwargs)}};
    const Error error = error_of([&] { training::detail::demucs_config(package, "a.th"); });
    CHECK(error.id() == "headroom.training.demucs");
    return std::string(error.what());
  };
  const std::string klass = "demucs.htdemucs.HTDemucs";
  CHECK(contains(refused("demucs.hdemucs.HDemucs", "[]", "{}"), "of the class \"demucs.hdemucs.HDemucs\""));
  CHECK(contains(refused(klass, "[]", "{}"), "0 arguments without a name"));
  CHECK(contains(refused(klass, R"([["a"]])", R"({"t_sparse_self_attn": true})"),
                 "t_sparse_self_attn true, expected false"));
  CHECK(contains(refused(klass, R"([["a"]])", R"({"t_emb": "cape"})"), "t_emb \"cape\", expected \"sin\""));
  CHECK(contains(refused(klass, R"([["a"]])", R"({"segment": "ten"})"), "the argument segment of \"ten\""));
  CHECK(contains(refused(klass, R"([["a"]])", R"({"samplerate": 1e300})"), "a number above 0 and below 1e+09"));
  CHECK(contains(refused(klass, R"([["a"]])", R"({"type": "bs_roformer"})"), "which HTDemucs does not have"));
  const Json newer = {{"klass", klass}, {"args", Json::parse(R"([["a", "b"]])")}, {"kwargs", {{"chanels", 4}}}};
  CHECK(contains(error_of([&] { parse_config(training::detail::demucs_config(newer, "a.th").dump(), "a.th"); }).what(),
                 "model.chanels: unknown key; did you mean `channels`?"));
}

TEST_CASE("a bag of demucs names its checkpoints and how much each counts") {
  const std::filesystem::path folder = HEADROOM_SOURCE_DIR "/tests/tools/demucs";
  const DemucsBag bag = read_demucs_bag(folder / "bag.yaml");
  CHECK(bag.models == std::vector{folder / "tiny.th", folder / "other-9db1945b.th", folder / "third.th"});
  CHECK(bag.stems == std::vector<std::string>{"drums", "vocals"});
  REQUIRE(bag.configs.size() == 3);
  for (std::size_t m = 0; m < 3; ++m) {
    CHECK(to_json(bag.configs[m]) == to_json(load_model(bag.models[m]).config));
  }
  CHECK(bag.weights == std::vector<std::vector<double>>{{1, 0}, {0.5, 3}, {2, 1}});

  const TemporaryFolder copies;
  const auto read = [&](const std::string& text) {
    write_bytes(copies / "a.yaml", text);
    return read_demucs_bag(copies / "a.yaml");
  };
  const auto replaced = [&](const std::string& word, const std::string& by) {  // in tiny.th, by a word of its length
    std::string bytes = read_bytes(folder / "tiny.th");
    for (std::size_t at = 0; (at = bytes.find(word, at)) != bytes.npos;) bytes.replace(at, word.size(), by);
    return bytes;
  };
  const auto refused = [&](const std::string& text, const char* id = "headroom.training.demucs_bag") {
    const Error error = error_of([&] { read(text); });
    CHECK(error.id() == id);
    return std::string(error.what());
  };
  CHECK(contains(refused("models: [tiny]"), "there is no tiny.th or tiny-….th in"));
  std::filesystem::copy_file(folder / "tiny.th", copies / "tiny.th");
  std::filesystem::copy_file(folder / "other-9db1945b.th", copies / "other-9db1945b.th");
  CHECK(read("models: [tiny, other]\nweights: null\nsegment: null").weights ==
        std::vector<std::vector<double>>{{1, 1}, {1, 1}});
  CHECK(contains(refused("model: [tiny]"), "models: missing"));
  CHECK(contains(refused("model: [tiny]"), "model: unknown key; did you mean `models`?"));
  CHECK(contains(refused("models: [12345678]"), "models[0]: got 12345678, expected the plain name of a file"));
  CHECK(contains(refused("models: [../tiny]"), "models[0]: got \"../tiny\", expected the plain name of a file"));
  CHECK(contains(refused("- tiny"), "expected an object"));
  CHECK(contains(refused("models: [tiny]\nsegment: 0"), "segment: got 0, expected a number > 0"));
  CHECK(contains(refused("models: [tiny, other]\nweights: [[1, 1]]"), "expected a list for each of the 2 models"));
  CHECK(contains(refused("models: [tiny]\nweights: [[1, -1]]"), "weights[0][1]: got -1, expected a number >= 0"));
  CHECK(contains(refused("models: [tiny]\nweights: [[1, 1, 1]]"), "has 3 weights for a model, expected one for each"));
  CHECK(contains(refused("models: [tiny, other]\nweights: [[1, 0], [2, 0]]"), "for vocals are 0"));
  refused("models: [tiny\n", "headroom.training.yaml");
  write_bytes(copies / "damaged.th", "PK");
  CHECK(contains(refused("models: [damaged]"), "damaged.th is no checkpoint of demucs"));
  std::filesystem::copy_file(folder / "tiny.th", copies / "tiny-01234567.th");
  CHECK(contains(refused("models: [tiny]"), "any of tiny-01234567.th, tiny.th in"));
  write_bytes(copies / "stems.th", replaced("vocals", "others"));
  CHECK(contains(refused("models: [other, stems]"),
                 R"(stems ["drums","others"], the models before it ["drums","vocals"])"));
  write_bytes(copies / "class.th", replaced("HTDemucs", "HTDemucz"));
  CHECK(contains(refused("models: [class]", "headroom.training.demucs"), "htdemucs.HTDemucz\", expected demucs"));
}

TEST_CASE("what does not fit together in a RoFormer is told") {
  const auto refused = [](const std::string& model) {
    const std::string text = R"({"model": {"dim": 16, "depth": 1, )" + model +
                             R"(}, "training": {"batch_size": 1, "segment_length": 4096}})";
    return std::string(error_of([&] { parse_config(text, "a.json"); }).what());
  };
  CHECK(contains(refused(R"("type": "bs_roformer", "stft_n_fft": 1024)"), "model.freqs_per_bands: "));
  CHECK(contains(refused(R"("type": "bs_roformer", "stft_n_fft": 1024)"), "1025 bins together"));
  CHECK(contains(refused(R"("type": "mel_band_roformer", "num_bands": 900)"), "model.num_bands: "));
  CHECK(
      contains(refused(R"("type": "bs_roformer", "dim_head": 15)"), "model.dim_head: got 15, expected an even number"));
  CHECK(contains(refused(R"("type": "bs_roformer", "time_sinks": 4)"), "model.time_sinks: got 4, expected 0 or a "));
  CHECK(
      contains(refused(R"("type": "bs_roformer", "num_residual_fracs": 2)"), "model.num_residual_fracs: unknown key"));
  CHECK(contains(refused(R"("type": "bs_roformer", "stft_hop_length": 2000)"),
                 "model.stft_hop_length: got 2000, expected at most half of model.stft_win_length, which is 2048"));
}

TEST_CASE("configurations without a type are those of the time-frequency transformer, as they always were") {
  const char* text = R"({"model": {%"n_layers": 1, "emb_dim": 32, "n_heads": 2, "ffn_hidden_dim": [64]},
                         "training": {"segment_length": 44100, "batch_size": 1}})";
  const auto with = [&](const std::string& type) {
    std::string all = text;
    return parse_config(all.replace(all.find('%'), 1, type), "a");
  };
  CHECK(to_json(with("")) == to_json(with(R"("type": "time_frequency_transformer", )")));
  CHECK(differences(with(""), with(R"("type": "time_frequency_transformer", )")).empty());
  CHECK(transformer(with("")).emb_dim() == 32);
}
