#pragma once

#include <c10/util/Exception.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iostream>
#include <string>
#include <string_view>

#include "headroom/core/error.hpp"

/// "24GiB", "500 MB", "1000000": binary units with an i, decimal ones without.
inline std::int64_t parse_bytes(const std::string& text) {
  std::size_t end = 0;
  double number = 0;
  try {
    number = std::stod(text, &end);
  } catch (const std::exception&) {
    end = 0;
  }
  std::string unit = text.substr(end);
  unit.erase(0, unit.find_first_not_of(' '));
  constexpr std::string_view kPrefixes = "KMGT";
  double factor = 1;
  bool known = end > 0 && (unit.empty() || unit == "B");
  if (!known && end > 0 && (unit.size() == 2 || unit.size() == 3) && unit.back() == 'B') {
    const std::size_t power = kPrefixes.find(unit[0]);
    known = power != std::string_view::npos && (unit.size() == 2 || unit[1] == 'i');
    factor = std::pow(unit.size() == 3 ? 1024.0 : 1000.0, static_cast<double>(power + 1));
  }
  headroom::require(known && number > 0, "headroom.tools.bytes", "the number of bytes is ", text,
                    "; expected a size such as 24GiB, 500MB or 1000000");
  return static_cast<std::int64_t>(number * factor);
}

/// Runs a tool: exit code 2 for wrong arguments, 1 after an error, whose text it prints, else what `run` returns.
template <class Run>
int run_tool(const char* name, CLI::App& app, int argc, char** argv, Run&& run) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    return run();
  } catch (const c10::Error& e) {
    std::cerr << name << ": " << e.what_without_backtrace() << '\n';
  } catch (const std::exception& e) {
    std::cerr << name << ": " << e.what() << '\n';
  }
  return 1;
}
