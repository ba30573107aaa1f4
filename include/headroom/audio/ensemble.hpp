#pragma once

#include <torch/types.h>

#include <Eigen/Core>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "headroom/audio/segment_model.hpp"
#include "headroom/audio/separator.hpp"
#include "headroom/audio/separator_stream.hpp"
#include "headroom/core/combine.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/lockstep.hpp"

namespace headroom::inline v0::audio {

/// A model of an ensemble, which cuts and blends in its own way.
struct EnsembleMember {
  SegmentModel model;  ///< segment_model(...) makes one of a module
  SeparatorOptions options;
  std::vector<std::string> stems;    ///< names of the options.stems stems that it makes
  std::vector<double> weights = {};  ///< how much each stem counts in a mean; empty: 1 each
};

/// Several models of one recording. A stem is combined from the models that have it.
struct Ensemble {
  std::vector<EnsembleMember> members = {};
  core::Combination combination = {};

  /// Names of all stems, in the order in which the members name them.
  std::vector<std::string> stems() const {
    std::vector<std::string> names;
    for (const EnsembleMember& member : members) {
      for (const std::string& stem : member.stems) {
        if (std::find(names.begin(), names.end(), stem) == names.end()) names.push_back(stem);
      }
    }
    return names;
  }

  /// C. Throws like check().
  std::int64_t channels() const {
    check();
    return members.front().options.channels;
  }

  /// Throws `headroom.audio.ensemble.options` for what can't be combined.
  void check() const;
};

inline void Ensemble::check() const {
  constexpr auto id = "headroom.audio.ensemble.options";
  require(!members.empty(), id, "got no models, expected at least 1");
  for (const EnsembleMember& member : members) {
    const auto& stems = member.stems;
    require(member.options.channels == members.front().options.channels, id, "got models of ",
            members.front().options.channels, " and of ", member.options.channels,
            " channels, expected the same for all");
    require(static_cast<std::int64_t>(stems.size()) == member.options.stems, id, "got ", stems.size(),
            " names for the ", member.options.stems, " stems of a model, expected one each");
    for (auto name = stems.begin(); name != stems.end(); ++name) {
      require(std::find(stems.begin(), name, *name) == name, id, "a model has two stems with the name ", *name);
    }
    const bool mean = combination.statistic == core::Statistic::mean;
    require(member.weights.empty() || (mean && member.weights.size() == stems.size()), id, "got ",
            member.weights.size(), " weights for the ", stems.size(),
            " stems of a model, expected one each with a mean, and none with a median, min or max");
    for (const double weight : member.weights) {
      require(weight > 0, id, "got a weight of ", weight,
              ", expected a positive one; leave out the stem of that model");
    }
  }
}

/// A recording that comes in blocks becomes the stems of an ensemble: a SeparatorStream a model, side by side. The
/// memory beside the models is that of their batches of segments, whatever the length.
class EnsembleStream {
 public:
  /// Takes finished samples [N·C,n], the stems in the order of Ensemble::stems(), in total as many as were pushed.
  using Sink = core::Combine::Sink;

  /// Throws `headroom.audio.ensemble.options` and like SeparatorStream.
  EnsembleStream(const Ensemble& ensemble, Sink sink)
      : piece_(piece_of(ensemble)),
        combine_(ensemble.combination, contributions_of(ensemble), std::move(sink)),
        together_(rows_of(ensemble), capacity_of(ensemble),
                  [this](std::vector<Samples>& streams, Eigen::Index n) { combine_.add(streams, n); }) {
    for (std::size_t i = 0; i < ensemble.members.size(); ++i) {
      const EnsembleMember& member = ensemble.members[i];
      streams_.emplace_back(member.model, member.options,
                            [this, i](const SamplesRef& finished) { together_.add(i, finished); });
    }
  }
  EnsembleStream(const EnsembleStream&) = delete;
  EnsembleStream& operator=(const EnsembleStream&) = delete;

  /// Bytes of the buffers that grow with segments: SeparatorStream's of each model, and what one is ahead of another.
  static std::size_t state_bytes(const Ensemble& ensemble) {
    std::size_t bytes = core::Lockstep<float>::state_bytes(rows_of(ensemble), capacity_of(ensemble));
    for (const EnsembleMember& member : ensemble.members) bytes += SeparatorStream::state_bytes(member.options);
    return bytes;
  }

  /// Takes the next samples [C,n]. Throws what the models and the sink throw.
  void push(const SamplesRef& samples) {
    for (Eigen::Index done = 0; done < samples.cols(); done += piece_) {
      const Eigen::Index n = std::min(piece_, samples.cols() - done);
      for (SeparatorStream& stream : streams_) stream.push(samples.middleCols(done, n));
    }
  }

  /// Ends the recording.
  void finish() {
    for (SeparatorStream& stream : streams_) stream.finish();
    combine_.finish();
  }

 private:
  /// What is pushed into one model before the next one gets it.
  static Eigen::Index piece_of(const Ensemble& ensemble) {
    Eigen::Index longest = 1;
    for (const EnsembleMember& member : ensemble.members) {
      longest = std::max<Eigen::Index>(longest, member.options.segments.length);
    }
    return std::min<Eigen::Index>(longest, 1 << 16);
  }
  static Eigen::Index capacity_of(const Ensemble& ensemble) {
    std::int64_t latency = 0;
    for (const EnsembleMember& member : ensemble.members) {
      latency = std::max(latency, SeparatorStream::latency(member.options));
    }
    return latency + piece_of(ensemble);
  }
  static std::vector<Eigen::Index> rows_of(const Ensemble& ensemble) {
    std::vector<Eigen::Index> rows;
    for (const EnsembleMember& member : ensemble.members)
      rows.push_back(member.options.stems * member.options.channels);
    return rows;
  }
  static std::vector<std::vector<core::Contribution>> contributions_of(const Ensemble& ensemble) {
    const std::vector<std::string> names = ensemble.stems();
    const auto channels = static_cast<std::size_t>(ensemble.channels());
    std::vector<std::vector<core::Contribution>> rows(names.size() * channels);
    for (std::size_t i = 0; i < ensemble.members.size(); ++i) {
      const auto& [model, options, stems, weights] = ensemble.members[i];
      for (std::size_t n = 0; n < stems.size(); ++n) {
        const auto stem = static_cast<std::size_t>(std::find(names.begin(), names.end(), stems[n]) - names.begin());
        for (std::size_t c = 0; c < channels; ++c) {
          rows[stem * channels + c].push_back(
              {i, static_cast<Eigen::Index>(n * channels + c), weights.empty() ? 1 : weights[n]});
        }
      }
    }
    return rows;
  }

  Eigen::Index piece_;
  core::Combine combine_;
  core::Lockstep<float> together_;
  std::deque<SeparatorStream> streams_;
};

/// Separates a recording of any length by an ensemble; `sink` takes the stems [N,C,n] of Ensemble::stems().
/// Throws `headroom.audio.ensemble.options` and like the form with one model.
inline void separate(const Source& source, const Ensemble& ensemble, const StemSink& sink) {
  const std::int64_t channels = ensemble.channels();
  EnsembleStream stream(ensemble, [&](const SamplesRef& finished) {
    sink(detail::stems_of(finished, finished.rows() / channels, channels));
  });
  detail::drain(source, channels, stream);
}

/// Separates a recording in memory: `mixture` [C,T], or [1,T] for every channel the same, gives the stems [N,C,T] of
/// Ensemble::stems() on the CPU. Throws like the streaming form.
inline torch::Tensor separate(const torch::Tensor& mixture, const Ensemble& ensemble) {
  const auto stems = static_cast<std::int64_t>(ensemble.stems().size());
  return detail::in_memory(mixture, {stems, ensemble.channels()},
                           [&](const Source& source, const StemSink& sink) { separate(source, ensemble, sink); });
}

}  // namespace headroom::inline v0::audio
