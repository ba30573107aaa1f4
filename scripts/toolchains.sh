#!/usr/bin/env bash
# Tries core with each compiler: its warnings (tests/static/core_warnings.py), then its tests, with kernels of their own
# and the flags given; those for ARM are run by qemu. Prints a table.
#
#   scripts/toolchains.sh                 all that are installed of those that Debian 12 and 13 have
#   scripts/toolchains.sh COMPILER...     only these, as g++-12 clang++-16 aarch64-linux-gnu-g++
#   scripts/toolchains.sh --install       installs them first
#
# HEADROOM_FLAGS in the environment is what they are given beyond -O3: HEADROOM_FLAGS="-mavx2 -mfma".
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
packages=(g++-12 clang-14 clang-15 clang-16 clang-19 g++-aarch64-linux-gnu qemu-user cmake ninja-build libeigen3-dev
          catch2)
compilers=(g++-11 g++-12 g++-13 g++-14 clang++-14 clang++-15 clang++-16 clang++-19 aarch64-linux-gnu-g++)
if [ "${1:-}" = --install ]; then
  shift
  install_debian_packages "${packages[@]}"
fi
[ $# -eq 0 ] || compilers=("$@")
flags=${HEADROOM_FLAGS:-}

# What makes CMake build for ARM, and what runs such a program here
cross=() run=()
for_target() {
  cross=() run=()
  case "$1" in
    aarch64-linux-gnu-*)
      run=(qemu-aarch64 -L /usr/aarch64-linux-gnu)
      cross=(-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64
             "-DCMAKE_CROSSCOMPILING_EMULATOR=${run[0]};-L;${run[2]}")
      ;;
  esac
}

# try_compiler NAME: one row of the table
try_compiler() {
  local compiler=$1 folder build warnings tests seconds=$SECONDS
  folder=build/toolchains/$compiler${flags// /}
  for_target "$compiler"
  mkdir -p "$folder"
  warnings=$(python3 tests/static/core_warnings.py . "$compiler" $flags -isystem /usr/include/eigen3 2>&1 |
    tee "$folder/warnings.log" | sed -n 's/.*, \([0-9]*\) warnings.*/\1/p') || true  # it fails where there are some
  build="not built"
  if cmake -S . -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_COMPILER="$compiler" \
    -DCMAKE_CXX_FLAGS="$flags" -DHEADROOM_COMPONENTS=core -DHEADROOM_UNITY=ON -DHEADROOM_INSTALL=OFF "${cross[@]}" \
    > "$folder/build.log" 2>&1 && cmake --build "$folder" --parallel "${HEADROOM_JOBS:-$(nproc)}" --target core_tests \
    >> "$folder/build.log" 2>&1; then
    "${run[@]}" "$folder/tests/core_tests" > "$folder/tests.log" 2>&1 || true
    build=$(tail -n 3 "$folder/tests.log" | grep -E 'passed|failed' | tr -s ' \n' ' ') || true
  fi
  tests=${build:-"stopped: $(tail -n 1 "$folder/tests.log")"}
  printf '| %s %s | %s | %s | %s | %s s |\n' "$compiler" \
         "$("$compiler" -dumpfullversion 2> /dev/null || "$compiler" -dumpversion)" \
    "${flags:-plain}" "${warnings:-?}" "$tests" $((SECONDS - seconds))
}

echo '| compiler | flags | warnings in headers | core_tests | took |'
echo '|---|---|---|---|---|'
for compiler in "${compilers[@]}"; do
  if command -v "$compiler" > /dev/null; then
    try_compiler "$compiler"
  else
    echo "| $compiler | | | not installed | |"
  fi
done
