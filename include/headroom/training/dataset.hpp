#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/io/file_name.hpp"
#include "headroom/training/augmentation.hpp"
#include "headroom/training/data_choices.hpp"
#include "headroom/training/example.hpp"
#include "headroom/training/random.hpp"
#include "headroom/training/sampler.hpp"
#include "headroom/training/stem_file.hpp"
#include "headroom/training/stretch.hpp"
#include "headroom/training/track_list.hpp"

namespace headroom::inline v0::training {

/// What a Dataset draws.
struct DatasetOptions {
  std::int64_t segment_length = 441000;                                   ///< S, samples
  std::int64_t channels = 2;                                              ///< C
  std::int64_t sample_rate = 44100;                                       ///< Hz
  std::vector<std::string> stems = {"vocals", "drums", "bass", "other"};  ///< plain file names without extension, N
  std::vector<std::string> accompaniment = {};                            ///< files of the mixture that are no stems
  Layout layout = Layout::automatic;
  std::vector<double> weights = {};  ///< how often each root is drawn from; empty: all tracks are alike
  MissingStem missing = MissingStem::error;
  bool leave_out_damaged = false;  ///< tracks with a file that cannot be read; else that is an error
  bool convert = false;            ///< take files of another sample rate and mono for stereo, or stereo for mono
  TrackDraw draw = TrackDraw::uniform;
  /// Probability that each stem of an example comes from a track and position of its own; the mixture is their sum.
  /// Otherwise the example is what the files hold.
  double remix = 0;
  AugmentationOptions augmentation = {};  ///< of the stems of remixed examples
  bool augment_aligned = false;           ///< and of those of the others, without mixup
};

/// Random segments of the tracks below one or several roots, see Layout. A track without a mixture has the sum of its
/// stems and their accompaniment for one. Folders that hold none of the files (`__MACOSX`) and tracks that are shorter
/// than a segment are left out, see notices().
///
/// The constructor looks at the header of every file; samples are read when an example is, and nothing else of the
/// file. An example is a pure function of a seed and its index: a training run continues where it stopped by knowing
/// the index alone, and examples can be made in any order by any number of threads.
class Dataset {
 public:
  /// `roots`: the folder of the split, e.g. musdb18hq/train, or several, or CSV tables. Throws
  /// `headroom.training.dataset.*` and `headroom.audio.file.*`; each names the file.
  Dataset(const std::vector<std::filesystem::path>& roots, DatasetOptions options)
      : options_(checked(std::move(options), roots.size())), list_(roots, rules(options_)) {
    for (std::size_t k = 0; k < stems().size(); ++k) {
      stems_.push_back(sampler([k](const Track& track) { return track.has(k); }));
      require(!stems_.back().empty() || options_.missing == MissingStem::silence, "headroom.training.dataset.missing",
              "no track in ", roots.front(), " has the stem ", stems()[k],
              "; add files of it or take it out of the configuration");
    }
    if (options_.draw == TrackDraw::by_stem) {
      for (std::size_t k = 0; k < options_.stems.size(); ++k) {
        together_.push_back(sampler([k](const Track& track) { return track.whole && track.has(k); }));
      }
    } else {
      together_.push_back(sampler([](const Track& track) { return track.whole; }));
    }
    std::erase_if(together_, [](const Sampler& sampler) { return sampler.empty(); });
    require(options_.remix == 1 || !together_.empty(), "headroom.training.dataset.loose", "the files in ",
            roots.front(), " belong to no tracks, so that examples have to be remixed, and remix is ", options_.remix,
            "; give folders of tracks or, where they are trained on, set data.remix to 1");
  }
  /// Of one root.
  Dataset(const std::filesystem::path& root, DatasetOptions options)
      : Dataset(std::vector<std::filesystem::path>{root}, std::move(options)) {}

  std::int64_t size() const { return static_cast<std::int64_t>(tracks().size()); }  ///< tracks
  /// The tracks that examples are drawn from, root by root in the order of find_tracks.
  const std::vector<Track>& tracks() const { return list_.tracks(); }
  const DatasetOptions& options() const { return options_; }

  /// The stems, then their accompaniment: those of Track::stems.
  const std::vector<std::string>& stems() const { return list_.rules().stems; }

  /// What of the roots is left out and why, a sentence each.
  const std::vector<std::string>& notices() const { return list_.notices(); }

  /// Names of the tracks, in the order of the roots and there as find_tracks has them.
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const Track& track : tracks()) names.push_back(track.name);
    return names;
  }

  /// The samples first, …, first + count - 1 of a track as its files hold them: [C,n] and [N,C,n].
  Example piece(std::int64_t track, std::int64_t first, std::int64_t count) const {
    static_cast<void>(tracks().at(static_cast<std::size_t>(track)));
    return piece({static_cast<std::size_t>(track), first}, count, reading());
  }

  /// Example number `index` >= 0 of the endless sequence that `seed` stands for.
  Example example(std::uint64_t seed, std::int64_t index) const { return composed(seed, index, reading()); }

  /// Which pieces of which tracks example() is made of, in words.
  std::string origin(std::uint64_t seed, std::int64_t index) const {
    std::ostringstream text;
    composed(seed, index, [&](const Position& position, std::size_t stem, std::int64_t count) {
      const Track& track = tracks()[position.track];
      if (file_of(track, stem)) {
        text << (text.tellp() > 0 ? ", " : "")
             << (stem < track.stems.size() ? list_.rules().stems[stem] : std::string("mixture")) << " of " << track.name
             << " from " << static_cast<double>(position.frame) / static_cast<double>(options_.sample_rate) << " s";
      }
      return silence(count);
    });
    return text.str();
  }

  /// Examples first_index, …, first_index + count - 1: [B,C,S] and [B,N,C,S].
  Example batch(std::uint64_t seed, std::int64_t first_index, std::int64_t count) const {
    require(count >= 1, "headroom.training.dataset.options", "asked for a batch of ", count, ", expected at least 1");
    return batch_of(first_index, count, [&](std::int64_t index) -> Example {
      const Example one = example(seed, index);
      return {one.mixture.unsqueeze(0), one.stems.unsqueeze(0)};
    });
  }

 private:
  static DatasetOptions checked(DatasetOptions o, std::size_t roots) {
    constexpr auto id = "headroom.training.dataset.options";
    require(o.segment_length >= 1 && o.channels >= 1 && o.sample_rate >= 1, id, "got segment_length ", o.segment_length,
            ", channels ", o.channels, ", sample_rate ", o.sample_rate, ", expected at least 1 each");
    require(!o.stems.empty(), id, "got no stems, expected names such as vocals");
    for (const std::string& stem : rules(o).stems) {
      require(io::is_file_name(stem), id, "the stem \"", stem, "\" is no plain file name, expected one such as vocals");
    }
    require(o.remix >= 0 && o.remix <= 1, id, "remix is ", o.remix, ", expected a probability");
    require(roots > 0, id, "got no folder, expected one or more");
    require(o.weights.empty() || o.weights.size() == roots, id, "got ", o.weights.size(), " weights for ", roots,
            " folders, expected none or one for each");
    for (const double weight : o.weights) require(weight > 0, id, "got a weight of ", weight, ", expected more than 0");
    check(o.augmentation);
    return o;
  }

  /// With stems, then their accompaniment.
  static TrackRules rules(const DatasetOptions& options) {
    TrackRules rules{.stems = options.stems,
                     .format = {options.channels, options.sample_rate, options.convert},
                     .least_frames = options.segment_length,
                     .layout = options.layout,
                     .missing = options.missing,
                     .leave_out_damaged = options.leave_out_damaged};
    rules.stems.insert(rules.stems.end(), options.accompaniment.begin(), options.accompaniment.end());
    return rules;
  }

  Sampler sampler(const std::function<bool(const Track&)>& suits) const {
    const bool by_length = options_.draw == TrackDraw::by_length;
    return {list_.tracks(), {options_.segment_length, by_length, options_.weights}, suits};
  }

  const SoundFormat& format() const { return list_.rules().format; }

  Position draw_together(SplitMix64& random) const {
    const auto n = static_cast<std::int64_t>(together_.size());
    return together_[n == 1 ? 0 : static_cast<std::size_t>(random.below(n))].draw(random);
  }

  /// Reads count samples of a stem of a track, or, with one more than it has stems, of its mixture: [C,count].
  using Read = std::function<torch::Tensor(const Position&, std::size_t stem, std::int64_t count)>;

  Read reading() const {
    return [this](const Position& position, std::size_t stem, std::int64_t count) {
      const auto& file = file_of(tracks()[position.track], stem);
      return file ? read_piece(*file, position.frame, count, format()) : silence(count);
    };
  }
  static const std::optional<StemFile>& file_of(const Track& track, std::size_t stem) {
    return stem < track.stems.size() ? track.stems[stem] : track.mixture;
  }

  Example composed(std::uint64_t seed, std::int64_t index, const Read& read) const {
    SplitMix64 random = random_of_example(seed, index), changes = random_of_example(~seed, index);
    const bool remixed = random.uniform() < options_.remix;
    if (!remixed || !together_.empty()) {
      const Position together = draw_together(random);
      if (!remixed && options_.augment_aligned) return changed_piece(together, {random, changes}, read);
      if (!remixed) return piece(together, options_.segment_length, read);
    }
    std::vector<torch::Tensor> stems;  // N and those of the accompaniment, of [C,S]
    for (std::size_t k = 0; k < stems_.size(); ++k) stems.push_back(remixed_stem({k, read}, random, changes.next()));
    return mixed(stems, {});
  }

  /// The stems of a track and their accompaniment, of [C,count].
  std::vector<torch::Tensor> stems_at(const Position& position, std::int64_t count, const Read& read) const {
    std::vector<torch::Tensor> stems;
    for (std::size_t k = 0; k < stems_.size(); ++k) stems.push_back(read(position, k, count));
    return stems;
  }
  /// Its mixture, where that is a file of its own.
  torch::Tensor mixture_at(const Position& position, std::int64_t count, const Read& read) const {
    const Track& of = tracks()[position.track];
    return of.mixture ? read(position, of.stems.size(), count) : torch::Tensor();
  }

  Example piece(const Position& position, std::int64_t count, const Read& read) const {
    const std::vector<torch::Tensor> stems = stems_at(position, count, read);
    return mixed(stems, mixture_at(position, count, read));
  }

  struct Numbers {
    SplitMix64 &random, &changes;
  };

  /// The same segment of all files of a track. Each stem has changes of its own, but for tempo and pitch, which are
  /// those of the first. What the mixture has beside the stems has these two alone.
  Example changed_piece(Position position, const Numbers& numbers, const Read& read) const {
    const std::int64_t length = options_.segment_length, frames = tracks()[position.track].frames;
    std::vector<Augmentation> changes;
    for (std::size_t k = 0; k < stems_.size(); ++k) {
      changes.emplace_back(options_.augmentation, numbers.random, numbers.changes.next());
    }
    const std::int64_t source = changes.front().source_length(length, frames);
    position.frame = std::min(position.frame, frames - source);
    std::vector<torch::Tensor> stems = stems_at(position, source, read);
    torch::Tensor rest = mixture_at(position, source, read);
    const Stretch& stretch = changes.front().stretch();
    if (rest.defined()) {
      for (const torch::Tensor& stem : stems) rest = rest - stem;
      if (stretch.changes()) rest = stretched(rest, stretch, length, options_.sample_rate);
    }
    for (std::size_t k = 0; k < stems.size(); ++k) {
      if (!file_of(tracks()[position.track], k)) {  // what is not there changes in its length alone
        stems[k] = silence(length);
        continue;
      }
      changes[k].stretch_like(changes.front());
      stems[k] = changes[k].apply(stems[k], length, options_.sample_rate);
      if (rest.defined()) rest = rest + stems[k];
    }
    return mixed(stems, rest);
  }

  struct StemRead {
    std::size_t stem;
    const Read& read;
  };

  /// A stem of a remixed example: a segment, or the mean of several, each with random changes.
  torch::Tensor remixed_stem(const StemRead& of, SplitMix64& random, std::uint64_t seed) const {  // [C,S]
    if (stems_[of.stem].empty()) return silence(options_.segment_length);
    SplitMix64 changes(seed);
    torch::Tensor sum = changed_segment(of, random, changes.next());
    int count = 1;
    for (const double probability : options_.augmentation.mixup) {
      SplitMix64 further(changes.next());
      if (further.uniform() >= probability) continue;
      sum = sum + changed_segment(of, further, further.next());
      ++count;
    }
    return count == 1 ? sum : sum / count;
  }

  torch::Tensor changed_segment(const StemRead& of, SplitMix64& random, std::uint64_t seed) const {  // [C,S]
    const std::int64_t length = options_.segment_length;
    Position position = stems_[of.stem].draw(random);
    Augmentation augmentation(options_.augmentation, random, seed);
    const std::int64_t frames = tracks()[position.track].frames, source = augmentation.source_length(length, frames);
    position.frame = std::min(position.frame, frames - source);
    return augmentation.apply(of.read(position, of.stem, source), length, options_.sample_rate);
  }

  torch::Tensor silence(std::int64_t count) const { return torch::zeros({options_.channels, count}); }

  /// An example of stems and their accompaniment, whose sum is the mixture where there is none.
  Example mixed(const std::vector<torch::Tensor>& stems, const torch::Tensor& mixture) const {
    const torch::Tensor all = torch::stack(stems);  // [N+…,C,S]
    return {mixture.defined() ? mixture : all.sum(0),
            all.narrow(0, 0, static_cast<std::int64_t>(options_.stems.size()))};
  }

  DatasetOptions options_;
  TrackList list_;
  std::vector<Sampler> stems_;     ///< of each stem, then of each of the accompaniment
  std::vector<Sampler> together_;  ///< of whole tracks; by_stem: of those that have each stem
};

}  // namespace headroom::inline v0::training
