#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "headroom/io/input_file.hpp"

namespace headroom::inline v0::audio::detail {

/// A file without the ID3 tags that it begins with. Taggers write them in front of any kind of file, and libsndfile
/// passes over them before it looks of which kind it is.
class UntaggedFile {
 public:
  /// Keeps a reference to `file`.
  explicit UntaggedFile(const io::InputFile& file) : file_(file) {
    constexpr std::size_t kHeader = 10;
    for (std::string tag = read(0, kHeader); tag.size() == kHeader && tag.starts_with("ID3"); tag = read(0, kHeader)) {
      std::uint64_t size = 0;  // 7 bits a byte
      for (std::size_t i = 6; i < kHeader; ++i) size = size << 7 | (static_cast<unsigned char>(tag[i]) & 0x7f);
      begin_ += kHeader + size;
    }
  }

  std::uint64_t begin() const { return begin_; }                                            ///< bytes of the tags
  std::uint64_t size() const { return file_.size() > begin_ ? file_.size() - begin_ : 0; }  ///< bytes behind them
  std::string read(std::uint64_t at, std::uint64_t count) const { return file_.read(begin_ + at, count); }

 private:
  const io::InputFile& file_;
  std::uint64_t begin_ = 0;
};

}  // namespace headroom::inline v0::audio::detail
