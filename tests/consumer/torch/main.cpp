#include <omp.h>
#include <sndfile.h>
#include <soxr.h>
#include <torch/types.h>
#include <yaml-cpp/parser.h>

#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>

#include "headroom/core/error.hpp"
#include "headroom/plan/plan.hpp"

/// OpenMP runtimes in this process; two would each start their own threads.
std::set<std::string> openmp_runtimes() {
  std::set<std::string> runtimes;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    const auto slash = line.find('/');
    if (slash == std::string::npos) {
      continue;
    }
    const std::string path = line.substr(slash);
    const std::string name = path.substr(path.rfind('/') + 1);
    if (name.starts_with("libgomp") || name.starts_with("libiomp") || name.starts_with("libomp")) {
      runtimes.insert(path);
    }
  }
  return runtimes;
}

int main() {
  int threads = 0;
#pragma omp parallel reduction(+ : threads)
  threads += 1;
  const bool links =
      threads >= 1 && sf_version_string() && !YAML::Parser() && soxr_version() && nlohmann::json::parse("[3]")[0] == 3;
  try {
    headroom::require(!links, "headroom.core.example", "got ", torch::full({}, 3).item<int>(), ", expected ", 4);
  } catch (const headroom::Error& error) {
    std::cout << "headroom: " << std::string(error.what()).substr(error.id().size() + 3);
  }
  std::cout << "; OpenMP runtimes: " << openmp_runtimes().size();
  // Without NDEBUG, which LibTorch was compiled with
  const auto step = [] { return torch::ones({10, 12}).sum(); };
  std::cout << "; planned: " << headroom::plan(step, headroom::this_machine()).peak_bytes << " bytes\n";
}
