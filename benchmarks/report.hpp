#pragma once

#include <CLI/CLI.hpp>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "headroom/core/error.hpp"
#include "headroom/io/atomic_file.hpp"

namespace headroom::benchmarks {

/// What every benchmark takes and writes: --json FILE and --threads N.
struct Report {
  nlohmann::ordered_json json;
  std::string file;
  int threads = 0;

  void add_options(CLI::App& app) {
    app.add_option("--json", file, "Write the figures to this file");
    app.add_option("--threads", threads, "Threads to use (0: all cores)")->check(CLI::NonNegativeNumber);
  }
  void write() const {
    if (!file.empty()) io::write_file(file, "headroom.benchmarks.file", {json.dump(2), "\n"});
  }
};

/// The processor's name as Linux gives it.
inline std::string processor() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

/// Runs a benchmark: exit code 0, 1 with a message on an error, 2 for wrong arguments.
template <class Body>
int run_benchmark(CLI::App& app, Report& report, int argc, char** argv, Body&& body) {
  report.add_options(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  try {
    body();
    report.write();
    return 0;
  } catch (const std::exception& error) {
    std::cerr << app.get_name() << ": " << error.what() << '\n';
    return 1;
  }
}

}  // namespace headroom::benchmarks
