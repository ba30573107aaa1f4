#pragma once

#include <string>
#include <vector>

#include "headroom/training/augmentation_options.hpp"
#include "headroom/training/data_choices.hpp"
#include "headroom/training/field.hpp"

namespace headroom::inline v0::training {

/// `data`: the data set and its augmentation.
struct DataConfig : AugmentationOptions {
  std::string path;
  std::vector<std::string> more_paths = {};
  std::vector<double> weights = {};
  std::string layout = "automatic";
  std::string missing = "error";
  std::string damaged = "error";
  bool convert = false;
  std::vector<std::string> accompaniment = {};
  std::string draw = "uniform";
  double remix = 1.0;
  bool augment_aligned = false;

  static void describe(auto& self, auto&& field) {
    field("path", self.path, {.may_be_empty = true},
          "data set: a folder with `train` in it, or what it would hold, or a CSV table; `--data` overrides it");
    field("more_paths", self.more_paths, {.may_be_empty = true}, "further data sets that are drawn from as well");
    field("weights", self.weights, {.at_most = 1e9, .above = 0, .may_be_empty = true},
          "how often `path` and each of `more_paths` are drawn from; none: all tracks are alike");
    field("layout", self.layout, {.choices = {kLayoutNames.begin(), kLayoutNames.end()}},
          "how files lie, docs/075_data.md has a table");
    field("missing", self.missing, {.choices = {kMissingStemNames.begin(), kMissingStemNames.end()}},
          "what becomes of a track that lacks stems; `silence`: they are silent there");
    field("damaged", self.damaged, {.choices = {"error", "leave_out"}},
          "what becomes of a track with a file that is truncated or no audio");
    field("convert", self.convert, {},
          "take files of another sample rate, and mono for stereo or stereo for mono; else they are refused");
    field("accompaniment", self.accompaniment, {.may_be_empty = true, .file_names = true},
          "file names without extension of what is in the mixture and no stem of the model");
    field("draw", self.draw, {.choices = {kTrackDrawNames.begin(), kTrackDrawNames.end()}},
          "every track equally often, or every segment of the data set, or every stem");
    field("remix", self.remix, {.at_least = 0, .at_most = 1},
          "probability that an example takes each stem from a track and position of its own");
    field("augment_aligned", self.augment_aligned, {},
          "change the stems of examples that are not remixed, too, but for mixup");
    field("gain", self.gain, {.at_least = 0, .at_most = 100}, "least and greatest random factor of a remixed stem");
    field("swap_channels", self.swap_channels, {}, "reverse the channels of half of the remixed stems");
    field("flip_polarity", self.flip_polarity, {}, "negate half of the remixed stems");
    const Accepted probability = {.at_least = 0, .at_most = 1};
    field("mixup", self.mixup, {.at_least = 0, .at_most = 1, .may_be_empty = true},
          "probability of each further segment of the same stem; a remixed stem is their mean");
    field("equalizer", self.equalizer, probability, "probability of a random equalizer of seven bands");
    field("equalizer_db", self.equalizer_db, {.at_least = -40, .at_most = 40}, "least and greatest gain of a band, dB");
    field("pitch", self.pitch, probability, "probability of another pitch; needs librubberband");
    field("pitch_semitones", self.pitch_semitones, {.at_least = -24, .at_most = 24}, "least and greatest change");
    field("tempo", self.tempo, probability, "probability of another tempo; needs librubberband");
    field("tempo_factor", self.tempo_factor, {.at_least = 0.25, .at_most = 4}, "least and greatest; 2: twice as fast");
    field("noise", self.noise, probability, "probability of white noise in a remixed stem");
    field("noise_db", self.noise_db, {.at_least = -200, .at_most = 0},
          "least and greatest level (RMS), dB of full scale");
  }
};

}  // namespace headroom::inline v0::training
