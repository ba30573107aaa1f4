#pragma once

#include <torch/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "headroom/audio/reader.hpp"
#include "headroom/core/error.hpp"
#include "headroom/training/example.hpp"

namespace headroom::inline v0::training {

/// A source whose audio files may fail in the middle of training. An example that cannot be read is drawn anew, from
/// far on in the endless sequence, until one can be: so the tracks with files that fail are left out, and an example is
/// a function of its index and of the files still, which is what a resumed run needs. Each file is told once.
///
/// To be called by several threads at once, if its source may.
class Redraw {
 public:
  /// `on_notice` is told of each file that fails, by the thread that reads it, one at a time.
  Redraw(BatchSource source, std::function<void(const std::string&)> on_notice)
      : source_(std::move(source)), on_notice_(std::move(on_notice)) {}
  Redraw(const Redraw&) = delete;
  Redraw& operator=(const Redraw&) = delete;

  /// Examples first, …, first + count - 1. Throws what the source throws beside headroom.audio.file.*, and that, too,
  /// when it did so for 100 draws.
  Example operator()(std::int64_t first, std::int64_t count) {
    if (count == 1) return example(first);
    return batch_of(first, count, [this](std::int64_t index) { return example(index); });
  }

  /// The index that the example at `index` was drawn at in the end, as far as it has been read.
  std::int64_t drawn_as(std::int64_t index) const {
    const std::lock_guard lock(mutex_);
    const auto entry = drawn_.find(index);
    return entry == drawn_.end() ? index : entry->second;
  }

 private:
  static constexpr std::int64_t kFarOn = std::int64_t{1} << 40;  // steps that no training takes
  static constexpr int kMostDraws = 100;

  Example example(const std::int64_t index) {  // a batch of one
    for (int draw = 1;; ++draw) {
      const std::int64_t drawn = index + (draw - 1) * kFarOn;
      try {
        Example read = source_(drawn, 1);
        const std::lock_guard lock(mutex_);
        if (draw > 1) drawn_[index] = drawn;
        return read;
      } catch (const Error& error) {
        if (!audio::is_file_error(error) || draw == kMostDraws) throw;
        tell(error.what());
      }
    }
  }

  /// Errors of one file differ by the place in it: the file, which stands in quotes, is told once.
  void tell(const std::string& error) {
    const std::size_t begin = error.find('"'), end = error.find('"', begin + 1);
    const std::string file = end == std::string::npos ? error : error.substr(begin, end - begin);
    const std::lock_guard lock(mutex_);
    if (told_.insert(file).second && on_notice_) on_notice_(error + ". The track is left out");
  }

  BatchSource source_;
  std::function<void(const std::string&)> on_notice_;
  mutable std::mutex mutex_;
  std::set<std::string> told_;
  std::map<std::int64_t, std::int64_t> drawn_;
};

}  // namespace headroom::inline v0::training
