#pragma once

#include <c10/util/Exception.h>
#include <torch/types.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <iostream>
#include <limits>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "headroom/core/error.hpp"
#include "headroom/io/number.hpp"
#include "headroom/io/process.hpp"
#include "headroom/memory/run_within.hpp"
#include "headroom/training/cause.hpp"

/// "24GiB", "500 MB", "1000000": binary units with an i, decimal ones without.
inline std::int64_t parse_bytes(const std::string& text) {
  const std::size_t end = std::min(text.find_first_not_of("0123456789."), text.size());
  const auto number = headroom::io::parse_number<double>(text.substr(0, end));
  std::string unit = text.substr(end);
  unit.erase(0, unit.find_first_not_of(' '));
  constexpr std::string_view kPrefixes = "KMGT";
  double factor = 1;
  bool known = unit.empty() || unit == "B";
  if (!known && (unit.size() == 2 || unit.size() == 3) && unit.back() == 'B') {
    const std::size_t power = kPrefixes.find(unit[0]);
    known = power != std::string_view::npos && (unit.size() == 2 || unit[1] == 'i');
    factor = std::pow(unit.size() == 3 ? 1024.0 : 1000.0, static_cast<double>(power + 1));
  }
  constexpr double kMost = 1e18;  // an exabyte
  headroom::require(known && number && *number * factor >= 1 && *number * factor <= kMost, "headroom.tools.bytes",
                    "the number of bytes is ", text, "; expected a size such as 24GiB, 500MB or 1000000");
  return static_cast<std::int64_t>(*number * factor);
}

/// The least and the greatest number that an option takes.
template <class T>
struct Bounds {
  T least = std::numeric_limits<T>::lowest(), greatest = std::numeric_limits<T>::max();
};

/// An option that is a number: what is no number of this kind, or out of bounds, is a wrong command line. `value` may
/// be a std::optional.
template <class Value, class T>
CLI::Option* add_number(CLI::App& app, const std::string& name, Value& value, Bounds<T> bounds,
                        const std::string& description) {
  const auto read = [&value, bounds, name](const std::string& text) {
    const auto number = headroom::io::parse_number<T>(text);
    if (!number || *number < bounds.least || *number > bounds.greatest) {
      std::ostringstream message;
      message << "got \"" << text.substr(0, 60) << "\", expected " << (std::integral<T> ? "an integer" : "a number")
              << " >= " << bounds.least << " and <= " << bounds.greatest;
      throw CLI::ValidationError(name, message.str());
    }
    value = *number;
  };
  return app.add_option_function<std::string>(name, read, description)->type_name(std::integral<T> ? "INT" : "FLOAT");
}

/// An option that is a path: an empty one, as of a variable that is not set, is a wrong command line.
inline CLI::Option* add_path(CLI::App& app, const std::string& name, std::filesystem::path& path,
                             const std::string& description) {
  return app.add_option(name, path, description)->check([](const std::string& text) {
    return text.empty() ? std::string("got an empty path, expected the name of a file or folder") : "";
  });
}

/// The device called `name`, once a tensor was there. Throws headroom.tools.device.
inline torch::Device find_device(const std::string& name) {
  try {
    const torch::Device device(name);
    torch::empty({1}, device);
    return device;
  } catch (const c10::Error&) {
    headroom::fail("headroom.tools.device", "there is no device ", name,
                   "; expected cpu, or an accelerator that this machine and this LibTorch have, such as cuda");
  }
}

/// What a tool tells of an error: ours as they are, others with an id and what to do.
inline std::string told(const std::exception& error) {
  const auto* const torch_error = dynamic_cast<const c10::Error*>(&error);
  const std::string text = torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
  if (text.starts_with("[headroom.")) return text;
  const std::string cause = headroom::training::cause(error);
  if (headroom::is_out_of_memory(error)) {
    return "[headroom.tools.memory] this machine's memory ran out (" + cause +
           "); give less at a time (in a configuration training.segment_length or training.batch_size), or end other "
           "programs";
  }
  if (dynamic_cast<const std::filesystem::filesystem_error*>(&error) != nullptr) {
    return "[headroom.tools.file] " + cause + "; check the path, its links and its permissions";
  }
  return "[headroom.tools.unforeseen] " + cause + "; an input that was not foreseen: please report it with headroom";
}

/// Runs a tool: exit code 2 for wrong arguments, 1 after an error, whose text it prints, else what `run` returns. What
/// could not be printed is an error as well.
template <class Run>
int run_tool(const char* name, CLI::App& app, int argc, char** argv, Run&& run) {
  headroom::io::open_standard_descriptors();
  headroom::io::handle_stop_signals(headroom::io::OnStop::end);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    const int code = run();
    const bool printed = static_cast<bool>(std::cout << std::flush) || headroom::io::stop_signal() != 0;
    headroom::require(printed, "headroom.tools.output",
                      "cannot print to the standard output; what was printed is not "
                      "complete. Check the room on the disk");
    return code;
  } catch (const std::exception& e) {
    std::cerr << name << ": " << told(e) << '\n';
  }
  return headroom::io::stop_signal() != 0 ? 128 + headroom::io::stop_signal() : 1;
}
