#pragma once

#include <torch/types.h>

#include <Eigen/Core>
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/audio/level.hpp"
#include "headroom/audio/sample_queue.hpp"
#include "headroom/audio/segment_model.hpp"
#include "headroom/audio/separator.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/score_rows.hpp"
#include "headroom/core/track_scores.hpp"
#include "headroom/io/atomic_file.hpp"
#include "headroom/io/descriptor.hpp"
#include "headroom/io/input_file.hpp"
#include "headroom/io/temporary_folder.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/training/example.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/training/separate.hpp"
#include "headroom/training/tracks.hpp"

namespace headroom::inline v0::training {

/// How good a model is: by metric, of each stem and their mean.
struct Validation {
  std::vector<std::string> stems;
  std::map<std::string, core::ScoreRow, std::less<>> scores;

  /// The mean over the stems. Throws headroom.training.validation_silent when none of them sounds.
  double mean(std::string_view metric) const {
    const std::optional<double> mean = scores.find(metric)->second.back();
    require(mean.has_value(), "headroom.training.validation_silent",
            "every stem is silent in all that is validated, of which ", core::metric_name(metric).name,
            " says nothing; raise training.validation_segments or choose other tracks for `valid`");
    return *mean;
  }
};

/// Scores a model, with the metrics of the configuration, on the first `training.validation_segments` examples of a
/// source laid end to end as one recording.
HEADROOM_TRAINING Validation validate_segments(const models::Separator& model, const BatchSource& source,
                                               const Config& config);

/// Scores a model on whole recordings, each separated as `inference` says in the memory of a segment: the mean over the
/// tracks, of BSSEval their median. Metrics that read a recording twice (BSSEval, bleedless, fullness) have its
/// estimates in a temporary file meanwhile. Throws headroom.training.validation_file where there is no room for it.
HEADROOM_TRAINING Validation validate_tracks(const models::Separator& model, const Tracks& tracks,
                                             const Config& config);

namespace detail {

/// [..., n] as Eigen has it: a channel a row.
inline Eigen::MatrixXf rows_of(const torch::Tensor& samples) {
  using Rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const torch::Tensor flat = samples.reshape({-1, samples.size(-1)}).to(torch::kCPU, torch::kFloat).contiguous();
  return Eigen::Map<const Rows>(flat.const_data_ptr<float>(), flat.size(0), flat.size(1));
}

}  // namespace detail

#ifdef HEADROOM_TRAINING_HERE
namespace detail {

/// Estimates of a recording, in a file without a name: all channels of a sample side by side, so that they can be read
/// in other pieces than they were written in.
class EstimateFile {
 public:
  EstimateFile() : file_(io::detail::nameless_file()) { check(file_.number() >= 0, errno); }

  /// [N,C,n]
  void write(const torch::Tensor& estimates) {
    const torch::Tensor samples = estimates.movedim(-1, 0).contiguous();  // [n,N,C]
    const int error =
        io::detail::write_all(file_.number(), {static_cast<const char*>(samples.const_data_ptr()), samples.nbytes()});
    check(error == 0, error);
  }

  /// The next n samples, [N,C,n] like `truth`.
  torch::Tensor read_like(const torch::Tensor& truth) {
    const torch::Tensor samples = torch::empty({truth.size(2), truth.size(0), truth.size(1)}, torch::kFloat);
    const std::size_t got =
        io::detail::read_at(file_.number(), position_, static_cast<char*>(samples.data_ptr()), samples.nbytes());
    check(got == samples.nbytes(), errno);
    position_ += samples.nbytes();
    return samples.movedim(0, -1);
  }

 private:
  static void check(bool fine, int error) {
    require(fine, "headroom.training.validation_file", "cannot keep the estimates of a recording in ",
            io::temporary_folder().string(), ": ", std::strerror(error),
            "; free space there, set TMPDIR to another folder, or validate with metrics that read a recording once: "
            "nsdr, si_sdr, l1_freq, log_wmse");
  }

  io::detail::Descriptor file_;
  std::size_t position_ = 0;
};

/// What a model makes of a recording, piece after piece: the truth [C,n], [N,C,n] and the estimates [N,C,n].
using OnPiece = std::function<void(const Example& truth, const torch::Tensor& estimates)>;

/// A recording that can be played as often as scores ask for it.
struct Played {
  std::function<void(const OnPiece&)> separate;
  /// The truth alone.
  std::function<void(const std::function<void(const Example&)>&)> repeat;
};

inline core::TrackOptions track_options(const Config& config) {
  return {.sources = static_cast<Eigen::Index>(config.audio.stems.size()),
          .channels = config.audio.channels,
          .sample_rate = static_cast<double>(config.audio.sample_rate),
          .metrics = config.training.validation_metrics};
}

/// A row for each metric of a recording.
inline std::map<std::string, core::ScoreRow, std::less<>> score(const Played& recording, const Config& config) {
  const core::TrackOptions options = track_options(config);
  std::optional<EstimateFile> estimates;
  if (options.reads_twice()) estimates.emplace();
  bool separated = false;
  const core::TrackScores scores = core::score_track(options, [&](auto&& on_block) {
    const auto give = [&](const Example& truth, const torch::Tensor& made) {
      on_block(core::TrackBlock{rows_of(truth.stems), rows_of(made), rows_of(truth.mixture)});
    };
    if (std::exchange(separated, true)) {
      recording.repeat([&](const Example& truth) { give(truth, estimates->read_like(truth.stems)); });
    } else {
      recording.separate([&](const Example& truth, const torch::Tensor& made) {
        if (estimates) estimates->write(made);
        give(truth, made);
      });
    }
  });
  std::map<std::string, core::ScoreRow, std::less<>> rows;
  for (const auto& [metric, values] : scores.metrics) rows[metric] = core::with_mean(values);
  return rows;
}

/// The examples of a source, [C,S] and [N,C,S], one after the other.
inline Played play_segments(const models::Separator& model, const BatchSource& source, int64_t count) {
  const auto repeat = [source, count](const std::function<void(const Example&)>& on_example) {
    for (int64_t index = 0; index < count; ++index) {
      const Example example = source(index, 1);  // [1,C,S], [1,N,C,S]
      on_example({example.mixture[0], example.stems[0]});
    }
  };
  const auto separate = [repeat, model](const OnPiece& on_piece) {
    const torch::NoGradGuard guard;
    const audio::detail::EvaluationMode evaluation(model);
    const torch::Device device = model->parameters().front().device();
    repeat([&](const Example& example) {
      on_piece(example, model(example.mixture.unsqueeze(0).to(device))[0].to(torch::kCPU));
    });
  };
  return {separate, repeat};
}

inline audio::SeparatorOptions separator_options(const models::Separator& model, const Config& config) {
  return {.segments = {.length = config.inference_segment(), .overlap = config.inference.overlap},
          .channels = config.audio.channels,
          .stems = static_cast<int64_t>(config.audio.stems.size()),
          .device = model->parameters().front().device()};
}

/// A whole track, which is read once for each playing, and once more where it is normalized.
inline Played play_track(const models::Separator& model, const Tracks& tracks, int64_t track, const Config& config) {
  const int64_t frames = tracks.frames[static_cast<std::size_t>(track)];
  const auto repeat = [=, &tracks](const std::function<void(const Example&)>& on_piece) {
    for (int64_t read = 0; read < frames; read += audio::detail::kFramesAtOnce) {
      on_piece(tracks.read(track, read, std::min(audio::detail::kFramesAtOnce, frames - read)));
    }
  };
  const auto separate = [=, &tracks, &config](const OnPiece& on_piece) {
    audio::SeparatorOptions options = separator_options(model, config);
    if (config.inference.normalize) {
      audio::LevelSum sum;
      repeat([&](const Example& piece) { sum.add(piece.mixture); });
      options.level = sum.level();
    }
    audio::SampleQueue mixtures, stems;  // that wait until as many were separated
    int64_t read = 0;
    const audio::Source source = [&](int64_t most) {
      const int64_t count = std::min(most, frames - read);
      if (count == 0) return torch::empty({config.audio.channels, 0});
      const Example piece = tracks.read(track, std::exchange(read, read + count), count);
      mixtures.push(piece.mixture);
      stems.push(piece.stems);
      return piece.mixture;
    };
    audio::separate(source, model, options, [&](const torch::Tensor& finished) {
      const int64_t count = finished.size(-1);
      if (count > 0) on_piece({mixtures.take(count), stems.take(count)}, finished);
    });
  };
  return {separate, repeat};
}

}  // namespace detail

HEADROOM_TRAINING Validation validate_segments(const models::Separator& model, const BatchSource& source,
                                               const Config& config) {
  const detail::Played recording = detail::play_segments(model, source, config.training.validation_segments);
  return {config.audio.stems, detail::score(recording, config)};
}

HEADROOM_TRAINING Validation validate_tracks(const models::Separator& model, const Tracks& tracks,
                                             const Config& config) {
  std::map<std::string, std::vector<core::ScoreRow>> rows;  // by metric, for each track
  for (int64_t track = 0; track < static_cast<int64_t>(tracks.frames.size()); ++track) {
    for (auto& [metric, row] : detail::score(detail::play_track(model, tracks, track, config), config)) {
      rows[metric].push_back(std::move(row));
    }
  }
  Validation result{config.audio.stems, {}};
  for (const auto& [metric, of_tracks] : rows) result.scores[metric] = core::over_tracks(metric, of_tracks);
  return result;
}
#endif

}  // namespace headroom::inline v0::training
