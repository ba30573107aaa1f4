#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "headroom/core/score_rows.hpp"
#include "headroom/training/json.hpp"

namespace headroom::inline v0::training {

/// A score for each stem, by its name, and "mean"; null where silence leaves none. `row` has one number more than there
/// are stems.
inline Json score_json(const std::vector<std::string>& stems, const core::ScoreRow& row) {
  Json json = Json::object();
  for (std::size_t i = 0; i < row.size(); ++i) {
    json[i < stems.size() ? stems[i] : "mean"] = row[i] ? Json(*row[i]) : Json(nullptr);
  }
  return json;
}

}  // namespace headroom::inline v0::training
