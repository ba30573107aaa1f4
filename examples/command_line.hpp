#pragma once

#include <c10/core/Device.h>

#include <concepts>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/io/number.hpp"

namespace CLI {
class App;
class Option;
}  // namespace CLI

/// "24GiB", "500 MB", "1000000": binary units with an i, decimal ones without. Throws headroom.tools.bytes.
std::int64_t parse_bytes(const std::string& text);

/// A text for a terminal: control characters, which the name of a file may have, are written as \x1b; a new line stays.
std::string printable(std::string_view text);

/// A line on standard output, printable() and at once.
void say(const std::string& text);

/// The device called `name`, once a tensor was there and had elements. Throws headroom.tools.device.
c10::Device find_device(const std::string& name);

/// Runs a tool and returns its exit code: 1 after an error, whose text it prints, else what `tool` returns. What could
/// not be printed is an error as well.
int run_tool(const char* name, const std::function<int()>& tool);

/// The least and the greatest number that an option takes.
template <class T>
struct Bounds {
  T least = std::numeric_limits<T>::lowest(), greatest = std::numeric_limits<T>::max();
};

/// What a tool takes from its command line: options with the variables that they set. It is CLI11's, which takes half a
/// minute to compile and which command_line.cpp alone includes.
class CommandLine {
 public:
  class Option {
   public:
    Option(CLI::Option* option) : option_(option) {}  // NOLINT
    const Option& required() const;
    const Option& with_default() const;  ///< --help tells what the variable holds now
    const Option& one_of(const std::vector<std::string>& choices) const;
    const Option& without(const Option& other) const;  ///< the other one excludes it
    const Option& needs(const Option& other) const;    ///< it says nothing without the other one
    const Option& separated_by(char delimiter) const;  ///< several values in one word
    const Option& one_each_time() const;               ///< several values by giving the option several times
    const Option& at_least(int count) const;           ///< values, of an option that takes several

   private:
    CLI::Option* option_;
  };

  explicit CommandLine(const std::string& description);
  ~CommandLine();

  Option flag(const std::string& name, bool& value, const std::string& description);
  Option text(const std::string& name, std::string& value, const std::string& description);
  Option texts(const std::string& name, std::vector<std::string>& values, const std::string& description);
  /// An empty path, as of a variable that is not set, is a wrong command line; so it is among `paths`.
  Option path(const std::string& name, std::filesystem::path& value, const std::string& description);
  Option paths(const std::string& name, std::vector<std::filesystem::path>& values, const std::string& description);

  /// What is no number of this kind, or out of bounds, is a wrong command line. `value` may be a std::optional.
  template <class Value, class T>
  Option number(const std::string& name, Value& value, Bounds<T> bounds, const std::string& description) {
    const auto read = [&value, bounds](const std::string& given) -> std::string {
      const auto number = headroom::io::parse_number<T>(given);
      if (!number || *number < bounds.least || *number > bounds.greatest) {
        std::ostringstream message;
        message << "got \"" << given.substr(0, 60) << "\", expected " << (std::integral<T> ? "an integer" : "a number")
                << " >= " << bounds.least << " and <= " << bounds.greatest;
        return message.str();
      }
      value = *number;
      return "";
    };
    return read_by(name, read, std::integral<T> ? "INT" : "FLOAT", description);
  }

  /// --threads, the CPU threads of LibTorch from parse() on.
  void threads();

  /// Sets the variables. Where the tool has nothing more to do, it returns the exit code: 0 after --help, 2 for a wrong
  /// command line, whose fault it prints.
  std::optional<int> parse(int argc, char** argv);

 private:
  /// `read` returns what is wrong with a text, or nothing.
  Option read_by(const std::string& name, const std::function<std::string(const std::string&)>& read, const char* type,
                 const std::string& description);

  std::unique_ptr<CLI::App> app_;
  int threads_ = 0;  // 0: LibTorch's choice
};
