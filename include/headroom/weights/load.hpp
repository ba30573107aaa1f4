#pragma once

#include <c10/core/ScalarType.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <ostream>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/io/nearest.hpp"
#include "headroom/weights/bytes.hpp"
#include "headroom/weights/tensor_map.hpp"
#include "headroom/weights/tensors.hpp"

namespace headroom::inline v0::weights {

/// How load_weights reads a file.
struct LoadOptions {
  /// Load what fits, of parameters with other sizes the part that both have, and leave the rest of the module as it is,
  /// for fine-tuning. At least one tensor has to fit in part. Buffers, which no training mends, are whole or not
  /// loaded.
  bool allow_partial = false;
  /// The dict of a torch.save file that has the tensors, see open_weights.
  std::string key = {};
  /// What wrappers put before names: a name that the module does not have is looked for without them.
  std::vector<std::string> prefixes = {"module.", "model.", "_orig_mod."};
};

/// A tensor that is in the file and in the module with another shape or type.
struct Misfit {
  std::string name, in_file, in_module;  ///< the last two as "Float [32, 96]"
};

/// What became of each name. `loaded`, `missing`, `parts` and `misfits` have the module's names, `unexpected` the
/// file's.
struct LoadReport {
  std::vector<std::string> loaded = {}, missing = {}, unexpected = {};
  std::vector<Misfit> parts = {};    ///< of these the part that both have was loaded
  std::vector<Misfit> misfits = {};  ///< of these nothing was

  bool complete() const { return missing.empty() && unexpected.empty() && parts.empty() && misfits.empty(); }
  bool is_enough(const LoadOptions& options) const {
    return complete() || (options.allow_partial && !(loaded.empty() && parts.empty()));
  }
  /// Whether a partial load, which was not allowed, might take something.
  bool may_fit_in_part(const LoadOptions& options) const {
    return !options.allow_partial && !(loaded.empty() && misfits.empty());
  }
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
  const std::vector<std::string> compared(
      others.begin(), others.begin() + static_cast<std::ptrdiff_t>(std::min(others.size(), kMostCompared)));
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
  const auto list = [&](const char* what, const std::vector<Misfit>& misfits) {
    std::vector<std::string> lines;
    for (const Misfit& misfit : misfits) {
      lines.push_back(misfit.name + " is " + misfit.in_file + " in the file, expected " + misfit.in_module);
    }
    detail::list_names(text, what, lines, {});
  };
  list("loaded in part", report.parts);
  list("other shape or type", report.misfits);
  return text.str();
}

namespace detail {

/// Takes one of the prefixes off a name; false where it has none of them.
inline bool remove_prefix(std::string_view& name, const std::vector<std::string>& prefixes) {
  const auto prefix =
      std::ranges::find_if(prefixes, [&](const std::string& p) { return !p.empty() && name.starts_with(p); });
  if (prefix != prefixes.end()) name.remove_prefix(prefix->size());
  return prefix != prefixes.end();
}

/// The module's name that a file's name stands for: itself, or without prefixes; empty: none.
inline std::string name_in_module(std::string_view name, const TensorMap& module,
                                  const std::vector<std::string>& prefixes) {
  do {
    if (module.contains(std::string(name))) return std::string(name);
  } while (remove_prefix(name, prefixes));
  return "";
}

/// Pairs of the module's name and the tensor for it; fills the report.
inline std::map<std::string, torch::Tensor> match_names(const TensorMap& source, const TensorMap& module,
                                                        const std::vector<std::string>& prefixes, LoadReport& report) {
  std::map<std::string, torch::Tensor> matches;
  for (const auto& [name, tensor] : source) {
    if (module.contains(name)) matches.emplace(name, tensor);
  }
  for (const auto& [name, tensor] : source) {
    if (module.contains(name)) continue;
    const std::string meant = name_in_module(name, module, prefixes);
    if (meant.empty() || !matches.emplace(meant, tensor).second) report.unexpected.push_back(name);
  }
  for (const auto& [name, tensor] : module) {
    if (!matches.contains(name)) report.missing.push_back(name);
  }
  return matches;
}

/// The part that two tensors with as many axes both have: along each axis the first elements.
inline std::pair<torch::Tensor, torch::Tensor> common_part(torch::Tensor a, torch::Tensor b) {
  for (std::int64_t axis = 0; axis < a.dim(); ++axis) {
    const std::int64_t count = std::min(a.size(axis), b.size(axis));
    a = a.narrow(axis, 0, count);
    b = b.narrow(axis, 0, count);
  }
  return {a, b};
}

}  // namespace detail

/// A name without all that wrappers put before it.
inline std::string without_prefixes(std::string_view name, const std::vector<std::string>& prefixes) {
  while (detail::remove_prefix(name, prefixes)) {
  }
  return std::string(name);
}

/// Which tensors go into which.
struct Matches {
  LoadReport report;
  std::vector<std::pair<torch::Tensor, torch::Tensor>> copies;  ///< to, from

  void copy() const {
    const torch::NoGradGuard guard;
    for (const auto& [target, source] : copies) torch::Tensor(target).copy_(source);
  }
};

/// Which tensors match.
struct MatchRules {
  std::vector<std::string> prefixes = {};  ///< that a name may have besides
  bool same_types = false;                 ///< else floating types convert into each other
  std::set<std::string> in_part = {};      ///< which tensors, with other sizes, take the part that both have
};

/// Finds for each tensor of `target`, such as tensors_of(module), the one of its name, without prefixes where needed,
/// and of its shape.
inline Matches match_tensors(const TensorMap& source, const TensorMap& target, const MatchRules& rules) {
  Matches matches;
  LoadReport& report = matches.report;
  for (const auto& [name, from] : detail::match_names(source, target, rules.prefixes, report)) {
    const torch::Tensor& to = target.at(name);
    const bool fits =
        rules.same_types ? from.scalar_type() == to.scalar_type() : c10::canCast(from.scalar_type(), to.scalar_type());
    if (fits && from.sizes() == to.sizes()) {
      matches.copies.emplace_back(to, from);
      report.loaded.push_back(name);
      continue;
    }
    const bool in_part = fits && rules.in_part.contains(name) && from.dim() == to.dim() && from.numel() > 0;
    (in_part ? report.parts : report.misfits).push_back({name, detail::type_text(from), detail::type_text(to)});
    if (in_part) matches.copies.push_back(detail::common_part(to, from));
  }
  return matches;
}

/// Which tensors of a file a module takes with these options: parameters also in part, where that is allowed.
inline MatchRules rules_of(const torch::nn::Module& module, const LoadOptions& options) {
  MatchRules rules{.prefixes = options.prefixes};
  if (!options.allow_partial) return rules;
  for (const auto& parameter : module.named_parameters()) rules.in_part.insert(parameter.key());
  return rules;
}

/// "of its 7 tensors 4 fit, 1 are missing and 2 have another shape or type; 3 of the file are not in the module".
inline std::string summary_of(const LoadReport& report) {
  std::ostringstream text;
  const std::size_t fit = report.loaded.size(), missing = report.missing.size(), misfits = report.misfits.size();
  text << "of its " << fit + missing + misfits << " tensors " << fit << " fit, " << missing << " are missing and "
       << misfits << " have another shape or type; " << report.unexpected.size()
       << " of the file are not in the module";
  return text.str();
}

/// Copies the tensors of a file into the parameters and buffers of a module that have their names, whatever their
/// floating dtypes and the module's device. Nothing is copied unless every name and shape agrees, or
/// `options.allow_partial`; then the rest is told in the report. Throws headroom.weights.mismatch with that report, and
/// what open_weights throws.
inline LoadReport load_weights(torch::nn::Module& module, const std::filesystem::path& path,
                               const LoadOptions& options = {}) {
  Matches matches = match_tensors(load_tensors(path, options.key), tensors_of(module), rules_of(module, options));
  const LoadReport& report = matches.report;
  require(report.is_enough(options), "headroom.weights.mismatch", path.string(),
          " does not fit this module: ", summary_of(report),
          ". Build the module with the configuration that belongs to the file",
          report.may_fit_in_part(options) ? ", or allow a partial load to leave the rest as it is" : "",
          to_string(report));
  matches.copy();
  return std::move(matches.report);
}

}  // namespace headroom::inline v0::weights
