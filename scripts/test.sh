#!/usr/bin/env bash
# Installs what is missing, builds everything, runs all tests. Ends with ctest's summary and its exit code.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
scripts/setup.sh
build
ctest --preset release --parallel "$(nproc)"
