#include "command_line.hpp"

#include <c10/util/Exception.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <exception>
#include <filesystem>
#include <functional>
#include <iostream>
#include <optional>
#include <string>
#include <string_view>

#include "headroom/core/error.hpp"
#include "headroom/io/number.hpp"
#include "headroom/io/process.hpp"
#include "headroom/memory/run_within.hpp"
#include "headroom/training/cause.hpp"

namespace {

// What a tool tells of an error: ours as they are, others with an id and what to do.
std::string told(const std::exception& error) {
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

std::string not_empty(const std::string& path) {
  return path.empty() ? "got an empty path, expected the name of a file or folder" : "";
}

}  // namespace

std::int64_t parse_bytes(const std::string& text) {
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

std::string printable(std::string_view text) {
  std::string result;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n' || (byte >= 0x20 && byte != 0x7f)) {
      result += c;
    } else {
      constexpr std::string_view kDigits = "0123456789abcdef";
      result.append("\\x").append({kDigits[byte >> 4], kDigits[byte & 15]});
    }
  }
  return result;
}

void say(const std::string& text) { std::cout << printable(text) + "\n" << std::flush; }

c10::Device find_device(const std::string& name) {
  try {
    const torch::Device device(name);
    torch::ones({1}, device).item();  // of the meta device there is nothing to read
    return device;
  } catch (const c10::Error&) {
    headroom::fail("headroom.tools.device", "there is no device ", name,
                   "; expected cpu, or an accelerator that this machine and this LibTorch have, such as cuda");
  }
}

using Option = CommandLine::Option;

const Option& Option::required() const { return option_->required(), *this; }
const Option& Option::with_default() const { return option_->capture_default_str(), *this; }
const Option& Option::one_of(const std::vector<std::string>& choices) const {
  return option_->check(CLI::IsMember(choices)), *this;
}
const Option& Option::without(const Option& other) const { return option_->excludes(other.option_), *this; }
const Option& Option::needs(const Option& other) const { return option_->needs(other.option_), *this; }
const Option& Option::separated_by(char delimiter) const {
  option_->delimiter(delimiter);
  return one_each_time();
}
const Option& Option::one_each_time() const { return option_->allow_extra_args(false), *this; }
const Option& Option::at_least(int count) const {
  return option_->expected(count, CLI::detail::expected_max_vector_size), *this;
}

CommandLine::CommandLine(const std::string& description) : app_(std::make_unique<CLI::App>(description)) {}
CommandLine::~CommandLine() = default;

Option CommandLine::flag(const std::string& name, bool& value, const std::string& description) {
  return app_->add_flag(name, value, description);
}
Option CommandLine::text(const std::string& name, std::string& value, const std::string& description) {
  return app_->add_option(name, value, description);
}
Option CommandLine::texts(const std::string& name, std::vector<std::string>& values, const std::string& description) {
  return app_->add_option(name, values, description);
}
Option CommandLine::path(const std::string& name, std::filesystem::path& value, const std::string& description) {
  return app_->add_option(name, value, description)->check(not_empty);
}
Option CommandLine::paths(const std::string& name, std::vector<std::filesystem::path>& values,
                          const std::string& description) {
  return app_->add_option(name, values, description)->check(not_empty);
}
Option CommandLine::read_by(const std::string& name, const std::function<std::string(const std::string&)>& read,
                            const char* type, const std::string& description) {
  const auto take = [read, name](const std::string& text) {
    if (const std::string wrong = read(text); !wrong.empty()) throw CLI::ValidationError(name, wrong);
  };
  return app_->add_option_function<std::string>(name, take, description)->type_name(type);
}

void CommandLine::threads() { number("--threads", threads_, Bounds<int>{1, 1024}, "CPU threads; default: one a core"); }

std::optional<int> CommandLine::parse(int argc, char** argv) {
  try {
    app_->parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app_->exit(e) == 0 ? 0 : 2;
  }
  if (threads_ > 0) torch::set_num_threads(threads_);
  return std::nullopt;
}

int run_tool(const char* name, const std::function<int()>& tool) {
  headroom::io::open_standard_descriptors();
  headroom::io::handle_stop_signals(headroom::io::OnStop::end);
  try {
    const int code = tool();
    const bool printed = static_cast<bool>(std::cout << std::flush) || headroom::io::stop_signal() != 0;
    headroom::require(printed, "headroom.tools.output",
                      "cannot print to the standard output; what was printed is not "
                      "complete. Check the room on the disk");
    return code;
  } catch (const std::exception& e) {
    std::cerr << name << ": " << printable(told(e)) << '\n';
  }
  return headroom::io::stop_signal() != 0 ? 128 + headroom::io::stop_signal() : 1;
}
