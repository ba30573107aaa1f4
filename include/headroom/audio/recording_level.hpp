#pragma once

#include <cstdint>

#include "headroom/audio/level.hpp"
#include "headroom/audio/reader.hpp"

namespace headroom::inline v0::audio {

/// Reads a recording from its beginning to its end and goes back to the beginning. Throws
/// `headroom.audio.file.*`.
inline Level level_of(AudioReader& recording) {
  constexpr std::int64_t kFrames = 1 << 16;
  LevelSum sum;
  recording.seek(0);
  while (recording.position() < recording.frames()) sum.add(recording.read(kFrames));
  recording.seek(0);
  return sum.level();
}

}  // namespace headroom::inline v0::audio
