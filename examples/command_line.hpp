#pragma once

#include <c10/util/Exception.h>
#include <torch/types.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <iostream>
#include <string>
#include <string_view>

#include "headroom/core/error.hpp"
#include "headroom/memory/run_within.hpp"
#include "headroom/training/cause.hpp"

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

/// What --threads may be. More would end the process inside OpenMP, without a word of ours.
inline CLI::Range thread_counts() { return CLI::Range(1, 1024); }

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
  } catch (const std::exception& e) {
    std::cerr << name << ": " << told(e) << '\n';
  }
  return 1;
}
