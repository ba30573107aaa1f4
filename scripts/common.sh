# Sourced by the other scripts: goes to the project's folder and says how much may be built at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Builds targets (all of them when none is named) of the release preset. A unit that includes LibTorch takes about
# 2 GB to compile, so memory limits the number of compilers too.
build() {
  local available_kb cores jobs
  available_kb=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo)
  cores=$(nproc)
  jobs=$((available_kb / (2 * 1024 * 1024)))
  jobs=$((jobs < 1 ? 1 : jobs < cores ? jobs : cores))
  cmake --preset release
  cmake --build --preset release --parallel "$jobs" ${1:+--target "$@"}
}
