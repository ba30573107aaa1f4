#pragma once

// The one place that knows which Catch2 is installed (Debian 12: 2.13).
#include <catch2/catch.hpp>
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
