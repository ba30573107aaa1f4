#!/usr/bin/env bash
# Attacks the tools for longer than the tests do: half an hour with the default number of executions.
#
#   scripts/harden.sh [PART...]     default all of: failing fuzz
#
# failing   every call of separate, train and plan that changes a file fails once (full disk, error, write cut short), and
#           every one that gets memory for tensors (tests/tools/failing.py)
# fuzz      scripts/fuzz.sh with HEADROOM_FUZZ_RUNS executions of each format (default 1000000)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parts=("$@")
[ $# -gt 0 ] || parts=(failing fuzz)
for part in "${parts[@]}"; do
  case $part in
    failing)
      scripts/setup.sh
      build train separate plan failing_calls
      python3 tests/tools/failing.py build/release/examples build/release/tests/libfailing_calls.so
      ;;
    fuzz) scripts/fuzz.sh "${HEADROOM_FUZZ_RUNS:-1000000}" ;;
    *)
      echo "harden.sh: no part is called $part; there are failing and fuzz" >&2
      exit 2
      ;;
  esac
done
