#pragma once

#include <cstddef>
#include <filesystem>
#include <iomanip>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

#include "headroom/core/bsseval.hpp"
#include "headroom/io/atomic_file.hpp"
#include "headroom/training/json.hpp"

/// Writes the frames of a track as museval 0.4.1 does, so that its EvalStore and json2df read them: targets, their
/// frames of one second, and NaN, which is no JSON but museval's, in frames where something is silent. Scores have more
/// digits than museval's five. Throws headroom.evaluate.json.
inline void write_museval_file(const std::filesystem::path& path, const std::vector<std::string>& stems,
                               const std::vector<headroom::core::BssFrame>& frames) {
  using headroom::core::BssScores;
  headroom::io::write_file(path, "headroom.evaluate.json", [&](std::ostream& out) {
    const auto number = [&](const headroom::core::BssFrame& frame, std::size_t stem, double BssScores::*score) {
      if (!frame) return std::string("NaN");
      std::ostringstream text;
      text << std::fixed << std::setprecision(9) << (*frame)[stem].*score;
      return text.str();
    };
    out << "{\n  \"targets\": [";
    for (std::size_t stem = 0; stem < stems.size(); ++stem) {
      out << (stem > 0 ? "," : "") << "\n    {\n      \"name\": " << headroom::training::json_text(stems[stem])
          << ",\n      \"frames\": [";
      for (std::size_t t = 0; t < frames.size(); ++t) {
        out << (t > 0 ? "," : "") << "\n        {\"time\": " << t
            << ".0, \"duration\": 1.0, \"metrics\": {\"SDR\": " << number(frames[t], stem, &BssScores::sdr)
            << ", \"SIR\": " << number(frames[t], stem, &BssScores::sir)
            << ", \"SAR\": " << number(frames[t], stem, &BssScores::sar)
            << ", \"ISR\": " << number(frames[t], stem, &BssScores::isr) << "}}";
      }
      out << "\n      ]\n    }";
    }
    out << "\n  ],\n  \"museval_version\": \"0.4.1\"\n}\n";
  });
}
