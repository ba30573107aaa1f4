#pragma once

#include <array>

// What can be chosen of a data set, and the words for it in a configuration.
namespace headroom::inline v0::training {

/// How the files of a data set lie.
enum class Layout {
  automatic,  ///< csv for a file, stems where a folder has the name of a stem and audio in it, else tracks
  tracks,     ///< ROOT/<Artist - Title>/<stem>.wav, as in MUSDB18-HQ
  stems,      ///< ROOT/<stem>/<any name>.wav
  csv,        ///< a table with the columns `instrum` (or `type`) and `path`
};
inline constexpr std::array kLayoutNames{"automatic", "tracks", "stems", "csv"};

/// What becomes of a track that lacks some of the stems.
enum class MissingStem {
  error,
  leave_out,  ///< the track is left out
  silence,    ///< the stem is silent there
};
inline constexpr std::array kMissingStemNames{"error", "leave_out", "silence"};

/// How a track is drawn.
enum class TrackDraw {
  uniform,    ///< every track equally often
  by_length,  ///< every segment of the whole data set equally often
  by_stem,    ///< every stem equally often, of it every track that has it: rare stems are heard as often as others
};
inline constexpr std::array kTrackDrawNames{"uniform", "by_length", "by_stem"};

}  // namespace headroom::inline v0::training
