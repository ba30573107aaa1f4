#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>

namespace headroom::inline v0::training {

/// What an error says, for a message of ours: of LibTorch's errors the first line, without its places in LibTorch's
/// source, its backtrace and its wish for a bug report, which is no concern of who gave a damaged file.
inline std::string cause(const std::exception& error) {
  const auto* const torch_error = dynamic_cast<const c10::Error*>(&error);
  std::string text = torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
  text = text.substr(0, text.find('\n'));
  // "<condition> INTERNAL ASSERT FAILED at "<file>":<line>, please report a bug to PyTorch. <what>"
  const std::string assertion = "INTERNAL ASSERT FAILED at ", report = "please report a bug to PyTorch.";
  if (const auto failed = text.find(assertion); failed != std::string::npos) {
    const auto end = text.find(report, failed);
    const std::string what = end == std::string::npos ? "" : text.substr(end + report.size());
    text = what.find_first_not_of(' ') == std::string::npos ? "LibTorch's check of it failed"
                                                            : what.substr(what.find_first_not_of(' '));
  }
  while (!text.empty() && (text.back() == ' ' || text.back() == '.')) text.pop_back();
  return text;
}

}  // namespace headroom::inline v0::training
