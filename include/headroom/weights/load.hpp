#pragma once

#include <c10/core/ScalarType.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <map>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/io/nearest.hpp"
#include "headroom/weights/bytes.hpp"
#include "headroom/weights/file.hpp"
#include "headroom/weights/tensor_map.hpp"
#include "headroom/weights/tensors.hpp"

namespace headroom::inline v0::weights {

/// How load_weights reads a file.
struct LoadOptions {
  /// Load what fits and leave the rest of the module as it is, for fine-tuning. At least one tensor has to fit.
  bool allow_partial = false;
  /// The dict of a torch.save file that has the tensors, see open_weights.
  std::string key = {};
  /// What wrappers put before names: a name that the module does not have is looked for without them.
  std::vector<std::string> prefixes = {"module.", "model.", "_orig_mod."};
};

/// A tensor that is in the file and in the module, and cannot go from one to the other.
struct Misfit {
  std::string name, in_file, in_module;  ///< the last two as "Float [32, 96]"
};

/// What became of each name. `loaded`, `missing` and `misfits` have the module's names, `unexpected` the file's.
struct LoadReport {
  std::vector<std::string> loaded = {}, missing = {}, unexpected = {};
  std::vector<Misfit> misfits = {};

  bool complete() const { return missing.empty() && unexpected.empty() && misfits.empty(); }
};

namespace detail {

inline std::string type_text(const torch::Tensor& tensor) {
  std::ostringstream text;
  text << c10::toString(tensor.scalar_type()) << " " << tensor.sizes();
  return text.str();
}

/// One line a name, for the first of them, with the name of the other side that is most alike.
inline void list_names(std::ostream& text, const char* what, const std::vector<std::string>& names,
                       const std::vector<std::string>& others) {
  constexpr std::size_t kMostShown = 20, kMostCompared = 2000;
  const std::vector<std::string> compared(others.begin(), others.begin() + std::min(others.size(), kMostCompared));
  for (std::size_t i = 0; i < std::min(names.size(), kMostShown); ++i) {
    text << "\n  " << what << ": " << in_quotes(names[i]);
    if (const auto alike = io::nearest(names[i], compared)) text << ", is it " << in_quotes(*alike) << "?";
  }
  if (names.size() > kMostShown) text << "\n  " << what << ": … and " << names.size() - kMostShown << " more";
}

}  // namespace detail

/// The report in lines, the first 20 names of each kind; empty when everything was loaded.
inline std::string to_string(const LoadReport& report) {
  std::ostringstream text;
  detail::list_names(text, "missing in the file", report.missing, report.unexpected);
  detail::list_names(text, "not in the module", report.unexpected, report.missing);
  std::vector<std::string> misfits;
  for (const Misfit& misfit : report.misfits) {
    misfits.push_back(misfit.name + " is " + misfit.in_file + " in the file, expected " + misfit.in_module);
  }
  detail::list_names(text, "other shape or type", misfits, {});
  return text.str();
}

namespace detail {

/// The module's name that a file's name stands for: itself, or without prefixes; empty: none.
inline std::string name_in_module(std::string_view name, const TensorMap& module,
                                  const std::vector<std::string>& prefixes) {
  for (;;) {
    if (const auto found = module.find(std::string(name)); found != module.end()) return found->first;
    const auto prefix =
        std::ranges::find_if(prefixes, [&](const std::string& p) { return !p.empty() && name.starts_with(p); });
    if (prefix == prefixes.end()) return "";
    name.remove_prefix(prefix->size());
  }
}

/// Pairs of the module's name and the record for it; fills the report.
inline std::map<std::string, const TensorRecord*> match_names(const WeightFile& file, const TensorMap& module,
                                                              const LoadOptions& options, LoadReport& report) {
  std::map<std::string, const TensorRecord*> matches;
  for (const TensorRecord& record : file.contents.tensors) {
    if (module.contains(record.name)) matches.emplace(record.name, &record);
  }
  for (const TensorRecord& record : file.contents.tensors) {
    if (module.contains(record.name)) continue;
    const std::string name = name_in_module(record.name, module, options.prefixes);
    if (name.empty() || !matches.emplace(name, &record).second) report.unexpected.push_back(record.name);
  }
  for (const auto& [name, tensor] : module) {
    if (!matches.contains(name)) report.missing.push_back(name);
  }
  return matches;
}

}  // namespace detail

/// Copies the tensors of a file into the parameters and buffers of a module that have their names, whatever their
/// floating dtypes and the module's device. Nothing is copied unless every name and shape agrees, or
/// `options.allow_partial`; then the rest is told in the report. Throws headroom.weights.mismatch with that report, and
/// what open_weights throws.
inline LoadReport load_weights(torch::nn::Module& module, const std::filesystem::path& path,
                               const LoadOptions& options = {}) {
  const WeightFile file = open_weights(path, options.key);
  const TensorMap targets = tensors_of(module);
  LoadReport report;
  std::vector<std::pair<torch::Tensor, torch::Tensor>> copies;  // to, from
  for (const auto& [name, record] : detail::match_names(file, targets, options, report)) {
    const torch::Tensor& target = targets.at(name);
    const torch::Tensor source = to_tensor(file, *record);
    if (source.sizes() == target.sizes() && c10::canCast(source.scalar_type(), target.scalar_type())) {
      copies.emplace_back(target, source);
      report.loaded.push_back(name);
    } else {
      report.misfits.push_back({name, detail::type_text(source), detail::type_text(target)});
    }
  }
  const bool enough = report.complete() || (options.allow_partial && !report.loaded.empty());
  require(enough, "headroom.weights.mismatch", path.string(), " does not fit this module: of its ", targets.size(),
          " tensors ", report.loaded.size(), " fit, ", report.missing.size(), " are missing and ",
          report.misfits.size(), " have another shape or type; ", report.unexpected.size(),
          " of the file are not in the module. Build the module with the configuration that belongs to the file",
          report.loaded.empty() ? "" : ", or allow a partial load to leave the rest as it is", to_string(report));
  const torch::NoGradGuard guard;
  for (auto& [target, source] : copies) target.copy_(source);
  return report;
}

}  // namespace headroom::inline v0::weights
