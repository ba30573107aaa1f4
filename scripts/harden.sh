#!/usr/bin/env bash
# Attacks library and tools for longer than the tests do: hours with the default number of executions.
#
#   scripts/harden.sh [PART...]         default all of: sanitizers threads tidy failing fuzz
#   scripts/harden.sh --short [PART...] threads or tidy, or both, in two minutes, as the tests run them: without core's
#                                       tests resp. over core's headers; skipped where clang is missing (exit code 77)
#
# sanitizers   the tests on tensors and of training, and what they call, under the address and undefined-behaviour
#              sanitizers of the compiler; LibTorch itself has none
# threads      core's tests that start threads, and what starts threads above core (tests/threads), under the thread
#              sanitizer of clang; LibTorch itself has none
# tidy         clang-tidy over every header, with the checks of .clang-tidy
# failing      every call of separate, train and plan that changes a file fails once (full disk, error, write cut
#              short), every one that gets memory for tensors, and what else gets memory, once at each place
#              (tests/tools/failing.py)
# fuzz         scripts/fuzz.sh with HEADROOM_FUZZ_RUNS executions of each format (default 1000000)
#
# threads, tidy and fuzz need clang 19, in CLANG and CLANG_TIDY or as clang++-19 and clang-tidy-19 (Debian: clang-19
# clang-tidy-19 libclang-rt-19-dev libomp-19-dev).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

sanitizers() {
  build_preset sanitize torch_tests training_tests
  # Left out: five that ask where and how the system's allocator keeps memory, since the sanitizer has its own; one of
  # long sequences in every form, which takes minutes; and two that ask for hundreds of gigabytes which nobody touches,
  # but of which the sanitizer writes an eighth. LibTorch needs no suppressions; it asks for more than there is
  local left_out="raw pointers, which go back|the resident size follows|no function leaks under"
  left_out+="|offloaded checkpoints are|nothing that attention can be asked for takes more|planning costs the same"
  left_out+="|a large step is planned without|the parts of a peak are"
  ASAN_OPTIONS=allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
    ctest --preset sanitize --parallel "$(nproc)" -R "^(torch|training):" -E "$left_out"
}

threads_of_core() {
  # OpenMP's threads are known to the sanitizer by a tool of clang's runtime
  cmake -S . -B build/threads -G Ninja -DCMAKE_CXX_COMPILER="$clang" -DCMAKE_CXX_FLAGS="-O1 -g1 -fsanitize=thread -w" \
    -DHEADROOM_COMPONENTS=core -DHEADROOM_UNITY=ON -DHEADROOM_INSTALL=OFF
  cmake --build build/threads --parallel "$(nproc)" --target core_tests
  TSAN_OPTIONS=ignore_noninstrumented_modules=1 OMP_TOOL_LIBRARIES=$("$clang" -print-file-name=libarcher.so) \
    build/threads/tests/core_tests "[threads]"
}
threads() {
  $short || threads_of_core
  find_torch_for_clang
  mkdir -p build/threads
  "$clang" -std=c++20 -O1 -g1 -fopenmp -fsanitize=thread -w -I include "${torch_headers[@]}" \
    tests/threads/library.cpp -o build/threads/library "${torch_libraries[@]}"
  TSAN_OPTIONS=suppressions=tests/threads/suppressions.txt build/threads/library
}

tidy() {
  local headers=headroom
  if $short; then headers=core; fi
  find_torch_for_clang
  "$clang_tidy" --quiet "include/headroom/$headers.hpp" -- -x c++ -std=c++20 -I include "${torch_headers[@]}"
}

failing() {
  build train separate plan failing_calls
  python3 tests/tools/failing.py build/release/examples build/release/tests/libfailing_calls.so
}

fuzz() { scripts/fuzz.sh "${HEADROOM_FUZZ_RUNS:-1000000}"; }

clang_tidy=${CLANG_TIDY:-clang-tidy-19}
short=false known=(sanitizers threads tidy failing fuzz)
if [ "${1:-}" = --short ]; then
  shift
  short=true known=(threads tidy)
fi
parts=("$@")
[ $# -gt 0 ] || parts=("${known[@]}")
for part in "${parts[@]}"; do
  if [[ " ${known[*]} " != *" $part "* ]]; then
    echo "harden.sh: no part is called $part; there are ${known[*]}" >&2
    exit 2
  fi
done
if ! $short; then
  scripts/setup.sh
elif ! command -v "$clang" "$clang_tidy" > /dev/null; then
  echo "skipped: $clang or $clang_tidy is not here"
  exit 77
fi
for part in "${parts[@]}"; do
  echo "== $part"
  "$part"
done
