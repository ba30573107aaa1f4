#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace headroom::benchmarks {

/// A value in a report; std::monostate is null.
using Figure = std::variant<std::monostate, bool, int64_t, double, std::string, std::vector<int64_t>>;
/// Named values, in order.
using Row = std::vector<std::pair<std::string, Figure>>;

/// A program's command line and the report that it writes. Every benchmark takes --json FILE and --threads N. What it
/// is made of is compiled once for all benchmarks.
class Benchmark {
 public:
  Benchmark(const std::string& name, const std::string& what);
  ~Benchmark();

  /// An argument of the command line.
  struct Argument {
    std::string name;  ///< "--length"; without dashes it is positional
    std::string help;
    /// Where the value goes; what is there is the default. A bool is a flag.
    std::variant<bool*, int*, int64_t*, double*, std::string*, std::vector<int64_t>*, std::vector<std::string>*> target;
    std::vector<std::string> choices = {};  ///< the only values, where there are any
    double least = 0;                       ///< of numbers
  };
  void add(const Argument& argument);

  /// Reads the command line, runs `body` and writes the report. Returns the exit code: 0, 1 with a message on an error
  /// and after failures that were noted, 2 for wrong arguments.
  int run(int argc, char** argv, const std::function<void()>& body);

  /// A value of the report itself.
  void note(const std::string& name, const Figure& value);
  void note(const std::string& name, const Row& values);
  /// One more of its "rows".
  void add_row(const Row& row);
  /// One more of its "failures", which is printed too: a part is missing, and what there is is still reported.
  void note_failure(const std::string& message);

 private:
  struct Report;
  std::unique_ptr<Report> report_;
};

/// The members of a JSON file that holds an object of numbers.
std::map<std::string, double> read_numbers(const std::string& file);

/// The processor's name as Linux gives it.
std::string processor();

}  // namespace headroom::benchmarks
