#include "headroom/training/config.hpp"

#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "headroom/training/course.hpp"
#include "headroom/training/score_json.hpp"
#include "headroom/training/split.hpp"
#include "support/catch.hpp"
#include "support/config_problems.hpp"
#include "support/transformer_options.hpp"

using namespace headroom;
using namespace headroom::training;
using headroom::testing::contains;
using headroom::testing::error_of;
using headroom::testing::transformer;

namespace {

const std::filesystem::path kRoot = HEADROOM_SOURCE_DIR;

const std::string kSmallest = R"({
  "model": {"n_layers": 1, "emb_dim": 32, "n_heads": 2, "ffn_hidden_dim": [64]},
  "training": {"segment_length": 44100, "batch_size": 1}
})";

/// kSmallest with `members` (a JSON object of sections) laid over it.
std::string with(const std::string& members) {
  nlohmann::json json = nlohmann::json::parse(kSmallest);
  json.merge_patch(nlohmann::json::parse(members));
  return json.dump();
}

std::vector<std::string> problems_of(const std::string& text) { return testing::problems_in(text, "a.json"); }

using Lines = std::vector<std::string>;

}  // namespace

TEST_CASE("words for what can be chosen are those that a configuration takes") {
  const auto options = [](const std::string& layout, const std::string& missing, const std::string& draw) {
    return dataset_options(parse_config(
        with(R"({"data": {"layout": ")" + layout + R"(", "missing": ")" + missing + R"(", "draw": ")" + draw + "\"}}"),
        "a.json"));
  };
  const DatasetOptions first = options("automatic", "error", "uniform");
  CHECK(first.layout == Layout::automatic);
  CHECK(first.missing == MissingStem::error);
  CHECK(first.draw == TrackDraw::uniform);
  const DatasetOptions second = options("tracks", "leave_out", "by_length");
  CHECK(second.layout == Layout::tracks);
  CHECK(second.missing == MissingStem::leave_out);
  CHECK(second.draw == TrackDraw::by_length);
  const DatasetOptions third = options("stems", "silence", "by_stem");
  CHECK(third.layout == Layout::stems);
  CHECK(third.missing == MissingStem::silence);
  CHECK(third.draw == TrackDraw::by_stem);
  CHECK(options("csv", "error", "uniform").layout == Layout::csv);

  Config config = parse_config(kSmallest, "a.json");
  config.data.layout = "folders";
  CHECK(error_of([&] { dataset_options(config); }).what() ==
        std::string("[headroom.training.config] got \"folders\", expected one of automatic, tracks, stems, csv"));
  config.training.schedule = "steep";
  CHECK(contains(error_of([&] { schedule_of(config.training); }).what(), "got \"steep\", expected one of cosine"));
}

TEST_CASE("scores become JSON by stem") {
  CHECK(score_json({"vocals", "bass"}, {1.5, std::nullopt, 1.5}).dump() == R"({"vocals":1.5,"bass":null,"mean":1.5})");
}

TEST_CASE("a configuration needs six keys, the rest has defaults") {
  const Config config = parse_config(kSmallest, "a.json");
  CHECK(transformer(config).n_fft() == 4096);
  CHECK(transformer(config).hop_length() == 1024);
  CHECK(transformer(config).ffn_hidden_dim() == std::vector<int64_t>{64});
  CHECK(config.audio.stems == std::vector<std::string>{"vocals", "drums", "bass", "other"});
  CHECK(config.training.segment_length == 44100);
  CHECK(config.training.gradient_accumulation_steps == 1);

  const Lines missing = problems_of("{}");
  std::set<std::string> paths;
  for (const std::string& line : missing) {
    CHECK(contains(line, ": missing; expected "));
    paths.insert(line.substr(0, line.find(':')));
  }
  CHECK(paths == std::set<std::string>{"model.n_layers", "model.emb_dim", "model.n_heads", "model.ffn_hidden_dim",
                                       "training.segment_length", "training.batch_size"});
}

TEST_CASE("every member is read, and written back as it was read") {
  // Each member differs from its default, so one that is described twice or not at all shows
  const std::string text = R"({
    "model": {"type": "time_frequency_transformer", "n_fft": 2048, "hop_length": 512, "n_layers": 3, "emb_dim": 64, "n_heads": 4, "ffn_hidden_dim": [128, 96],
              "gradient_checkpointing": true, "reversible": false, "attention": "tiled"},
    "audio": {"sample_rate": 48000, "channels": 1, "stems": ["vocals", "rest"]},
    "data": {"path": "music \"1\"", "more_paths": ["more"], "weights": [1, 2.5], "layout": "stems", "missing": "silence", "damaged": "leave_out", "convert": true, "accompaniment": ["noise"], "draw": "by_length", "remix": 0.5, "augment_aligned": true, "gain": [0.5, 0.75], "swap_channels": false, "flip_polarity": false,
             "mixup": [0.2, 0.02], "equalizer": 0.1, "equalizer_db": [-3, 2], "pitch": 0.2, "pitch_semitones": [-5, 7], "tempo": 0.3,
             "tempo_factor": [0.5, 2], "noise": 0.4, "noise_db": [-60, -50]},
    "training": {"segment_length": 30000, "batch_size": 2, "gradient_accumulation_steps": 3, "steps_per_epoch": 7,
                 "epochs": 11, "learning_rate": 0.1, "warmup_steps": 5, "min_learning_rate_ratio": 0.5,
                 "weight_decay": 0.25, "betas": [0.8, 0.95], "clip_grad_norm": 0, "bf16": true,
                 "optimizer": "radam", "momentum": 0.5, "schedule": "linear", "plateau_patience": 3, "plateau_factor": 0.25,
                 "ema_decay": 0.5, "freeze": [], "optimizer_state": "8bit", "optimizer_in_backward": false, "split_on_out_of_memory": true, "seed": 9007199254740993,
                 "skip_non_finite": 7, "checkpoint_every": 2, "checkpoint_every_steps": 8, "checkpoint_every_minutes": 2.5,
                 "checkpoints_kept": 9, "validation_every": 3, "validation_segments": 4, "validation": "tracks",
                 "validation_metrics": ["nsdr", "si_sdr"], "best_metric": "si_sdr", "patience": 6, "log_every": 2,
                 "read_ahead": 5, "reader_threads": 6},
    "loss": {"l1_weight": 2, "mse_weight": 0.5, "masked_weight": 0, "masked_quantile": 0.5, "masked_by_example": false,
             "stft_weight": 0.3, "windows": [1024], "hop": 100, "min_n_fft": 512, "log_wmse_weight": 0.1, "frequency_weight": 0.2},
    "lora": {"rank": 4, "alpha": 2, "layers": ["*.to_qkv", "*.to_out"]},
    "inference": {"segment_length": 40000, "overlap": 0.5, "batch": 3, "normalize": true}
  })";
  const Config config = parse_config(text, "a.json");
  const nlohmann::json given = nlohmann::json::parse(text);
  CHECK(nlohmann::json::parse(to_json(config)) == given);
  CHECK(config.training.seed == 9007199254740993);  // not through a double
  CHECK(config.training.betas == std::array<double, 2>{0.8, 0.95});
  CHECK(to_json(parse_config(to_json(config), "again")) == to_json(config));

  const nlohmann::json defaults = write_described(Config{});
  for (const auto& [section, members] : defaults.items()) {
    for (const auto& [key, value] : members.items()) {
      if (key == "reversible") continue;  // not together with gradient_checkpointing
      if (key == "type") continue;        // other types have other keys
      INFO(section << "." << key);
      if (key == "optimizer_in_backward" || key == "freeze" || key == "masked_weight") continue;  // exclude others
      CHECK(given[section][key] != value);
    }
  }
}

TEST_CASE("gradient_checkpointing is true, false or a checkpoint policy") {
  const auto read = [](const std::string& value) {
    return parse_config(with(R"({"model": {"gradient_checkpointing": )" + value + "}}"), "a.json");
  };
  CHECK(read("true").model.gradient_checkpointing == headroom::CheckpointPolicy("full"));
  CHECK(read("false").model.gradient_checkpointing == headroom::CheckpointPolicy("none"));
  CHECK(read("\"full\"").model.gradient_checkpointing == headroom::CheckpointPolicy(true));
  const Config tiled = read("\"tiled+offload\"");
  CHECK(tiled.model.gradient_checkpointing == headroom::CheckpointPolicy("tiled+offload"));
  CHECK(parse_config(to_json(tiled), "again").model.gradient_checkpointing == tiled.model.gradient_checkpointing);
  const Config mixed = read("\"2*full,none\"");
  CHECK(mixed.model.gradient_checkpointing == headroom::StackPolicy("2*full,none"));
  CHECK(parse_config(to_json(mixed), "again").model.gradient_checkpointing == mixed.model.gradient_checkpointing);
  const Lines many = problems_of(with(R"({"model": {"gradient_checkpointing": "2000*full,none"}})"));
  REQUIRE(many.size() == 1);
  CHECK(contains(many[0], "model.gradient_checkpointing: got \"2000*full,none\", which names 2000 blocks, expected"));
  const Lines problems = problems_of(with(R"({"model": {"gradient_checkpointing": "tield"}})"));
  REQUIRE(problems.size() == 1);
  CHECK(
      contains(problems[0], "model.gradient_checkpointing: got \"tield\", expected true, false or one of none, full"));
  CHECK(problems_of(with(R"({"model": {"gradient_checkpointing": 3}})")).size() == 1);
  for (const char* deep : {"nested-100000", "nested-17", "100000000000000*full,none"}) {
    const Lines refused = problems_of(with(R"({"model": {"gradient_checkpointing": ")" + std::string(deep) + R"("}})"));
    REQUIRE(refused.size() == 1);
    CHECK(contains(refused[0], "model.gradient_checkpointing: got \"" + std::string(deep)));
  }
  CHECK_NOTHROW(read("\"nested-16\""));

  CHECK(transformer(parse_config(with(R"({"model": {"reversible": true}})"), "a.json")).reversible());
  const Lines both = problems_of(with(R"({"model": {"reversible": true, "gradient_checkpointing": true}})"));
  REQUIRE(both.size() == 1);
  CHECK(contains(both[0], "model.reversible: got true, expected false or no model.gradient_checkpointing"));
}

TEST_CASE("all problems of a configuration are told at once, each with its path and what to write") {
  CHECK(problems_of(with(R"({
          "model": {"n_fft": 4096.5, "n_head": 3, "n_heads": "4", "ffn_hidden_dim": [64, -1], "attention": "tield",
                    "batch_size": 3},
          "training": {"batch_size": 1e3, "betas": [0.9], "learning_rate": 0, "bf16": 1, "seed": 18446744073709551615},
          "audio": {"stems": []}, "trainnig": {}, "loss": 3})")) ==
        Lines{"model.n_fft: got 4096.5, expected an integer >= 16 and <= 1048576",
              "model.n_heads: got \"4\", expected an integer >= 1 and <= 1048576",
              "model.ffn_hidden_dim[1]: got -1, expected an integer >= 1 and <= 1048576",
              "model.attention: got \"tield\", expected one of \"automatic\", \"tiled\", \"reference\"",
              "model.batch_size: unknown key; it belongs to `training`",
              "model.n_head: unknown key; did you mean `n_heads`?",
              "audio.stems: got [], expected a list of one or more plain file names",
              "training.batch_size: got 1000.0, expected an integer >= 1 and <= 1000000",
              "training.learning_rate: got 0, expected a number > 0 and <= 10",
              "training.betas: got [0.9], expected a list of 2 numbers >= 0 and < 1",
              "training.bf16: got 1, expected true or false",
              "training.seed: got 18446744073709551615, expected an integer >= 0",
              "loss: got 3, expected an object {...}", "trainnig: unknown key; did you mean `training`?"});
  CHECK(problems_of(with(R"({"colour": 1})")) == Lines{"colour: unknown key; remove it"});
  CHECK(problems_of("[]") == Lines{"the document: got [], expected an object {...}"});
}

TEST_CASE("a stem is the plain name of a file: it becomes a path") {
  for (const char* name :
       {"../X", "/tmp/X", "a/b", "a\\\\b", "..", ".", ".hidden", "", "a\\u0000b", "a\\nb", "a\\u007fb"}) {
    const Lines problems = problems_of(with(R"({"audio": {"stems": ["bass", ")" + std::string(name) + R"("]}})"));
    INFO(name);
    REQUIRE(problems.size() == 1);
    CHECK(contains(problems[0], "audio.stems[1]: got \""));
    CHECK(contains(problems[0], ", expected the plain name of a file"));
  }
  const std::string longest(200, 'x');
  CHECK(problems_of(with(R"({"audio": {"stems": [")" + longest + R"(x"]}})")).size() == 1);
  CHECK_NOTHROW(
      parse_config(with(R"({"audio": {"stems": [")" + longest + R"(", "lead vocals", "Gesänge", "a..b"]}})"), "a"));
}

TEST_CASE("values that are impossible together are refused") {
  const auto only = [](const std::string& members) {
    const Lines lines = problems_of(with(members));
    REQUIRE(lines.size() == 1);
    return lines[0];
  };
  CHECK(only(R"({"model": {"n_heads": 5}})") ==
        "model.n_heads: got 5, expected a divisor of model.emb_dim, which is 32");
  CHECK(
      only(R"({"model": {"n_heads": 32}})") ==
      "model.n_heads: got 32, expected an even head dimension for the rotary embedding, emb_dim 32 / 32 heads is odd");
  CHECK(only(R"({"model": {"n_fft": 4095}})") == "model.n_fft: got 4095, expected an even number");
  CHECK(only(R"({"model": {"hop_length": 2049}})") ==
        "model.hop_length: got 2049, expected at most half of model.n_fft, which is 4096, else the spectrum has no "
        "inverse");
  CHECK(only(R"({"training": {"segment_length": 4095}, "loss": {"stft_weight": 0}})") ==
        "training.segment_length: got 4095, expected at least model.n_fft, which is 4096");
  CHECK(only(R"({"training": {"segment_length": 4095}, "model": {"n_fft": 1024, "hop_length": 256}})") ==
        "training.segment_length: got 4095, expected at least the longest window of loss.windows and loss.min_n_fft, "
        "which is 4096");
  CHECK(only(R"({"training": {"epochs": 1, "warmup_steps": 51}})") ==
        "training.warmup_steps: got 51, expected at most half of the run, which is training.epochs * "
        "training.steps_per_epoch = 100 steps");
  CHECK(
      contains(only(R"({"training": {"optimizer_in_backward": true}})"),
               "training.optimizer_in_backward: got true, expected false with training.clip_grad_norm = 1: the norm"));
  CHECK(contains(only(R"({"training": {"optimizer_in_backward": true, "clip_grad_norm": 0,
                                       "gradient_accumulation_steps": 2}})"),
                 "expected false with training.gradient_accumulation_steps = 2: every backward pass is a step"));
  CHECK(contains(only(R"({"training": {"optimizer_in_backward": true, "clip_grad_norm": 0,
                                       "split_on_out_of_memory": true}})"),
                 "expected false with training.split_on_out_of_memory = true"));
  CHECK(contains(only(R"({"training": {"segment_length": 1000000000, "batch_size": 1000000}})"),
                 "training.segment_length: got 1000000000, which with training.batch_size 1000000 makes a tensor of "));
  CHECK(only(R"({"data": {"gain": [1, 0.5]}})") == "data.gain: got [1,0.5], expected the smaller number first");
  CHECK(only(R"({"audio": {"stems": ["bass", "bass"]}})") == "audio.stems: got a name twice, expected different stems");
  CHECK(only(R"({"data": {"weights": [1, 2]}})") ==
        "data.weights: got 2 numbers, expected none or 1: one for data.path and each of data.more_paths");
  CHECK(only(R"({"data": {"accompaniment": ["noise", "bass"]}})") ==
        "data.accompaniment: got a name twice, or that of a stem, expected other files");
  CHECK(parse_config(with(R"({"training": {"optimizer_in_backward": true, "clip_grad_norm": 0}})"), "a")
            .training.optimizer_in_backward);
  CHECK_NOTHROW(parse_config(with(R"({"model": {"hop_length": 2048}, "training": {"segment_length": 4096}})"), "a"));
}

TEST_CASE("factors that float does not hold are refused") {
  CHECK(problems_of(with(R"({"training": {"clip_grad_norm": 1e308}})")) ==
        Lines{"training.clip_grad_norm: got 1e+308, expected a number >= 0 and <= 1e+30"});
  CHECK(problems_of(with(R"({"loss": {"stft_weight": 1e308}})")) ==
        Lines{"loss.stft_weight: got 1e+308, expected a number >= 0 and <= 1e+30"});
}

TEST_CASE("two configurations are compared member by member") {
  const Config before = parse_config(kSmallest, "a");
  CHECK(differences(before, before).empty());
  Config after = before;
  after.audio.stems = {"vocals", "rest"};
  after.training.betas[1] = 0.5;
  const auto found = differences(before, after);
  REQUIRE(found.size() == 2);
  CHECK(describe(found[0]) == R"(audio.stems: ["vocals","drums","bass","other"] became ["vocals","rest"])");
  CHECK(found[0].bound);
  CHECK(describe(found[1]) == "training.betas: [0.9,0.999] became [0.9,0.5]");
  CHECK_FALSE(found[1].bound);
}

TEST_CASE("text that is not JSON is located by line and column") {
  const auto message_of = [](const std::string& text) {
    const Error error = error_of([&] { parse_config(text, "b.json"); });
    CHECK(error.id() == "headroom.training.json");
    return std::string(error.what());
  };
  const std::string message = message_of("{\n  \"model\": {\n    \"n_fft\": 4096,,\n");
  CHECK(contains(message, "b.json: line 3, column 19: syntax error"));
  CHECK(contains(message_of(""), "line 1, column 1"));
  CHECK(contains(message_of("{\n  \"model\" 3\n}"), "line 2, column 11"));  // a token before a line's end
  CHECK(contains(message_of("{\"a\": 1e999}"), "number overflow"));
  CHECK(contains(message_of("{\"model\": {\"n_fft\": 1, \"n_fft\": 2}}"), "`n_fft` is given twice"));
  CHECK(contains(message_of(R"({"a": [1, {"b": 1, "b": 2}]})"), "a[1].b: the key `b` is given twice"));
  CHECK_NOTHROW(parse_config("// a\n/* b */" + kSmallest, "c"));
  CHECK(error_of([] { load_config("no/such/file.json"); }).id() == "headroom.training.config_file");
  CHECK(error_of([] { load_config("."); }).id() == "headroom.training.config_file");
}

TEST_CASE("lists and objects lie at most 32 deep") {
  const auto nested = [](std::size_t lists, const std::string& inside) {
    return with("{}").substr(0, with("{}").size() - 1) + ", \"x\": " + std::string(lists, '[') + inside +
           std::string(lists, ']') + "}";
  };
  const Error error = error_of([&] { parse_config(nested(100000, ""), "d.json"); });
  CHECK(error.id() == "headroom.training.json");
  CHECK(contains(error.what(), "d.json: x[0][0]"));
  CHECK(contains(error.what(), ": lists and objects lie 32 deep here"));
  CHECK(contains(error_of([&] { parse_config(nested(30, "1, {\"y\": [[]]}"), "d.json"); }).what(), "[0][1].y: lists"));
  CHECK(problems_of(nested(31, "")) == Lines{"x: unknown key; remove it"});
}

TEST_CASE("the example configurations load and hold the guide's values") {
  int loaded = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kRoot / "examples/configs")) {
    INFO(entry.path());
    CHECK_NOTHROW(load_config(entry.path()));
    ++loaded;
  }
  CHECK(loaded == 6);

  const auto row = [](const char* name) {
    const Config c = load_config(kRoot / "examples/configs" / (std::string(name) + ".json"));
    CHECK((transformer(c).n_fft() == 4096 && transformer(c).hop_length() == 1024));
    CHECK(transformer(c).emb_dim() / transformer(c).n_heads() == 16);
    return std::vector<int64_t>{c.training.segment_length, transformer(c).n_layers(), transformer(c).emb_dim(),
                                c.training.batch_size, c.training.gradient_accumulation_steps};
  };
  CHECK(row("musdb18_xlarge") == std::vector<int64_t>{661500, 12, 256, 8, 2});
  CHECK(row("musdb18_memory_optimized_first") == std::vector<int64_t>{441000, 8, 192, 1, 8});
  CHECK(row("musdb18_memory_optimized") == std::vector<int64_t>{220500, 6, 128, 1, 1});
  CHECK(row("musdb18_small") == std::vector<int64_t>{132300, 4, 96, 1, 1});
  CHECK(row("musdb18_ultra_safe") == std::vector<int64_t>{132300, 4, 96, 1, 4});
}

TEST_CASE("the documentation has the table of all keys") {
  std::ifstream file(kRoot / "docs/070_training.md");
  std::ostringstream text;
  text << file.rdbuf();
  CHECK(contains(text.str(), config_table()));
}
