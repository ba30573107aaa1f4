#!/usr/bin/env bash
# Attacks the tools for longer than the tests do: half an hour with the default number of executions.
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
      torch=$(.venv/bin/python -c 'import torch; print(torch.__path__[0])')
      mkdir -p build/threads
      "${CLANG:-clang++-19}" -std=c++20 -O1 -g1 -fopenmp -fsanitize=thread -w -I include -isystem /usr/include/eigen3 \
        -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" tests/threads/library.cpp \
        -o build/threads/library -no-pie "$torch"/lib/libtorch{_cpu,}.so "$torch/lib/libc10.so" \
        "$torch/lib/libgomp.so.1" "-Wl,-rpath,$torch/lib"
      TSAN_OPTIONS=suppressions=tests/threads/suppressions.txt build/threads/library
      ;;
    *)
      echo "harden.sh: no part is called $part; there are failing, fuzz and threads" >&2
      exit 2
      ;;
  esac
done
