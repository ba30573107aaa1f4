#pragma once

#include <sstream>
#include <string>
#include <vector>

#include "headroom/training/config.hpp"
#include "support/catch.hpp"

namespace headroom::testing {

/// The problems that parse_config finds in the text of a file: one line each, without the file's name.
inline std::vector<std::string> problems_in(const std::string& text, const std::string& name) {
  const Error error = error_of([&] { training::parse_config(text, name); });
  CHECK(error.id() == "headroom.training.config");
  std::vector<std::string> lines;
  std::istringstream message(error.what());
  const std::string before = "  " + name + ": ";
  for (std::string line; std::getline(message, line);) {
    if (line.starts_with(before)) lines.push_back(line.substr(before.size()));
  }
  return lines;
}

}  // namespace headroom::testing
