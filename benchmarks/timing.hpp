#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace headroom::benchmarks {

template <class Body>
double seconds_of(Body&& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// One of several ways to do the same thing.
struct Contender {
  std::string name;
  std::function<double()> run;                            ///< once; returns the seconds of what counts
  double best = std::numeric_limits<double>::infinity();  ///< seconds of its shortest run
};

/// How often contenders run.
struct Rounds {
  bool warm_up = true;  ///< the first round counts for nothing
  int least = 2;        ///< rounds that count
  double seconds = 0;   ///< a contender, more rounds until they have taken that long
  int most = 1 << 30;
};

/// Runs the contenders in turns, so that whatever disturbs the machine disturbs all of them, and keeps each one's
/// shortest run.
inline void race(std::vector<Contender>& contenders, const Rounds& rounds) {
  if (rounds.warm_up) {
    for (const Contender& contender : contenders) contender.run();
  }
  const double wanted = rounds.seconds * static_cast<double>(contenders.size());
  double spent = 0;
  for (int round = 0; round < rounds.least || (spent < wanted && round < rounds.most); ++round) {
    for (Contender& contender : contenders) {
      const double seconds = contender.run();
      contender.best = std::min(contender.best, seconds);
      spent += seconds;
    }
  }
}

/// The seconds of the shortest of some runs.
inline double shortest_of(std::function<double()> run, const Rounds& rounds) {
  std::vector<Contender> alone{{"", std::move(run)}};
  race(alone, rounds);
  return alone[0].best;
}

}  // namespace headroom::benchmarks
