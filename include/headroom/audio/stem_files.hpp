#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <system_error>
#include <vector>

#include "headroom/audio/format.hpp"
#include "headroom/audio/writer.hpp"
#include "headroom/core/error.hpp"

namespace headroom::inline v0::audio {

/// A file that is made of a separated recording: the sum of the stems, each times its factor, and of the recording
/// times `mixture`. What the stems leave of the recording has the factors -1 and the mixture 1.
struct StemFile {
  std::filesystem::path path;
  std::vector<float> stems;  ///< a factor for each stem of the model
  float mixture = 0;
};

/// A file for each stem, in order.
inline std::vector<StemFile> one_file_a_stem(const std::vector<std::filesystem::path>& paths) {
  std::vector<StemFile> files;
  for (const auto& path : paths) {
    std::vector<float> factors(paths.size(), 0);
    factors[files.size()] = 1;
    files.push_back({path, factors, 0});
  }
  return files;
}

namespace detail {

/// Refuses files that cannot be made of `stems` stems of `input`.
inline void require_stem_files(const std::vector<StemFile>& files, std::int64_t stems,
                               const std::filesystem::path& input) {
  constexpr auto id = "headroom.audio.separator.outputs";
  require(!files.empty(), id, "got no file to write, expected at least 1");
  for (auto file = files.begin(); file != files.end(); ++file) {
    require(static_cast<std::int64_t>(file->stems.size()) == stems, id, file->path, " has factors for ",
            file->stems.size(), " stems, the model makes ", stems, "; give one for each");
    std::error_code missing;  // an output that does not exist yet is not the input
    require(!std::filesystem::equivalent(file->path, input, missing), id, file->path,
            " is the input, it would be replaced; choose another output folder");
    const bool twice =
        std::any_of(files.begin(), file, [&](const StemFile& other) { return other.path == file->path; });
    require(!twice, id, file->path, " is given for two stems");
  }
}

/// The files of one recording: opened, filled and named together.
class StemWriters {
 public:
  StemWriters(const std::vector<StemFile>& files, const AudioFormat& format, std::int64_t frames) : files_(files) {
    require_room(files.front().path, files.size() * least_bytes(format, frames));
    for (const StemFile& file : files) writers_.emplace_back(file.path, format, frames);
  }

  bool need_mixture() const {
    return std::any_of(files_.begin(), files_.end(), [](const StemFile& file) { return file.mixture != 0; });
  }

  /// What the stems [N,C,n] are in the files, without the recording: [K,C,n].
  torch::Tensor combine(const torch::Tensor& stems) const {
    const auto K = static_cast<std::int64_t>(files_.size());
    torch::Tensor combined = torch::zeros({K, stems.size(1), stems.size(2)});
    for (std::int64_t k = 0; k < K; ++k) {
      const std::vector<float>& factors = files_[static_cast<std::size_t>(k)].stems;
      for (std::int64_t n = 0; n < stems.size(0); ++n) {
        const float factor = factors[static_cast<std::size_t>(n)];
        if (factor != 0) combined[k].add_(stems[n], factor);
      }
    }
    return combined;
  }

  /// Adds the recording's samples [C,n] to what `combine` made of its stems, and writes.
  void write(const torch::Tensor& combined, const torch::Tensor& mixture) {
    for (std::size_t k = 0; k < writers_.size(); ++k) {
      const torch::Tensor samples = combined[static_cast<std::int64_t>(k)];
      writers_[k].write(files_[k].mixture == 0 ? samples : samples.add(mixture, files_[k].mixture));
    }
  }

  std::int64_t written() const { return writers_.front().written(); }

  /// Gives all files their names; tells how many samples were clipped.
  std::int64_t publish() {
    std::int64_t clipped = 0;
    for (AudioWriter& writer : writers_) {
      writer.finish();
      clipped += writer.clipped();
    }
    for (AudioWriter& writer : writers_) writer.publish();
    return clipped;
  }

 private:
  const std::vector<StemFile>& files_;
  std::vector<AudioWriter> writers_;
};

}  // namespace detail

}  // namespace headroom::inline v0::audio
