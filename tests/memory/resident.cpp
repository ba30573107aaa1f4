#include "headroom/memory/resident.hpp"

#include <sys/resource.h>

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <vector>

#include "headroom/memory/expandable_segments.hpp"
#include "headroom/memory/format.hpp"
#include "support/catch.hpp"

using namespace headroom;

TEST_CASE("bytes are printed with two decimals in binary units") {
  CHECK(format_bytes(0) == "0 B");
  CHECK(format_bytes(1023) == "1023 B");
  CHECK(format_bytes(1024) == "1.00 KiB");
  CHECK(format_bytes(1536) == "1.50 KiB");
  CHECK(format_bytes(86'856'519'888) == "80.89 GiB");  // the allocation that crashed the guide's trainer
  CHECK(format_bytes(1024 * 1024 - 1) == "1.00 MiB");  // not 1024.00 KiB
  CHECK(format_bytes(-2048) == "-2.00 KiB");
  CHECK(format_bytes(std::numeric_limits<std::int64_t>::max()) == "8.00 EiB");
}

TEST_CASE("the resident size follows touched pages, its peak remembers them until reset") {
  constexpr std::int64_t size = 64 << 20;
  constexpr std::int64_t slack = 4 << 20;
  reset_peak_resident_bytes();
  const std::int64_t before = resident_bytes();
  {
    const std::vector<char> buffer(size, 1);
    CHECK(buffer.back() == 1);
    CHECK(resident_bytes() - before > size - slack);
    CHECK(resident_bytes() - before < size + slack);
  }
  CHECK(resident_bytes() - before < slack);
  CHECK(peak_resident_bytes() - before > size - slack);
  reset_peak_resident_bytes();
  CHECK(peak_resident_bytes() - before < slack);
}

TEST_CASE("a missing field of the process status is an error") {
  const Error error = testing::error_of([] { headroom::detail::process_status("VmNothing:"); });
  CHECK(error.id() == "headroom.memory.resident");
  CHECK(testing::contains(error.what(), "VmNothing:"));
}

TEST_CASE("that no further file can be opened is no missing field of the process status") {
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &before) == 0);
  const rlimit none{0, before.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &none) == 0);
  const Error error = testing::error_of([] { resident_bytes(); });
  ::setrlimit(RLIMIT_NOFILE, &before);
  CHECK(error.id() == "headroom.memory.resident");
  CHECK(testing::contains(error.what(), "Too many open files"));
}

TEST_CASE("segments are made expandable for CUDA alone, and not where the environment configures the allocator") {
  using c10::CachingAllocator::AcceleratorAllocatorConfig;
  CHECK_FALSE(expand_segments(c10::kCPU));
  ::setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64", 1);
  CHECK_FALSE(expand_segments(c10::kCUDA));
  ::unsetenv("PYTORCH_CUDA_ALLOC_CONF");
  CHECK_FALSE(AcceleratorAllocatorConfig::use_expandable_segments());
  CHECK(expand_segments(c10::kCUDA));
  CHECK(AcceleratorAllocatorConfig::use_expandable_segments());
  c10::CachingAllocator::setAllocatorSettings("expandable_segments:False");
}
