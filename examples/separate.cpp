// separate: splits a recording of any length into the stems of a trained model, in the memory of one segment.
//
//   separate --model experiments/small/best.pt song.wav separated/song

#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <iomanip>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "command_line.hpp"
#include "headroom/audio/separate_file.hpp"
#include "headroom/io/process.hpp"
#include "headroom/training/load_model.hpp"

namespace fs = std::filesystem;
namespace audio = headroom::audio;

namespace {

// One line that is written over on a terminal, a line every tenth of the way elsewhere.
class ProgressLine {
 public:
  void show(std::int64_t done, std::int64_t total) {
    const double share = static_cast<double>(done) / static_cast<double>(total);
    if (!terminal_ && share < next_ && done < total) {
      return;
    }
    next_ = share + 0.1;
    const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    std::cerr << (terminal_ ? "\r" : "") << std::setw(3) << static_cast<int>(100 * share) << "%, " << time(elapsed)
              << " elapsed, " << time(elapsed / share - elapsed) << " left" << (terminal_ && done < total ? "  " : "\n")
              << std::flush;
  }

 private:
  static std::string time(double seconds) {
    const auto s = static_cast<long>(seconds + 0.5);
    const std::string rest = std::to_string(s % 60);
    return std::to_string(s / 60) + (rest.size() < 2 ? ":0" : ":") + rest;
  }

  bool terminal_ = isatty(STDERR_FILENO) != 0;
  double next_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

struct Arguments {
  fs::path model, config, input, output;
  std::optional<double> overlap;
  std::int64_t segment = 0;  // 0: as trained
  audio::Encoding encoding = audio::Encoding::pcm16;
  int threads = 0;  // 0: LibTorch's choice
  std::string device = "cpu";
  bool overwrite = false;
};

// Where the stems go. What is there already is not replaced unasked: it may be the true stems of the recording.
std::vector<fs::path> output_paths(const Arguments& arguments, const std::vector<std::string>& stems) {
  std::error_code failure;
  fs::create_directories(arguments.output, failure);
  headroom::require(fs::is_directory(arguments.output), "headroom.separate.output", "can't make the folder ",
                    arguments.output, ": ", failure.message(), "; choose another output folder");
  std::vector<fs::path> outputs;
  for (const std::string& stem : stems) {
    outputs.push_back(arguments.output / (stem + ".wav"));
    headroom::require(arguments.overwrite || !fs::exists(outputs.back(), failure), "headroom.separate.exists",
                      outputs.back(), " is there already; choose another output folder or give --overwrite");
  }
  return outputs;
}

void run(const Arguments& arguments) {
  if (arguments.threads > 0) {
    torch::set_num_threads(arguments.threads);
  }
  headroom::io::handle_stop_signals(headroom::io::OnStop::finish_first);
  std::vector<std::string> notices;
  auto [config, model] =
      headroom::training::load_model({.weights = arguments.model, .config = arguments.config}, &notices);
  for (const std::string& notice : notices) std::cerr << "separate: " << notice << '\n';
  const torch::Device device = find_device(arguments.device);
  model->to(device);

  const std::vector<fs::path> outputs = output_paths(arguments, config.audio.stems);
  const double overlap = arguments.overlap.value_or(config.inference.overlap);
  if (overlap == 0) {
    std::cerr << "separate: without overlap segments don't fade into each other, their borders may click; --overlap "
                 "0.25 avoids it\n";
  }
  const audio::SeparatorOptions options{
      .segments = {.length = arguments.segment > 0 ? arguments.segment : config.inference_segment(),
                   .overlap = overlap},
      .channels = config.audio.channels,
      .stems = static_cast<std::int64_t>(outputs.size()),
      .device = device};

  ProgressLine line;
  const std::int64_t clipped =
      audio::separate_file(arguments.input, outputs, model, options, static_cast<int>(config.audio.sample_rate),
                           arguments.encoding, [&](std::int64_t done, std::int64_t total) {
                             headroom::require(headroom::io::stop_signal() == 0, "headroom.separate.interrupted",
                                               "stopped by a signal; no stem was written");
                             line.show(done, total);
                           });
  for (const fs::path& path : outputs) {
    std::cout << path.string() << '\n';
  }
  if (clipped > 0) {
    std::cerr << "separate: " << clipped << " samples were beyond full scale and clipped; --format wav32f keeps them\n";
  }
}

}  // namespace

int main(int argc, char** argv) {
  CommandLine line("Separates a recording into stems: OUTDIR/<stem>.wav for each stem of the model.");
  Arguments arguments;
  const std::map<std::string, audio::Encoding> encodings = {
      {"wav16", audio::Encoding::pcm16}, {"wav24", audio::Encoding::pcm24}, {"wav32f", audio::Encoding::float32}};
  std::string format = "wav16";
  line.path("--model,--weights", arguments.model,
            "saved state or .safetensors written by train; with --config any .ckpt, .pth or .safetensors")
      .required();
  line.path("--config", arguments.config, "configuration of the weights, also one that was published with them");
  line.path("INPUT", arguments.input,
            "recording: WAV, FLAC, AIFF or Ogg, with the model's sample rate; - is the standard input")
      .required();
  line.path("OUTDIR", arguments.output, "folder for the stems, made if it is not there").required();
  line.number("--overlap", arguments.overlap, Bounds<double>{0, 0.999},
              "share of a segment that the next one covers again; default: as configured, 0.25");
  line.number("--segment", arguments.segment, Bounds<std::int64_t>{1, 1'000'000'000},
              "samples the model works on at a time; default: as configured");
  line.flag("--overwrite", arguments.overwrite, "replace stems that are in OUTDIR already");
  line.text("--format", format, "wav16, wav24 (integers) or wav32f (float)")
      .one_of({"wav16", "wav24", "wav32f"})
      .with_default();
  line.number("--threads", arguments.threads, Bounds<int>{1, 1024}, "CPU threads; default: one a core");
  line.text("--device", arguments.device, "where the model runs, e.g. cpu or cuda").with_default();
  return line.run("separate", argc, argv, [&] {
    arguments.encoding = encodings.at(format);
    run(arguments);
    return 0;
  });
}
