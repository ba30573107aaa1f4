// What a run leaves for those who watch it, and what models are validated by.
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <numbers>
#include <utility>

#include "headroom/memory/meter.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/run_record.hpp"
#include "headroom/training/validation.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tiny_separator.hpp"

using namespace headroom;
using namespace headroom::training;
using headroom::testing::contains;
using headroom::testing::error_of;
using headroom::testing::noise_examples;
using headroom::testing::read_bytes;
using headroom::testing::TemporaryFolder;
using headroom::testing::TinySeparator;
using headroom::testing::write_bytes;

namespace {

Config config_with(const std::string& training) {
  return parse_config(R"({
    "model": {"n_fft": 64, "hop_length": 32, "n_layers": 1, "emb_dim": 8, "n_heads": 2, "ffn_hidden_dim": [16]},
    "audio": {"sample_rate": 8000},
    "training": {"segment_length": 4000, "batch_size": 1, "steps_per_epoch": 4, "epochs": 3, "warmup_steps": 2)" +
                          training + R"(},
    "loss": {"windows": [256, 128], "hop": 64, "min_n_fft": 256}})",
                      "test");
}

/// Tones in the place of files: any piece of them is computed when it is read.
Tracks tones(std::vector<int64_t> frames) {
  Tracks tracks;
  tracks.frames = std::move(frames);
  tracks.read = [](int64_t track, int64_t first, int64_t count) {
    const torch::Tensor time = torch::arange(first, first + count, torch::kDouble) / 8000;
    std::vector<torch::Tensor> stems;
    for (const double hertz : {110.0, 330.0, 1000.0, 2500.0}) {
      const torch::Tensor tone = (time * (2 * std::numbers::pi * hertz * (1 + 0.1 * static_cast<double>(track)))).sin();
      stems.push_back(torch::stack({tone, 0.5 * tone}).to(torch::kFloat));
    }
    const torch::Tensor all = torch::stack(stems);  // [N,C,n]
    return Example{all.sum(0), all};
  };
  return tracks;
}

std::vector<Json> lines_of(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::vector<Json> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(Json::parse(line));
  return lines;
}

StepReport step_report(int64_t step) {
  return {.step = step,
          .epoch = 1 + step / 4,
          .epoch_step = 1 + step % 4,
          .steps_per_epoch = 4,
          .loss = 2,
          .step_loss = 1.0 / static_cast<double>(step),
          .learning_rate = 0.001,
          .gradient_norm = 0.5,
          .seconds = 0.25,
          .phases = {{"data", 0.125, 1000}, {"forward", 0.1, 3 << 20}},
          .live_bytes = 2000,
          .peak_bytes = 3 << 20,
          .examples = 8,
          .microbatch = 2};
}

Validation scores(double value) {
  return {{"vocals", "drums", "bass", "other"},
          {{"nsdr", core::with_mean({value, value + 2, std::nullopt, value + 4})}}};
}

}  // namespace

TEST_CASE("metrics.jsonl has each step and each validation once, however often a run is killed and resumed") {
  const TemporaryFolder folder;
  const auto path = folder / "metrics.jsonl";
  int64_t read = 0;
  const auto count = [&](const Json&) { ++read; };
  {
    MetricsFile file(path, 0, count);
    for (int64_t step = 1; step <= 6; ++step) {
      CHECK(file.append(step_line(step_report(step))).empty());
      if (step % 2 == 0) CHECK(file.append(validation_line(step, 1.5, scores(step))).empty());
    }
  }
  CHECK(read == 0);
  const std::vector<Json> whole = lines_of(path);
  REQUIRE(whole.size() == 9);
  CHECK(whole[0].dump() ==
        R"({"kind":"step","step":1,"epoch":1,"loss":1.0,"learning_rate":0.001,"gradient_norm":0.5,"examples":8,)"
        R"("seconds":0.25,"data_seconds":0.125,"live_bytes":2000,"peak_bytes":3145728,"microbatch":2,)"
        R"("phases":{"data":{"seconds":0.125,"peak_bytes":1000},"forward":{"seconds":0.1,"peak_bytes":3145728}}})");
  CHECK(whole[2].dump() == R"({"kind":"validation","step":2,"seconds":1.5,"scores":{"nsdr":{"vocals":2.0,"drums":4.0,)"
                           R"("bass":null,"other":6.0,"mean":4.0}}})");

  // Resumed from step 4: what came after is gone, the validation of step 4 stays and is not told twice
  const std::string bytes = read_bytes(path);
  for (const std::string& torn : {std::string(), std::string(R"({"kind":"st)"), std::string("no JSON\n")}) {
    write_bytes(path, bytes + torn);
    read = 0;
    MetricsFile file(path, 4, count);
    CHECK(read == 6);
    CHECK(file.append(validation_line(4, 9, scores(9))).empty());
    for (const int64_t step : {5, 6}) CHECK(file.append(step_line(step_report(step))).empty());
    CHECK(file.append(validation_line(6, 1.5, scores(6))).empty());
    CHECK(lines_of(path) == whole);
  }
  // Torn in the middle of a line that would have stayed
  write_bytes(path, bytes.substr(0, bytes.size() / 2));
  read = 0;
  MetricsFile half(path, 100, count);
  CHECK(read == 4);
  CHECK(half.append(step_line(step_report(7))).empty());
  CHECK(lines_of(path).size() == 5);
  CHECK(error_of([&] { MetricsFile(folder / "none" / "metrics.jsonl", 0, count); }).id() ==
        "headroom.training.metrics");
  const auto device = [&] { MetricsFile("/dev/null", 0, count); };  // opens, and cannot be cut to a length
  CHECK(contains(error_of(device).what(), "/dev/null: Invalid argument; choose another folder"));
}

TEST_CASE("a full disk costs lines of metrics.jsonl and pages, not the run") {
  const TemporaryFolder folder;
  std::vector<std::string> told;
  RunRecord record(folder.path(), config_with(""), 0, [&](const std::string& problem) { told.push_back(problem); });
  record.step(step_report(1));
  const std::string before = read_bytes(folder / "metrics.jsonl"), page = read_bytes(folder / "report.html");
  {
    const testing::FileSizeLimit full(before.size() + 10);
    for (int64_t step = 2; step < 8; ++step) record.step(step_report(step));
    record.validation(scores(3), 1);
  }
  REQUIRE(told.size() == 2);  // each problem once
  CHECK(contains(told[0], "metrics.jsonl: File too large; lines of it will be missing"));
  CHECK(contains(told[1], "report.html"));
  CHECK(read_bytes(folder / "metrics.jsonl") == before);  // no half lines
  CHECK(read_bytes(folder / "report.html") == page);
  record.step(step_report(8));
  CHECK(lines_of(folder / "metrics.jsonl").size() == 2);
}

TEST_CASE("what a folder of a run holds that no run wrote breaks neither its page nor the process") {
  const TemporaryFolder folder;
  const Config config = config_with("");
  const std::string deep = std::string(100'000, '[') + std::string(100'000, ']');
  const std::string line = R"({"kind":"step","step":1,"loss":2,"phases":{"forward":{"seconds":1,"peak_bytes":1e300}}})";
  const std::string address = R"("x\"><script>alert(1)</script>")";
  write_bytes(folder / "metrics.jsonl", line + "\n" + R"({"kind":"step","step":2,"more":)" + deep + "}\n");
  write_bytes(folder / "spectrograms.json", R"({"first":{"step":1,"more":)" + deep + R"(,"estimates":[)" + address +
                                                "," + address + "," + address + "," + address + "]}}");
  const Example example = noise_examples(0, 1, 4000);
  const auto fail = [](const std::string& problem) { FAIL(problem); };
  const auto page_after = [&] {
    RunRecord record(folder.path(), config, 3, fail);
    record.excerpt({example.mixture[0], example.stems[0]}, example.stems[0]);
    record.end("ended");
    return read_bytes(folder / "report.html");
  };
  CHECK(!contains(page_after(), "<script>"));
  CHECK(lines_of(folder / "metrics.jsonl") == std::vector{Json::parse(line)});  // what is too deep is no line of a run
  write_bytes(folder / "spectrograms.json",
              R"({"first":{"step":1,"estimates":[)" + address + "," + address + "," + address + "," + address + "]}}");
  const std::string page = page_after();
  CHECK(contains(page, "&lt;script&gt;"));
  CHECK(!contains(page, "<script>"));
}

TEST_CASE("the page of a run shows what its lines say, before and after it is resumed") {
  const TemporaryFolder folder;
  const Config config = config_with("");
  const auto fail = [](const std::string& problem) { FAIL(problem); };
  const Example example = noise_examples(0, 1, 4000);
  const Example truth{example.mixture[0], example.stems[0]};
  {
    RunRecord record(folder.path(), config, 0, fail);
    record.excerpt(truth, torch::zeros({4, 2, 4000}));
    for (int64_t step = 1; step <= 5; ++step) record.step(step_report(step));
    record.validation(scores(3.25), 1);
    record.excerpt(truth, truth.stems);
  }
  const Json before = Json::parse(read_bytes(folder / "spectrograms.json"));
  CHECK(before["first"]["step"] == 0);
  CHECK(before["last"]["step"] == 5);
  CHECK(before["last"]["estimates"] == before["truth"]);
  CHECK(before["first"]["estimates"][0] != before["truth"][0]);
  const std::string address = before["mixture"];
  CHECK(address.starts_with("data:image/bmp;base64,Qk0"));  // "BM"

  RunRecord record(folder.path(), config, 4, fail);
  for (int64_t step = 5; step <= 6; ++step) record.step(step_report(step));
  record.validation(scores(5.5), 1);
  record.excerpt(truth, truth.stems);
  record.end("ended");
  const Json after = Json::parse(read_bytes(folder / "spectrograms.json"));
  CHECK(after["first"] == before["first"]);
  CHECK(after["last"]["step"] == 6);
  const std::string page = read_bytes(folder / "report.html");
  for (const char* part : {"ended; written 2", "Validation: nSDR, dB", "vocals <b class=\"last\">5.5</b>",
                           "mean <b class=\"last\">7.5</b>", "Loss of a step", "Learning rate", "Norm of the gradient",
                           "Examples a second", ">32</b>", "Waiting for data, ms a step", ">125</b>",
                           "<td>forward<td class=\"n\">3.00 MiB", "estimate at step 0", "estimate at step 6"}) {
    INFO(part);
    CHECK(contains(page, part));
  }
  for (const char* part : {"http:", "https:", "<script", "nan", "inf\""}) CHECK_FALSE(contains(page, part));
}

TEST_CASE("a series has any number of values in bounded memory, with their mean and range") {
  Series series("loss");
  constexpr int64_t kSteps = 100'000;
  for (int64_t step = 1; step <= kSteps; ++step) {
    series.add(step, step % 1000 == 0 ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(step));
  }
  CHECK(series.points().size() <= Series::kMost);
  CHECK(series.points().size() >= Series::kMost / 2);
  CHECK(series.last() == kSteps - 1);
  double sum = 0;
  int64_t count = 0;
  for (const Series::Point& point : series.points()) {
    CHECK(point.mean == Approx(point.step));
    CHECK(point.least < point.mean);
    CHECK(point.greatest > point.mean);
    sum += point.mean * static_cast<double>(point.count);
    count += point.count;
  }
  CHECK(count == kSteps - kSteps / 1000);
  CHECK(sum == Approx((kSteps * (kSteps + 1.0) - 1000 * 100 * 101) / 2));
}

TEST_CASE("axes have round marks") {
  const auto marks = [](const training::detail::Axis& axis) { return axis.marks; };
  CHECK(marks(training::detail::linear_axis(0, 10, 5)) == std::vector<double>{0, 2, 4, 6, 8, 10});
  CHECK(marks(training::detail::linear_axis(-7, 18, 5)) == std::vector<double>{-5, 0, 5, 10, 15});
  CHECK(marks(training::detail::linear_axis(3, 3, 5)).size() >= 2);  // a constant has an axis, too
  const auto decades = marks(training::detail::logarithmic_axis(0.02, 300));
  REQUIRE(decades.size() == 4);
  CHECK(decades.front() == Approx(0.1));
}

TEST_CASE("a spectrogram has a tone in its row, at its level and its time") {
  const torch::Tensor time = torch::arange(16000) / 8000.0;
  torch::Tensor tone = (time * (2 * std::numbers::pi * 500)).sin();
  tone.slice(0, 8000) *= 0.1;  // from the middle on 20 dB less
  const torch::Tensor samples = torch::stack({tone, tone});
  const Spectrogram picture = spectrogram(samples, 8000, loudest(samples, 8000));
  const auto level = [&](int64_t row, int64_t column) {
    return int{picture.levels[static_cast<std::size_t>(row * Spectrogram::kColumns + column)]};
  };
  const double mel = core::detail::hertz_to_mel(500) / core::detail::hertz_to_mel(4000) * Spectrogram::kRows;
  const int64_t row = Spectrogram::kRows - 1 - static_cast<int64_t>(mel);
  CHECK(level(row, 60) >= 254);
  CHECK(level(row, 180) == Approx(255 * (1 - 20 / Spectrogram::kRange)).margin(1));
  CHECK(level(row + 20, 60) < 100);
  CHECK(level(row - 20, 60) < 100);
}

TEST_CASE("a whole track is scored by what its separation is, in pieces") {
  Config config = config_with(R"(, "validation_metrics": ["nsdr", "si_sdr", "l1_freq", "bleedless", "fullness"])");
  config.inference.normalize = GENERATE(false, true);
  torch::manual_seed(7);
  TinySeparator model(6, 0.5);
  model->train();
  const Tracks tracks = tones({9'001, 14'003});
  const Validation validation = validate_tracks(model, tracks, config);
  CHECK(model->is_training());
  CHECK(validation.scores.size() == 5);
  torch::NoGradGuard guard;
  for (std::size_t stem = 0; stem < 4; ++stem) {
    std::map<std::string, double> expected;
    for (int64_t track = 0; track < 2; ++track) {
      const Example whole = tracks.read(track, 0, tracks.frames[static_cast<std::size_t>(track)]);
      const torch::Tensor mono = whole.mixture.to(torch::kDouble).mean(0);
      const double mean = config.inference.normalize ? mono.mean().item<double>() : 0;
      const double deviation = config.inference.normalize ? mono.std(false).item<double>() : 1;
      const torch::Tensor made =
          audio::separate((whole.mixture - mean) / deviation, models::Separator(model),
                          {.segments = {.length = 4000, .overlap = 0.25}, .channels = 2, .stems = 4}) *
              deviation +
          mean;
      const auto rows = [&](const torch::Tensor& samples) {
        return training::detail::rows_of(samples[static_cast<int64_t>(stem)]);
      };
      const core::TrackScores scores = core::score_track(
          {.sources = 1, .channels = 2, .sample_rate = 8000, .metrics = config.training.validation_metrics},
          [&](auto&& on_block) {
            on_block(core::TrackBlock{rows(whole.stems), rows(made), training::detail::rows_of(whole.mixture)});
          });
      for (const auto& [metric, values] : scores.metrics) expected[metric] += *values.front() / 2;
    }
    for (const auto& [metric, value] : expected) {
      INFO(metric << " of stem " << stem);
      CHECK(*validation.scores.at(metric)[stem] == Approx(value).epsilon(1e-5));
    }
  }
  CHECK(validation.mean("nsdr") ==
        Approx(*core::mean_of({validation.scores.at("nsdr").begin(), validation.scores.at("nsdr").end() - 1})));
}

TEST_CASE("whole tracks are scored in the memory of a segment, whatever their length") {
  const Config config = config_with(R"(, "validation_metrics": ["nsdr", "si_sdr", "l1_freq", "fullness"])");
  TinySeparator model(6, 0.5);
  const MemoryMeter meter;
  const auto peak = [&](int64_t frames) {
    const Tracks tracks = tones({frames});
    return meter.measure([&] { validate_tracks(model, tracks, config); }).added_peak();
  };
  const int64_t once = peak(400'000), four_times = peak(1'600'000);
  CHECK(four_times <= once + 4096);
  CHECK(once < int64_t{400'000} * 8 * 4);  // the stems of the shorter track
}

TEST_CASE("estimates of a track that the folder for temporary files cannot keep are an error of validation") {
  const Config config = config_with(R"(, "validation_metrics": ["nsdr", "fullness"])");
  TinySeparator model(6, 0.5);
  const Tracks tracks = tones({9'001});
  for (const char* folder : {"/proc", "/there is no such folder"}) {
    const testing::TemporaryFilesIn nowhere(folder);
    const Error error = testing::error_of([&] { validate_tracks(model, tracks, config); });
    CHECK(error.id() == "headroom.training.validation_file");
    CHECK(testing::contains(error.what(), std::string(folder) + ": No such file or directory"));
  }
}

TEST_CASE("segments are scored as one recording") {
  Config config = config_with(R"(, "validation_segments": 3, "validation_metrics": ["nsdr", "bleedless"])");
  torch::manual_seed(7);
  TinySeparator model(6, 0.5);
  model->train();
  const auto source = [](int64_t first, int64_t count) { return noise_examples(first, count, 4000); };
  const Validation validation = validate_segments(model, source, config);
  CHECK(model->is_training());
  model->eval();
  torch::NoGradGuard guard;
  const Example all = source(0, 3);
  const torch::Tensor error = (model->forward(all.mixture) - all.stems).to(torch::kDouble).square().sum({0, 2, 3});
  const torch::Tensor energy = all.stems.to(torch::kDouble).square().sum({0, 2, 3});
  CHECK(validation.mean("nsdr") == Approx((10 * (energy / error).log10()).mean().item<double>()).epsilon(1e-5));
  CHECK(validation.scores.at("bleedless").size() == 5);

  // Stems that are silent say nothing and are left out of the mean
  const auto with_scale = [&](double first, double second) {
    const BatchSource scaled = [=](int64_t index, int64_t count) {
      Example example = source(index, count);
      example.stems = example.stems * torch::tensor({first, second, first, second}).view({1, 4, 1, 1});
      return example;
    };
    return validate_segments(model, scaled, config).mean("nsdr");
  };
  const double sounding = with_scale(1, 0);
  CHECK(std::abs(sounding) < 20);  // the energy of an error over that of silence would give -70 and less
  CHECK((sounding + with_scale(0, 1)) / 2 == Approx(with_scale(1, 1)));
  const Error silent = error_of([&] { with_scale(0, 0); });
  CHECK(silent.id() == "headroom.training.validation_silent");
  CHECK(contains(silent.what(), "nSDR"));
}
