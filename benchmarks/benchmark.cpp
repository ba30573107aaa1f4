#include "benchmark.hpp"

#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <type_traits>

#include "headroom/io/atomic_file.hpp"

namespace headroom::benchmarks {

namespace {

nlohmann::ordered_json json_of(const Figure& figure) {
  return std::visit(
      [](const auto& value) -> nlohmann::ordered_json {
        if constexpr (std::is_same_v<std::decay_t<decltype(value)>, std::monostate>) {
          return nullptr;
        } else {
          return value;
        }
      },
      figure);
}
nlohmann::ordered_json json_of(const Row& row) {
  auto object = nlohmann::ordered_json::object();
  for (const auto& [name, value] : row) object[name] = json_of(value);
  return object;
}

}  // namespace

struct Benchmark::Report {
  CLI::App app;
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  std::string file;
  int threads = 0;

  Report(const std::string& name, const std::string& what) : app(what, name) {}
};

Benchmark::Benchmark(const std::string& name, const std::string& what) : report_(std::make_unique<Report>(name, what)) {
  add({.name = "--json", .help = "Write the figures to this file", .target = &report_->file});
  add({.name = "--threads", .help = "Threads to use (0: all cores)", .target = &report_->threads});
}
Benchmark::~Benchmark() = default;

void Benchmark::add(const Argument& argument) {
  std::visit(
      [&](auto* target) {
        using T = std::decay_t<decltype(*target)>;
        constexpr bool is_text = std::is_same_v<T, std::string> || std::is_same_v<T, std::vector<std::string>>;
        if constexpr (std::is_same_v<T, bool>) {
          report_->app.add_flag(argument.name, *target, argument.help);
        } else {
          CLI::Option* const option =
              report_->app.add_option(argument.name, *target, argument.help)->capture_default_str();
          if (!argument.choices.empty()) option->check(CLI::IsMember(argument.choices));
          if constexpr (!is_text) option->check(CLI::Range(argument.least, 1e15))->delimiter(',');
        }
      },
      argument.target);
}

int Benchmark::run(int argc, char** argv, const std::function<void()>& body) {
  try {
    report_->app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return report_->app.exit(error) == 0 ? 0 : 2;
  }
  try {
    if (report_->threads > 0) at::set_num_threads(report_->threads);
    body();
    if (!report_->file.empty()) {
      io::write_file(report_->file, "headroom.benchmarks.file", {report_->json.dump(2), "\n"});
    }
    return report_->json.contains("failures") ? 1 : 0;
  } catch (const std::exception& error) {
    std::cerr << report_->app.get_name() << ": " << error.what() << '\n';
    return 1;
  }
}

void Benchmark::note(const std::string& name, const Figure& value) { report_->json[name] = json_of(value); }
void Benchmark::note(const std::string& name, const Row& values) { report_->json[name] = json_of(values); }
void Benchmark::add_row(const Row& row) { report_->json["rows"].push_back(json_of(row)); }
void Benchmark::note_failure(const std::string& message) {
  std::cerr << report_->app.get_name() << ": " << message << '\n';
  report_->json["failures"].push_back(message);
}

std::map<std::string, double> read_numbers(const std::string& file) {
  std::ifstream text(file);
  return nlohmann::json::parse(text).get<std::map<std::string, double>>();
}

std::string processor() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

}  // namespace headroom::benchmarks
