# Sourced by the other scripts: goes to the project's folder, installs packages, and says how much may be built at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# Those that are missing
install_debian_packages() {
  local package missing=()
  for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  echo "Installing Debian packages: ${missing[*]}"
  as_root apt-get -q update
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends "${missing[@]}"
}

# What clang of scripts that need it is given for .venv's LibTorch: torch_headers, torch_libraries
clang=${CLANG:-clang++-19}
find_torch_for_clang() {
  local torch
  torch=$(.venv/bin/python -c 'import torch; print(torch.__path__[0])')
  torch_headers=(-isystem /usr/include/eigen3 -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include")
  torch_libraries=(-no-pie "$torch"/lib/libtorch{_cpu,}.so "$torch/lib/libc10.so" "$torch/lib/libgomp.so.1"
    "-Wl,-rpath,$torch/lib")
}

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
