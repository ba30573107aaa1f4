#include "headroom/training/schedule.hpp"

#include <vector>

#include "support/catch.hpp"

using namespace headroom::training;

TEST_CASE("the learning rate rises in a line and falls along half a cosine") {
  const Schedule schedule{.learning_rate = 0.4, .warmup_steps = 4, .min_ratio = 0.1};
  CHECK(learning_rate_at(schedule, 0, 104) == Approx(0.1));
  CHECK(learning_rate_at(schedule, 3, 104) == Approx(0.4));
  CHECK(learning_rate_at(schedule, 4, 104) == Approx(0.4));
  // A quarter, half and three quarters of the way: 1 - (1 ∓ 1/√2)/2 of the range, or half of it
  CHECK(learning_rate_at(schedule, 29, 104) == Approx(0.04 + 0.36 * 0.8535533905932737));
  CHECK(learning_rate_at(schedule, 54, 104) == Approx(0.22));
  CHECK(learning_rate_at(schedule, 79, 104) == Approx(0.04 + 0.36 * 0.1464466094067263));
  CHECK(learning_rate_at(schedule, 104, 104) == Approx(0.04));
  CHECK(learning_rate_at(schedule, 1000, 104) == Approx(0.04));
  for (int64_t step = 5; step < 104; ++step) {
    CHECK(learning_rate_at(schedule, step, 104) < learning_rate_at(schedule, step - 1, 104));
  }
}

TEST_CASE("a learning rate falls in a line, stays, or is lowered when the score stops getting better") {
  Schedule schedule{.learning_rate = 0.4, .warmup_steps = 4, .min_ratio = 0.1, .decay = Decay::linear};
  CHECK(learning_rate_at(schedule, 1, 104) == Approx(0.2));
  CHECK(learning_rate_at(schedule, 29, 104) == Approx(0.04 + 0.36 * 0.75));
  CHECK(learning_rate_at(schedule, 104, 104) == Approx(0.04));
  CHECK(learning_rate_at(schedule, 500, 104) == Approx(0.04));
  schedule.decay = Decay::constant;
  CHECK(learning_rate_at(schedule, 1, 104) == Approx(0.2));
  CHECK(learning_rate_at(schedule, 4, 104) == 0.4);
  CHECK(learning_rate_at(schedule, 500, 104) == 0.4);
  schedule.decay = Decay::plateau;
  schedule.factor = 0.5;
  Plateau plateau;
  const auto rate = [&] { return learning_rate_at(schedule, 50, 104, plateau); };
  // Lowered by the third score in a row that is no best one; a best one begins anew
  std::vector<double> rates;
  for (const bool is_best : {true, false, false, true, false, false, false, false, false, false}) {
    plateau.take(is_best, 2);
    rates.push_back(rate());
  }
  CHECK(rates == std::vector<double>{0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.1});
  for (int i = 0; i < 30; ++i) plateau.take(false, 2);
  CHECK(rate() == Approx(0.04));
  CHECK(learning_rate_at(schedule, 1, 104, plateau) == Approx(0.2));  // the warm-up does not know of it
}

TEST_CASE("a run shorter than two warm-ups warms up over its first half") {
  const Schedule schedule{.learning_rate = 1, .warmup_steps = 100, .min_ratio = 0};
  CHECK(learning_rate_at(schedule, 0, 10) == Approx(0.2));
  CHECK(learning_rate_at(schedule, 4, 10) == Approx(1));
  CHECK(learning_rate_at(schedule, 5, 10) == Approx(1));
  CHECK(learning_rate_at(schedule, 10, 10) == 0);
  CHECK(learning_rate_at(schedule, 0, 1) == Approx(1));
}

TEST_CASE("a time budget becomes a number of steps at the pace so far") {
  CHECK(estimated_total_steps(0, 10, 25.0, 100.0) == 40);
  CHECK(estimated_total_steps(0, 40, 100.0, 100.0) == 40);
  CHECK(estimated_total_steps(0, 40, 250.0, 100.0) == 40);     // over time: the end is here
  CHECK(estimated_total_steps(500, 510, 25.0, 100.0) == 540);  // resumed at step 500
  CHECK(estimated_total_steps(0, 0, 0.0, 100.0) > 1'000'000'000);
  CHECK(estimated_total_steps(0, 1, 0.0, 100.0) > 1'000'000'000);
  CHECK(estimated_total_steps(500, 500, 0.0, 100.0, 2.5) == 540);  // at the pace of the run before
  CHECK(estimated_total_steps(500, 500, 0.0, 1.0, 2.5) == 501);
  CHECK(estimated_total_steps(500, 500, 0.0, 100.0) == 501);  // unknown: the step is the last one
  // Along a budget at a steady pace the schedule ends at its minimum
  const Schedule schedule{.learning_rate = 1, .warmup_steps = 10, .min_ratio = 0.01};
  CHECK(learning_rate_at(schedule, 399, estimated_total_steps(0, 399, 99.75, 100.0)) < 0.0102);
  CHECK(learning_rate_at(schedule, 205, estimated_total_steps(0, 205, 51.25, 100.0)) == Approx(0.505));
}
