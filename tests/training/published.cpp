#include "headroom/training/published.hpp"

#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "headroom/models/bs_roformer.hpp"
#include "headroom/models/mel_band_roformer.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/yaml.hpp"
#include "support/catch.hpp"
#include "support/config_problems.hpp"

using namespace headroom;
using namespace headroom::training;
using headroom::testing::contains;
using headroom::testing::error_of;

namespace {

std::string json_of(const std::string& yaml) { return parse_yaml(yaml, "a.yaml").dump(); }

Error refused_yaml(const std::string& yaml) {
  const Error error = error_of([&] { parse_yaml(yaml, "a.yaml"); });
  CHECK(error.id() == "headroom.training.yaml");
  return error;
}

std::string repeated(const std::string& text, int times) {
  std::string all;
  for (int i = 0; i < times; ++i) all += text;
  return all;
}

/// A published BS-RoFormer of 5 bands; `changes` replace lines that begin with the same key, or come at the end of
/// their section ("model.depth: 3").
std::string bs_roformer(const std::vector<std::string>& changes = {}) {
  std::vector<std::pair<std::string, std::vector<std::string>>> sections = {
      {"audio",
       {"chunk_size: 5120", "dim_f: 1024", "dim_t: 801 # not used", "hop_length: 441", "n_fft: 2048", "num_channels: 2",
        "sample_rate: 44100", "min_mean_abs: 0.000"}},
      {"model",
       {"dim: 32",
        "depth: 2",
        "stereo: true",
        "num_stems: 1",
        "time_transformer_depth: 1",
        "freq_transformer_depth: 1",
        "linear_transformer_depth: 0",
        "freqs_per_bands: !!python/tuple [2, 2, 4, 8, 17]",
        "dim_head: 16",
        "heads: 2",
        "attn_dropout: 0.1",
        "ff_dropout: 0.2",
        "flash_attn: true",
        "dim_freqs_in: 33",
        "stft_n_fft: 64",
        "stft_hop_length: 16",
        "stft_win_length: 64",
        "stft_normalized: false",
        "mask_estimator_depth: 3",
        "multi_stft_resolution_loss_weight: 0.5",
        "multi_stft_resolutions_window_sizes: !!python/tuple\n  - 512\n  - 256",
        "multi_stft_hop_size: 147",
        "multi_stft_normalized: False",
        "mlp_expansion_factor: 1",
        "use_torch_checkpoint: True",
        "skip_connection: False",
        "sage_attention: False"}},
      {"training",
       {"batch_size: 2", "gradient_accumulation_steps: 4", "grad_clip: 0", "instruments: ['vocals', 'other']",
        "lr: 1.0e-05", "patience: 2", "reduce_factor: 0.95", "target_instrument: vocals", "num_epochs: 30",
        "num_steps: 10", "q: 0.95", "coarse_loss_clip: true", "ema_momentum: 0.999", "optimizer: adam",
        "other_fix: true", "use_amp: true"}},
      {"augmentations",
       {"enable: true", "loudness: true", "loudness_min: 0.5", "loudness_max: 1.5", "mixup: true",
        "mixup_probs:\n    !!python/tuple # two more\n    - 0.2\n    - 0.02",
        "all: {channel_shuffle: 0.5, random_inverse: 0.1, random_polarity: 0.5, time_stretch: 0.2, "
        "time_stretch_min_rate: 0.75, time_stretch_max_rate: 1.5, gaussian_noise: 0.125, "
        "gaussian_noise_min_amplitude: 0.001, gaussian_noise_max_amplitude: 0.1, pitch_shift: 0}",
        "vocals:\n    pitch_shift: 0.1"}},
      {"inference", {"batch_size: 4", "dim_t: 801", "num_overlap: 4"}}};
  for (const std::string& change : changes) {
    const std::size_t dot = change.find('.');
    const std::string line = change.substr(dot + 1), key = line.substr(0, line.find(':') + 1);
    auto& lines = std::ranges::find(sections, change.substr(0, dot), [](const auto& s) { return s.first; })->second;
    const auto same = std::ranges::find_if(lines, [&](const std::string& old) { return old.starts_with(key); });
    same == lines.end() ? lines.push_back(line) : void(*same = line);
  }
  std::string text;
  for (const auto& [name, lines] : sections) {
    text += name + ":\n";
    for (const std::string& line : lines) text += "  " + line + "\n";
  }
  return text;
}

std::vector<std::string> complaints_about(const std::string& yaml) { return testing::problems_in(yaml, "a.yaml"); }

using Lines = std::vector<std::string>;

}  // namespace

TEST_CASE("YAML is read as PyYAML reads it") {
  CHECK(json_of("a: 1\nb: -2\nc: +3\nd: 1.5\ne: .5\nf: 1.0e-05\ng: 1e-5\nh: 2.") ==
        R"({"a":1,"b":-2,"c":3,"d":1.5,"e":0.5,"f":1e-05,"g":1e-05,"h":2.0})");
  CHECK(
      json_of("[true, False, yes, OFF, null, ~, Null, 'true', \"1\", x y, 1-2, nan, .inf, 1.2.3, !!str 12, !!int 3]") ==
      R"([true,false,true,false,null,null,null,"true","1","x y","1-2","nan",".inf","1.2.3","12",3])");
  CHECK(json_of("a: !!python/tuple\n- 1\n- 2\nb: !!python/tuple [3]\nc:\n  !!python/tuple # why\n  - 4\nd:") ==
        R"({"a":[1,2],"b":[3],"c":[4],"d":null})");
  CHECK(json_of("# only\n---\nbase: &b {x: 1, y: [1]}\nm: {<<: *b, x: 2}\nn: *b\nl: {<<: [{z: 3}, *b]}\n...\n") ==
        R"({"base":{"x":1,"y":[1]},"m":{"x":2,"y":[1]},"n":{"x":1,"y":[1]},"l":{"z":3,"x":1,"y":[1]}})");
  CHECK(json_of("a: \"Gesänge \\u00fc\"") == R"({"a":"Gesänge ü"})");
  CHECK(json_of("") == "null");
}

TEST_CASE("YAML that nobody can have meant is located by line and column") {
  const auto says = [](const std::string& yaml, const std::string& text) {
    const Error error = refused_yaml(yaml);
    INFO(error.what());
    CHECK(contains(error.what(), "a.yaml: " + text));
  };
  says("a: 1\nb: [1, 2\nc: 3", "line ");
  says("a: 1\n  b: 2", "line 2, column 4: illegal map value; expected valid YAML");
  says("a: 1\nb:\n  c: 1\n  c: 2", "line 4, column 3: the key \"c\" is given twice in one object");
  says("a: 1\n---\nb: 2\n", "line 2, column 1: another document begins here");
  says("[1]: 2", "line 1, column 1: a key that is a list, an object, null or an alias; expected text");
  says("a: &x [1, *x]", "line 1, column 11: an alias of what it stands in");
  says("a: *nobody", "line 1, column 4: ");
  says("a: {<<: 3}", "line 1, column 9: `<<` takes objects");
  says("a: \xff", "line 1, column 1: the text is not UTF-8");
  says(std::string("\xff\xfe"
                   "a\0:\0",
                   6),
       "line 1, column 1: the text is not UTF-8");
  says(std::string("a: \0", 4), "line 1, column 1: the text is not UTF-8");
  says("a: !!python/object/apply:os.system [ls]",
       "line 1, column 4: the tag \"tag:yaml.org,2002:python/object/apply:os.system\" asks for something");
  says("a: !!python/name:os.system", "line 1, column 4: the tag");
}

TEST_CASE("hostile YAML is refused before it takes memory") {
  const auto resident = [] {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss;
  };
  const auto before = resident();
  CHECK(contains(refused_yaml(repeated("- ", 100'000)).what(), "column 65: lists and objects lie 32 deep here"));
  for (const char* nest : {"[", "{", "{a: ", "? ", "- ? "}) refused_yaml(repeated(nest, 50'000));
  std::string lists = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n", merges = "a0: &a0 {k: v}\n";
  for (int i = 1; i < 30; ++i) {
    const std::string n = std::to_string(i), last = "*a" + std::to_string(i - 1);
    lists += "a" + n + ": &a" + n + " [" + repeated(last + ", ", 9) + last + "]\n";
    merges += "a" + n + ": &a" + n + " {<<: [" + repeated(last + ", ", 9) + last + "], k" + n + ": 1}\n";
  }
  CHECK(contains(refused_yaml(lists).what(), "line 5, column 10: the document has more than 20000 values here"));
  refused_yaml(merges);
  refused_yaml("a: &a " + std::string(200'000, 'x') + "\nb: [" + repeated("*a, ", 5000) + "]");
  refused_yaml("[" + repeated("1,", 100'000) + "]");
  CHECK(contains(refused_yaml("a: " + std::string(1 << 20, 'x')).what(), "has 1048579 bytes, expected at most 262144"));
  CHECK(resident() - before < 150'000);  // KiB: yaml-cpp makes a token of each bracket
}

TEST_CASE("a published BS-RoFormer is read") {
  Lines notices;
  const Config config = parse_config(bs_roformer(), "a.yaml", &notices);
  CHECK(config.model.type() == "bs_roformer");
  const auto& model = config.model.as<models::BsRoformerOptions>();
  CHECK((model.dim() == 32 && model.depth() == 2 && model.dim_head() == 16 && model.heads() == 2));
  CHECK((model.attn_dropout() == 0.1 && model.ff_dropout() == 0.2 && model.mask_estimator_depth() == 3));
  CHECK((model.stft_n_fft() == 64 && model.stft_hop_length() == 16 && model.mlp_expansion_factor() == 1));
  CHECK(model.freqs_per_bands() == std::vector<int64_t>{2, 2, 4, 8, 17});
  CHECK(model.zero_dc());
  CHECK(config.model.gradient_checkpointing == StackPolicy(true));
  CHECK(config.audio.channels == 2);
  CHECK(config.audio.stems == Lines{"vocals"});
  CHECK(config.data.accompaniment == Lines{"other"});
  CHECK(config.data.gain == std::array<double, 2>{0.5, 1.5});
  CHECK((config.data.swap_channels && config.data.flip_polarity));
  CHECK(config.data.mixup == std::vector<double>{0.2, 0.02});
  CHECK((config.data.tempo == 0.2 && config.data.tempo_factor == std::array<double, 2>{0.75, 1.5}));
  CHECK((config.data.noise == 0.125 && config.data.pitch == 0 && config.data.equalizer == 0));
  CHECK(config.data.noise_db[0] == Approx(-60));
  CHECK(config.data.noise_db[1] == Approx(-20));
  const TrainingConfig& training = config.training;
  CHECK((training.segment_length == 5120 && training.batch_size == 2 && training.gradient_accumulation_steps == 4));
  CHECK((training.steps_per_epoch == 3 && training.epochs == 30 && training.warmup_steps == 0));
  CHECK((training.learning_rate == 1e-5 && training.optimizer == "adamw" && training.weight_decay == 0));
  CHECK((training.schedule == "plateau" && training.plateau_patience == 2 && training.plateau_factor == 0.95));
  CHECK((training.min_learning_rate_ratio == 0 && training.ema_decay == 0.999));
  CHECK((config.loss.masked_quantile == 0.95 && config.loss.masked_by_example && config.loss.masked_weight == 0));
  CHECK((training.clip_grad_norm == 0 && training.bf16 && training.optimizer_state == "full"));
  CHECK((config.loss.stft_weight == 0.5 && config.loss.hop == 147 && config.loss.min_n_fft == 64));
  CHECK(config.loss.windows == std::vector<int64_t>{512, 256});
  CHECK((config.inference.segment_length == 0 && config.inference.overlap == 0.75));
  CHECK((config.inference.batch == 4 && !config.inference.normalize));
  CHECK(config.inference_segment() == 5120);
  CHECK(notices == Lines{"training.use_amp: bfloat16, not float16",
                         "augmentations that are not here: random_inverse, vocals",
                         "without effect here: audio.dim_f, audio.dim_t, audio.hop_length, audio.n_fft, "
                         "audio.min_mean_abs, model.flash_attn, model.sage_attention, model.dim_freqs_in, "
                         "training.other_fix, inference.dim_t"});
  CHECK(to_json(parse_config(to_json(config), "again")) == to_json(config));
}

TEST_CASE("a published Mel-Band RoFormer is read") {
  std::string text = bs_roformer({"model.num_bands: 6", "model.sample_rate: 44100 # of librosa's filters",
                                  "training.target_instrument: null", "model.num_stems: 2",
                                  "training.optimizer: adamw8bit", "augmentations.enable: false",
                                  "inference.chunk_size: 10240", "inference.normalize: true", "model.zero_dc: true"});
  const std::size_t bands = text.find("  freqs_per_bands");
  text.erase(bands, text.find('\n', bands) + 1 - bands);
  Lines notices;
  const Config config = parse_config(text, "a.yml", &notices);
  CHECK(config.model.type() == "mel_band_roformer");
  CHECK(config.model.as<models::MelBandRoformerOptions>().num_bands() == 6);
  CHECK(config.audio.stems == Lines{"vocals", "other"});
  CHECK(config.data.accompaniment.empty());
  CHECK(config.data.gain == std::array<double, 2>{1, 1});
  CHECK_FALSE((config.data.swap_channels || config.data.flip_polarity));
  CHECK((config.data.mixup.empty() && config.data.tempo == 0 && config.data.noise == 0));
  CHECK((config.training.optimizer_state == "8bit" && config.training.weight_decay == 0.01));
  CHECK(config.inference_segment() == 10240);
  CHECK(config.inference.normalize);
  CHECK(notices.size() == 2);
  CHECK(contains(notices.back(), "inference.dim_t, model.zero_dc"));
}

TEST_CASE("a published file may leave out what only training needs") {
  Lines notices;
  const Config config = parse_config(R"(model:
  dim: 256
  depth: 12
  stereo: true
  num_stems: 6
  time_transformer_depth: 1
  freq_transformer_depth: 1
  dim_freqs_in: 1025
  stft_normalized: false
  multi_stft_resolutions_window_sizes:
    - 4096
training:
  instruments: ['bass', 'drums', 'other', 'vocals', 'guitar', 'piano']
  target_instrument: null
inference:
  num_overlap: 2
  chunk_size: 588800
  normalize: false
is_roformer: true
)",
                                     "-", &notices);  // of the standard input: its content says that it is YAML
  CHECK(config.model.type() == "bs_roformer");
  CHECK(config.model.as<models::BsRoformerOptions>().band_count() == 62);
  CHECK(config.audio.stems.size() == 6);
  CHECK((config.inference.overlap == 0.5 && config.inference_segment() == 588800));
  CHECK((config.training.batch_size == 1 && config.training.segment_length == 588800));
  CHECK((config.training.schedule == "constant" && config.training.ema_decay == 0));
}

TEST_CASE("problems of a published file have its own names") {
  CHECK(complaints_about(bs_roformer({"audio.chunk_size: 0", "model.depht: 2", "model.heads: two",
                                      "model.stereo: false", "training.lr: -1", "training.num_stpes: 3",
                                      "inference.num_overlap: 0", "training.use_amp: 3", "model.freq_range: 4"})) ==
        Lines{"audio.num_channels: got 2, expected 1, as model.stereo is false, or missing",
              "training.use_amp: got 3, expected true or false",
              "inference.num_overlap: got 0, expected an integer >= 1 and <= 1000",
              "model.depht: unknown key; did you mean `depth`?",
              "model.freq_range: unknown key; a model that has it is not here",
              "training.num_stpes: unknown key; did you mean `num_steps`?",
              "model.heads: got \"two\", expected an integer >= 1 and <= 1048576",
              "audio.chunk_size: got 0, expected an integer >= 1 and <= 1000000000",
              "training.lr: got -1, expected a number > 0 and <= 10"});
  const auto only = [](const std::vector<std::string>& changes) {
    const Lines lines = complaints_about(bs_roformer(changes));
    INFO(lines.front());
    REQUIRE(lines.size() == 1);
    return lines.front();
  };
  CHECK(only({"model.num_stems: 2"}) == "model.num_stems: got 2, expected 1, training.target_instrument alone");
  CHECK(only({"training.target_instrument: null"}) ==
        "model.num_stems: got 1, expected 2, one for each of training.instruments");
  CHECK(only({"training.instruments: [../x, other]"}) ==
        "training.instruments[0]: got \"../x\", expected the plain name of a file");
  CHECK(contains(only({"model.num_bands: 60"}),
                 "model: has freqs_per_bands, which makes it a BS-RoFormer, and num_bands"));
  CHECK(only({"training.model_type: scnet"}) == R"(training.model_type: got "scnet", expected one of "bs_roformer")");
  CHECK(only({"model.stft_normalized: true"}) ==
        "model.stft_normalized: got true, expected false: a model like that is not here");
  CHECK(only({"model.sample_rate: 48000"}) == "model.sample_rate: got 48000, expected audio.sample_rate, 44100");
  CHECK(contains(only({"audio.chunk_size: 300"}),
                 "audio.chunk_size: got 300, expected at least the longest window of "
                 "model.multi_stft_resolutions_window_sizes"));
  CHECK(contains(only({"model.dim_head: 15"}), "model.dim_head: got 15, expected an even number"));
  const std::string other = "audio:\n  chunk_size: 44100\nmodel: htdemucs\ntraining:\n  shift: 1\n";
  CHECK(complaints_about(other) ==
        Lines{"model: has no `dim` and `depth`, as those of BS-RoFormers and Mel-Band RoFormers "
              "have; other published models are not here"});
  CHECK(complaints_about("audio:\n  chunk_size: 5120\nmodel:\n  dim: 8\n  depth: 1\ntrainnig: {}\n") ==
        Lines{"training.instruments: missing; expected the names of the stems, such as [vocals, other]",
              "trainnig: unknown section; did you mean `training`?"});
}

TEST_CASE("a published optimizer trains; one that is not here is told, and another one trains") {
  Lines notices;
  const auto training = [&](const std::string& optimizer, const std::string& rate) {
    notices.clear();
    return parse_config(bs_roformer({"training.optimizer: " + optimizer, "training.lr: " + rate}), "a.yaml", &notices)
        .training;
  };
  CHECK((training("prodigy", "1.0").optimizer == "prodigy" && training("prodigy", "1.0").learning_rate == 1));
  for (const std::string& notice : notices) CHECK_FALSE(contains(notice, "optimizer"));
  CHECK((training("sgd", "0.1").optimizer == "sgd" && training("sgd", "0.1").momentum == 0));
  CHECK((training("radam", "0.001").optimizer == "radam" && training("radam", "0.001").weight_decay == 0));
  CHECK(training("rmsprop", "0.1").learning_rate == TrainingConfig().learning_rate);
  CHECK(contains(notices[1], "training.optimizer: rmsprop is not here; AdamW trains, with a learning rate of 0.0003"));
}

TEST_CASE("a configuration of ours may be YAML, and a published one JSON") {
  const std::string ours =
      "model: {n_layers: 1, emb_dim: 32, n_heads: 2, ffn_hidden_dim: [64]}\n"
      "training: {segment_length: 44100, batch_size: 1}\n";
  CHECK(to_json(parse_config(ours, "a.yaml")) ==
        to_json(parse_config(R"({"model": {"n_layers": 1, "emb_dim": 32, "n_heads": 2, "ffn_hidden_dim": [64]},
                                 "training": {"segment_length": 44100, "batch_size": 1}})",
                             "a.json")));
  const std::string json = parse_yaml(bs_roformer(), "a.yaml").dump();
  CHECK(to_json(parse_config(json, "a.json")) == to_json(parse_config(bs_roformer(), "b")));
}
