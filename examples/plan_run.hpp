#pragma once

#include <optional>
#include <ostream>
#include <string>

#include "headroom/core/error.hpp"
#include "headroom/memory/format.hpp"
#include "headroom/plan/report.hpp"
#include "headroom/training/device_profile.hpp"
#include "headroom/training/plan.hpp"
#include "headroom/training/recommend.hpp"

/// The device whose memory a run on `device` is planned for: `card`, a profile's name or file, or, where that is empty,
/// this machine for a run on its CPU; none when it is not known. Throws as find_device_profile does.
inline std::optional<headroom::DeviceProfile> planned_device(const std::string& card, const std::string& device) {
  if (card.empty() && device != "cpu") return std::nullopt;
  return headroom::training::find_device_profile(card.empty() ? "cpu" : card);
}

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
