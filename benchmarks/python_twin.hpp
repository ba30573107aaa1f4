#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "accelerator.hpp"
#include "benchmark.hpp"
#include "headroom/core/error.hpp"
#include "resident_growth.hpp"
#include "timing.hpp"

// The same steps here and in Python, which a process of its own runs: what it gets is written to a file, what it took
// it prints.
namespace headroom::benchmarks {

inline constexpr const char* kPythonFailed = "headroom.benchmarks.python";

/// A folder that goes away with its contents.
struct TemporaryFolder {
  std::filesystem::path path = std::filesystem::temp_directory_path() / ("headroom_twin_" + std::to_string(::getpid()));
  TemporaryFolder() { std::filesystem::create_directories(path); }
  ~TemporaryFolder() { std::filesystem::remove_all(path); }
};

/// What some steps of an implementation took.
struct Measurement {
  double seconds = 0;  ///< of the shortest
  int64_t memory_bytes = 0;
  double loss = 0, last_loss = 0;
};

/// One of several ways to take the same steps, which take their turns: whatever disturbs the machine disturbs all.
struct Way {
  std::string name;
  std::function<Measurement()> run;
  Measurement best = {};  ///< the shortest step, the most memory, the last losses

  void run_again() {
    const Measurement before = best;
    best = run();
    if (before.seconds > 0) best.seconds = std::min(best.seconds, before.seconds);
    best.memory_bytes = std::max(best.memory_bytes, before.memory_bytes);
  }
};

/// Lets `ways` take turns, each once a round. One whose Python fails drops out, and the others go on.
template <class AnyWay>
void take_turns(Benchmark& benchmark, std::vector<AnyWay>& ways, int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) {
    for (auto way = ways.begin(); way != ways.end();) {
      try {
        way->run_again();
        ++way;
      } catch (const Error& error) {
        if (error.id() != kPythonFailed) throw;
        benchmark.note_failure(error.what());
        way = ways.erase(way);
      }
    }
  }
}

/// Takes steps, of which `step` takes one and returns its loss. Memory is what the device's allocator peaked at, on the
/// CPU what the resident size grew by.
inline Measurement measured(const std::function<double()>& step, int64_t steps, const Accelerator* gpu = nullptr) {
  std::vector<double> losses;
  Measurement result;
  const auto once = [&] { losses.push_back(step()); };
  const auto all = [&] {
    result.seconds =
        shortest_of([&] { return seconds_on(gpu, once); }, {.warm_up = false, .least = static_cast<int>(steps)});
  };
  result.memory_bytes = gpu != nullptr ? gpu->peak_of(all).allocated : resident_growth(all);
  result.loss = losses.front(), result.last_loss = losses.back();
  return result;
}

/// An interpreter and a script.
struct Python {
  std::string interpreter, script;

  /// Runs the script, which prints `{"seconds": 1.5, "memory_bytes": …, "loss": …, "last_loss": …}`.
  Measurement run(const std::string& step_file, const std::string& mode) const {
    const std::string row_file = step_file + ".json";
    const std::string command =
        "'" + interpreter + "' '" + script + "' '" + step_file + "' " + mode + " > '" + row_file + "'";
    require(std::system(command.c_str()) == 0, kPythonFailed, "failed: ", command,
            "; expected a Python with torch and the packages that ", script, " names");
    const std::map<std::string, double> row = read_numbers(row_file);
    return {row.at("seconds"), static_cast<int64_t>(row.at("memory_bytes")), row.at("loss"), row.at("last_loss")};
  }
};

}  // namespace headroom::benchmarks
