#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>

#include "benchmark.hpp"
#include "headroom/core/error.hpp"

// The same steps in Python, which a process of its own runs: what it gets is written to a file, what it took it prints.
namespace headroom::benchmarks {

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

/// An interpreter and a script.
struct Python {
  std::string interpreter, script;

  /// Runs the script, which prints `{"seconds": 1.5, "memory_bytes": …, "loss": …, "last_loss": …}`.
  Measurement run(const std::string& step_file, const std::string& mode) const {
    const std::string row_file = step_file + ".json";
    const std::string command =
        "'" + interpreter + "' '" + script + "' '" + step_file + "' " + mode + " > '" + row_file + "'";
    require(std::system(command.c_str()) == 0, "headroom.benchmarks.python", "failed: ", command,
            "; expected a Python with torch and the packages that ", script, " names");
    const std::map<std::string, double> row = read_numbers(row_file);
    return {row.at("seconds"), static_cast<int64_t>(row.at("memory_bytes")), row.at("loss"), row.at("last_loss")};
  }
};

}  // namespace headroom::benchmarks
