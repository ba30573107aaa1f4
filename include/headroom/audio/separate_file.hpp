#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "headroom/audio/channels.hpp"
#include "headroom/audio/ensemble.hpp"
#include "headroom/audio/format.hpp"
#include "headroom/audio/reader.hpp"
#include "headroom/audio/resampler.hpp"
#include "headroom/audio/sample_queue.hpp"
#include "headroom/audio/segment_model.hpp"
#include "headroom/audio/separator.hpp"
#include "headroom/audio/separator_stream.hpp"
#include "headroom/audio/stem_files.hpp"
#include "headroom/core/error.hpp"

namespace headroom::inline v0::audio {

/// The files that a recording becomes. They have its sample rate and its length.
struct FileSeparation {
  std::vector<StemFile> outputs;
  int sample_rate = 44100;  ///< Hz, of the model; a file of another one is resampled, and its stems back
  Encoding encoding = Encoding::float32;
};

/// Told after each segment how many of the frames are finished.
using Progress = std::function<void(std::int64_t done, std::int64_t total)>;

namespace detail {

/// The channels of the stems that a model of `model` channels makes of a file.
inline std::int64_t stem_channels(const AudioReader& reader, std::int64_t model) {
  require(model == 1 || reader.channels() == 1 || reader.channels() % model == 0, "headroom.audio.separator.channels",
          reader.path(), " has ", reader.channels(), " channels, expected 1 or a multiple of the model's ", model,
          "; convert it: sox INPUT -c ", model, " OUTPUT.wav");
  return model == 1 ? 1 : std::max<std::int64_t>(model, reader.channels());
}

/// A model of `channels` channels as one of any multiple: [B,k·C,S] to [B,N,k·C,S], one group of C after the other.
inline SegmentModel in_groups(SegmentModel model, std::int64_t channels) {
  return [model = std::move(model), channels](const torch::Tensor& mixture) -> torch::Tensor {
    if (mixture.size(1) == channels) return model(mixture);
    std::vector<torch::Tensor> stems;
    for (const torch::Tensor& group : mixture.split(channels, 1)) stems.push_back(model(group));  // [B,N,C,S]
    return torch::cat(stems, 2);
  };
}

/// What lies between the files and a model: the source and the sink of a separation, at the model's sample rate.
class FileStream {
 public:
  FileStream(AudioReader input, const FileSeparation& files, std::int64_t model_channels, const Progress& progress)
      : reader_(std::move(input)),
        channels_(stem_channels(reader_, model_channels)),
        writers_(files.outputs, {static_cast<int>(channels_), reader_.sample_rate(), files.encoding}, reader_.frames()),
        progress_(progress),
        model_rate_(files.sample_rate) {
    if (reader_.sample_rate() == model_rate_) return;
    to_model_.emplace(channels_, reader_.sample_rate(), model_rate_);
    from_model_.emplace(channels_ * static_cast<std::int64_t>(files.outputs.size()), model_rate_,
                        reader_.sample_rate());
  }

  std::int64_t channels() const { return channels_; }

  /// The next samples [C,n] for the model, made of at most `frames` of the file.
  torch::Tensor read(std::int64_t frames) {
    while (true) {
      const std::int64_t count = to_model_ ? frames_at_once(frames, reader_.sample_rate(), model_rate_) : frames;
      const torch::Tensor samples = with_channels(reader_.read(count), channels_);
      const bool ended = samples.size(1) == 0;
      if (writers_.need_mixture() && !ended) waiting_.push(samples);
      if (!to_model_ || (ended && std::exchange(ended_, true))) return samples;
      const torch::Tensor resampled = ended ? to_model_->finish() : to_model_->push(samples);
      if (ended || resampled.size(1) > 0) return resampled;
    }
  }

  /// Takes the next stems [N,C,n] of the model, a little at a time: what is made of them stays small.
  void write(const torch::Tensor& stems) {
    const std::int64_t count =
        from_model_ ? frames_at_once(kFramesAtOnce, model_rate_, reader_.sample_rate()) : kFramesAtOnce;
    for (const torch::Tensor& piece : stems.split(count, 2)) {
      const torch::Tensor combined = writers_.combine(piece);  // [K,C,n]
      store(from_model_ ? from_model_->push(combined.flatten(0, 1)).unflatten(0, {-1, channels_}) : combined);
    }
  }

  /// Writes what is left and names the files; tells how many samples were clipped.
  std::int64_t finish() {
    if (from_model_) store(from_model_->finish().unflatten(0, {-1, channels_}));
    return writers_.publish();
  }

 private:
  void store(const torch::Tensor& combined) {  // [K,C,n] at the file's sample rate
    // There and back a file may have got some samples longer
    const std::int64_t n = std::min(combined.size(2), reader_.frames() - writers_.written());
    if (n == 0) return;
    writers_.write(combined.narrow(2, 0, n), writers_.need_mixture() ? waiting_.take(n) : torch::Tensor());
    if (progress_) progress_(writers_.written(), reader_.frames());
  }

  AudioReader reader_;
  std::int64_t channels_;
  StemWriters writers_;
  const Progress& progress_;
  int model_rate_;
  std::optional<Resampler> to_model_, from_model_;  // for a file that has not the model's sample rate
  SampleQueue waiting_;
  bool ended_ = false;
};

}  // namespace detail

/// Separates an audio file into files by the models of an ensemble, in the memory of their segments. The files have the
/// recording's sample rate, its length and, where the models do, its channels: of k·C channels each C in turn are
/// separated by models of C channels. A mono file is separated as if all the models' channels were the same; models of
/// one channel get the mean of a file's. Files appear under their names when all of the recording is done. Returns how
/// many samples an integer encoding clipped.
/// Throws `headroom.audio.file.*`, `headroom.audio.resampler.options`, `headroom.audio.separator.channels`,
/// `headroom.audio.separator.outputs` (no output, factors for other than the stems of the ensemble, a path twice, or
/// the input), and like `separate`.
inline std::int64_t separate_file(AudioReader input, const FileSeparation& files, Ensemble ensemble,
                                  const Progress& progress = {}) {
  const std::int64_t channels = ensemble.channels();
  detail::require_stem_files(files.outputs, static_cast<std::int64_t>(ensemble.stems().size()), input.path());
  detail::FileStream stream(std::move(input), files, channels, progress);
  for (EnsembleMember& member : ensemble.members) {
    member.model = detail::in_groups(std::move(member.model), channels);
    member.options.channels = stream.channels();
  }
  const Source source = [&](std::int64_t frames) { return stream.read(frames); };
  const StemSink sink = [&](const torch::Tensor& stems) { stream.write(stems); };
  if (const EnsembleMember& first = ensemble.members.front(); ensemble.members.size() == 1) {
    separate(source, first.model, first.options, sink);
  } else {
    separate(source, ensemble, sink);
  }
  return stream.finish();
}

/// The same by one model, a function or a module holder.
template <class Model>
std::int64_t separate_file(AudioReader input, const FileSeparation& files, Model&& model,
                           const SeparatorOptions& options, const Progress& progress = {}) {
  EnsembleMember member{segment_model(std::forward<Model>(model)), options, {}};
  for (std::int64_t n = 0; n < options.stems; ++n) member.stems.push_back(std::to_string(n));
  return separate_file(std::move(input), files, Ensemble{{std::move(member)}}, progress);
}

}  // namespace headroom::inline v0::audio
