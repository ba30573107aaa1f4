#!/usr/bin/env bash
# Attacks the tools for longer than the tests do: hours with the default number of executions. The last two parts need
# clang 19, in CLANG or as clang++-19 (Debian: clang-19 libclang-rt-19-dev libomp-19-dev).
#
#   scripts/harden.sh [PART...]     default all of: failing fuzz threads
#
# failing   every call of separate, train and plan that changes a file fails once (full disk, error, write cut short), and
#           every one that gets memory for tensors (tests/tools/failing.py)
# fuzz      scripts/fuzz.sh with HEADROOM_FUZZ_RUNS executions of each format (default 1000000)
# threads   what starts threads above core, under the thread sanitizer of clang (tests/threads); LibTorch has none
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parts=("$@")
[ $# -gt 0 ] || parts=(failing fuzz threads)
for part in "${parts[@]}"; do
  case $part in
    failing)
      scripts/setup.sh
      build train separate plan failing_calls
      python3 tests/tools/failing.py build/release/examples build/release/tests/libfailing_calls.so
      ;;
    fuzz) scripts/fuzz.sh "${HEADROOM_FUZZ_RUNS:-1000000}" ;;
    threads)
      scripts/setup.sh
      find_torch_for_clang
      mkdir -p build/threads
      "$clang" -std=c++20 -O1 -g1 -fopenmp -fsanitize=thread -w -I include "${torch_headers[@]}" \
        tests/threads/library.cpp -o build/threads/library "${torch_libraries[@]}"
      TSAN_OPTIONS=suppressions=tests/threads/suppressions.txt build/threads/library
      ;;
    *)
      echo "harden.sh: no part is called $part; there are failing, fuzz and threads" >&2
      exit 2
      ;;
  esac
done
