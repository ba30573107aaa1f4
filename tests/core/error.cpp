#include "headroom/core/error.hpp"

#include "support/catch.hpp"

using namespace headroom;

TEST_CASE("an error carries a stable id and a message that starts with it") {
  const Error error =
      testing::error_of([] { require(false, "headroom.core.example", "got ", 3, ", expected ", 4, "; add one"); });
  CHECK(error.id() == "headroom.core.example");
  CHECK(std::string(error.what()) == "[headroom.core.example] got 3, expected 4; add one");
  CHECK_NOTHROW(require(true, "headroom.core.example", "never printed"));
}
