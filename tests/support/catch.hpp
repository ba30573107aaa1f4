#pragma once

// The one place that knows which Catch2 is installed: 3, or 2.13 (Debian 12).
#if __has_include(<catch2/catch_test_macros.hpp>)
#include <catch2/catch_approx.hpp>
#include <catch2/catch_session.hpp>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators_all.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
using Catch::Approx;
namespace Catch {
using Matchers::StartsWith;
inline auto Contains(const std::string& part) { return Matchers::ContainsSubstring(part); }
}
#else
#include <catch2/catch.hpp>
#endif

#include <string>
#include <string_view>

#include "headroom/core/error.hpp"

namespace headroom::testing {

/// Runs `f` and returns the headroom::Error it throws; fails the test when it throws nothing.
template <class F>
Error error_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e;
  }
  FAIL("expected a headroom::Error");
  return Error("", "");
}

inline bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

}  // namespace headroom::testing
