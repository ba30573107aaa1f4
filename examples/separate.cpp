// separate: splits recordings of any length into the stems of a trained model, in the memory of one segment.
//
//   separate --model experiments/small/best.pt song.wav separated/song
//   separate --model experiments/small/best.pt --format flac24 --two-stems vocals albums separated
//   separate --model one.pt --model other.pt --ensemble median song.mp3 separated/song

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iostream>
#include <map>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "command_line.hpp"
#include "headroom/audio/ensemble.hpp"
#include "headroom/audio/separate_file.hpp"
#include "headroom/core/segments.hpp"
#include "headroom/io/process.hpp"
#include "headroom/memory/tensor_arena.hpp"
#include "new_folder.hpp"
#include "separation_blend.hpp"
#include "separation_inputs.hpp"
#include "separation_models.hpp"
#include "separation_outputs.hpp"
#include "separation_progress.hpp"

namespace fs = std::filesystem;
namespace audio = headroom::audio;

namespace {

const std::map<std::string, audio::Encoding> kFormats = {{"wav16", audio::Encoding::pcm16},
                                                         {"wav24", audio::Encoding::pcm24},
                                                         {"wav32f", audio::Encoding::float32},
                                                         {"flac16", audio::Encoding::flac16},
                                                         {"flac24", audio::Encoding::flac24}};

constexpr auto kOutput = "headroom.separate.output";

struct Arguments {
  std::vector<fs::path> models, configs;
  std::vector<fs::path> paths;  // the inputs and the output folder
  std::string ensemble = "mean";
  BlendChoice blend;
  std::string format = "wav16";
  OutputChoice choice;
  std::string name;  // empty: {stem} for one file, {track}/{stem} else
  std::string device = "cpu";
  bool raw_weights = false, overwrite = false;
};

// What separates, and into what.
struct Separation {
  SeparationModels models;
  audio::FileSeparation files;  // of the recording in work
};

void notice(const std::string& text) { std::cerr << "separate: " << printable(text) << '\n'; }

// Separates one recording into separation.files and returns the number of clipped samples.
std::int64_t separate_track(Track& track, Separation& separation, SeparationProgress& progress) {
  std::vector<NewFolder> folders;
  for (const audio::StemFile& file : separation.files.outputs) folders.emplace_back(file.path.parent_path(), kOutput);
  try {
    audio::AudioReader recording = track.open();
    const audio::Ensemble ensemble = ensemble_for(recording, separation.models);
    return audio::separate_file(std::move(recording), separation.files, ensemble,
                                [&](std::int64_t done, std::int64_t total) {
                                  headroom::require(headroom::io::stop_signal() == 0, "headroom.separate.interrupted",
                                                    "stopped by a signal; nothing of ", track.file, " was written");
                                  progress.show(done, total);
                                });
  } catch (...) {
    progress.close();
    throw;
  }
}

// Separates one recording after the other. What is wrong with one is kept for the end; a signal ends all.
void separate_tracks(Tracks& found, const std::vector<std::vector<audio::StemFile>>& files, Separation& separation) {
  SeparationProgress progress(found.tracks);
  std::int64_t clipped = 0;
  for (std::size_t i = 0; i < found.tracks.size(); ++i) {
    Track& track = found.tracks[i];
    separation.files.outputs = files[i];
    progress.begin(track);
    bool whole = false;
    try {
      clipped += separate_track(track, separation, progress);
      for (const audio::StemFile& file : files[i]) std::cout << file.path.string() << std::endl;
      whole = true;
    } catch (const headroom::Error& error) {
      if (headroom::io::stop_signal() != 0) throw;
      found.errors.push_back(error.what());
    }
    progress.end(whole);
  }
  if (clipped > 0) {
    notice(std::to_string(clipped) + " samples were beyond full scale and clipped; --format wav32f keeps them");
  }
}

// Tells how many files have which other sample rate.
void tell_rates(const std::vector<Track>& tracks, int sample_rate) {
  for (const std::string& files : other_rates(tracks, sample_rate)) {
    notice(files + ": resampled to the model's " + std::to_string(sample_rate) + " Hz, and the stems back");
  }
}

void warn_of_borders(const headroom::core::Segments& segments) {
  if (headroom::core::segment_step(segments) == segments.length) {
    notice("without overlap segments don't fade into each other, their borders may click; --overlap 0.25 avoids it");
  }
}

int run(Arguments arguments) {
  fs::path output = arguments.paths.back();
  if (!output.has_filename()) output = output.parent_path();  // without the separator at its end
  arguments.paths.pop_back();
  SeparationModels models;
  models.ensemble.combination = combinations().at(arguments.ensemble);
  const torch::Device device = find_device(arguments.device);
  headroom::TensorArena::install();  // an hour of segments takes the memory of a minute of them
  for (auto& source : model_sources(arguments.models, arguments.configs, needed_stems(arguments.choice))) {
    source.files.averaged = !arguments.raw_weights;
    for (const std::string& text : add_model(source, arguments.blend, device, models)) notice(text);
  }
  models.ensemble.check();
  const std::vector<NamedSum> sums = chosen_sums(models.ensemble.stems(), arguments.choice);

  std::error_code failure;
  const bool one = arguments.paths.size() == 1 && !fs::is_directory(arguments.paths.front(), failure);
  Tracks found = find_tracks(arguments.paths, output);
  const OutputNames names{output,
                          !arguments.name.empty() ? arguments.name
                          : one                   ? "{stem}"
                                                  : "{track}/{stem}",
                          joint_name(arguments.models), audio::extension_of(kFormats.at(arguments.format))};
  const auto files = output_files(found.tracks, sums, names);
  if (!arguments.overwrite) require_new(files);
  for (const audio::EnsembleMember& member : models.ensemble.members) warn_of_borders(member.options.segments);
  Separation separation{models, {{}, models.sample_rate, kFormats.at(arguments.format)}};
  const NewFolder folder(output, kOutput);
  tell_rates(found.tracks, models.sample_rate);
  headroom::io::handle_stop_signals(headroom::io::OnStop::finish_first);
  separate_tracks(found, files, separation);
  if (!one && !found.errors.empty()) notice(std::to_string(found.errors.size()) + " could not be separated:");
  for (const std::string& error : found.errors) notice(error);
  return found.errors.empty() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  return run_tool("separate", [&] {
    CommandLine line("Separates recordings into stems: OUTDIR/<stem>.wav for each stem of the model.");
    Arguments arguments;
    line.paths("--model,--weights", arguments.models,
               "saved state or .safetensors written by train, or demucs' .th or .yaml with the .th beside it; with "
               "--config any .ckpt, .pth or .safetensors; given several times, an ensemble")
        .required()
        .one_each_time();
    line.paths("--config", arguments.configs,
               "configuration of the weights, also one that was published with them; one for all or one each")
        .one_each_time();
    line.flag("--raw-weights", arguments.raw_weights,
              "of a saved state with averaged weights take those that training goes on from");
    std::vector<std::string> ensembles;
    for (const auto& [name, combination] : combinations()) ensembles.push_back(name);
    line.text("--ensemble", arguments.ensemble,
              "of several models: mean, median, min or max, of samples or, with :spectrum, of spectra")
        .one_of(ensembles)
        .with_default();
    line.paths(
            "INPUT...OUTDIR", arguments.paths,
            "recordings and, last, the folder for the stems, which is made if it is not there. A recording is a file "
            "(WAV, FLAC, MP3, Ogg, AIFF of any sample rate), a folder with such files, or -, the standard input")
        .required()
        .at_least(2);
    const auto stems = line.texts("--stems", arguments.choice.stems, "write these stems only: vocals,drums");
    stems.separated_by(',');
    line.text("--two-stems", arguments.choice.two_stems, "write this stem, and all the rest as no_STEM").without(stems);
    line.text("--residual", arguments.choice.residual, "also write what the stems leave of the recording, as NAME");
    std::vector<std::string> formats;
    for (const auto& [name, encoding] : kFormats) formats.push_back(name);
    line.text("--format", arguments.format, "wav16, wav24, flac16, flac24 (integers) or wav32f (float)")
        .one_of(formats)
        .with_default();
    line.text(
        "--name", arguments.name,
        "names of the files, of {track}, {ext}, {stem} and {model}; default {stem} for one file, else {track}/{stem}");
    line.flag("--overwrite", arguments.overwrite, "replace files that are in OUTDIR already");
    add_blend_options(line, arguments.blend);
    line.threads();
    line.text("--device", arguments.device, "where the model runs, e.g. cpu or cuda").with_default();
    const auto ended = line.parse(argc, argv);
    return ended ? *ended : run(arguments);
  });
}
