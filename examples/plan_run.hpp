#pragma once

#include <ostream>

#include "headroom/core/error.hpp"
#include "headroom/memory/format.hpp"
#include "headroom/plan/report.hpp"
#include "headroom/training/plan.hpp"
#include "headroom/training/recommend.hpp"

/// Plans a run before anything is allocated and tells the result. A configuration that does not fit is refused with the
/// reason, or becomes what recommend() makes of it where `fit` allows that. Throws headroom.train.memory, and as
/// plan_training does.
inline void plan_run(std::ostream& out, headroom::training::Config& config, const headroom::DeviceProfile& device,
                     const headroom::PlanOptions& options, bool fit) {
  headroom::Plan plan = headroom::training::plan_training(config, device, options);
  if (!plan.fits) {
    const auto recommendation = headroom::training::recommend(config, device, options);
    out << headroom::explain(plan) << headroom::training::describe(recommendation);
    headroom::require(fit && recommendation, "headroom.train.memory", "this run needs ",
                      headroom::format_bytes(plan.peak_bytes), " for tensors and ", device.name, " has ",
                      headroom::format_bytes(plan.budget),
                      "; change the configuration, let --fit change it, or give --unplanned");
    config = recommendation->config;
    plan = recommendation->plan;
  }
  out << "memory:   planned peak " << headroom::format_bytes(plan.peak_bytes) << ", headroom "
      << headroom::format_bytes(plan.budget - plan.reserved_bytes) << " on " << device.name << "\n";
}
