#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace headroom::inline v0 {

/// The one exception type of the library. `id()` is stable and listed in docs/errors.md; `what()` is
/// "[id] what was given, what is expected, what to do".
class Error : public std::runtime_error {
 public:
  Error(std::string_view id, const std::string& message)
      : std::runtime_error(std::string("[").append(id).append("] ").append(message)), id_(id) {}

  const std::string& id() const noexcept { return id_; }

 private:
  std::string id_;
};

/// Throws Error whose message is all `parts` printed one after the other.
template <class... Parts>
[[noreturn]] void fail(std::string_view id, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(id, message.str());
}

/// Throws Error unless `condition` holds.
template <class... Parts>
void require(bool condition, std::string_view id, const Parts&... parts) {
  if (!condition) [[unlikely]] {
    fail(id, parts...);
  }
}

}  // namespace headroom::inline v0
