// Functions that kernels can't call. Each case must fail to compile, with a message that says which call is missing.

#include <array>

#include "headroom/core/attention.hpp"

using namespace headroom::core;

struct TakesNumbers {
  float operator()(float score) const { return score; }
};
struct TakesLanesAlone {
  template <class Scalar>
  Lanes<Scalar> operator()(Lanes<Scalar> score, const ScorePlace<Scalar>&) const {
    return score;
  }
};
struct KnowsNoGradientOfTables {
  template <class Scalar>
  Lanes<Scalar> operator()(Lanes<Scalar> score, const ScorePlace<Scalar>& at, const detail::TableOf<Scalar>& t) const {
    return score + t(at.key);
  }
  template <class Scalar>
  Lanes<Scalar> derivative(Lanes<Scalar>, const ScorePlace<Scalar>&, const detail::TableOf<Scalar>&) const {
    return 1;
  }
};
struct SeesNumbers {
  bool operator()(float query, float key) const { return query < key; }
};

int main() {
  [[maybe_unused]] const std::array<ScoreTable, 1> tables{};
#if CASE == 1
  const ScoreFunctionRef call{TakesNumbers()};
#elif CASE == 2
  const ScoreFunctionRef call{TakesLanesAlone()};
#elif CASE == 3
  const ScoreFunctionRef call{KnowsNoGradientOfTables(), tables};
#elif CASE == 4
  const MaskFunctionRef call{SeesNumbers()};
#endif
}
