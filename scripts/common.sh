# Sourced by the other scripts: goes to the project's folder, installs packages, and says how much may be built at a
# time.
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

# The clang of scripts that need one of 16 or newer: CLANG, or the newest of Debian's that is here
clang=${CLANG:-$(command -v clang++-{19,18,17,16} | head -n 1 || true)}
clang=${clang:-clang++-19}

# What it is given for .venv's LibTorch: torch_headers, torch_libraries. A CUDA build asks for libraries that it finds
# itself
find_torch_for_clang() {
  local torch
  torch=$(.venv/bin/python -c 'import torch; print(torch.__path__[0])')
  torch_headers=(-isystem /usr/include/eigen3 -isystem "$torch/include"
                 -isystem "$torch/include/torch/csrc/api/include")
  torch_libraries=(-no-pie "$torch"/lib/libtorch{_cpu,}.so "$torch/lib/libc10.so" "$torch"/lib/libgomp*.so*
    "-Wl,-rpath,$torch/lib" -Wl,--allow-shlib-undefined)
}

# Builds targets (all of them when none is named) of the release preset
build() { build_preset release "$@"; }

# build_preset PRESET [TARGET...]. A unit that includes LibTorch takes about 2 GB to compile, so memory limits the
# number of compilers too.
build_preset() {
  local preset=$1 available_kb cores jobs
  shift
  available_kb=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo)
  cores=$(nproc)
  jobs=$((available_kb / (2 * 1024 * 1024)))
  jobs=$((jobs < 1 ? 1 : jobs < cores ? jobs : cores))
  cmake --preset "$preset"
  cmake --build --preset "$preset" --parallel "$jobs" ${1:+--target "$@"}
}
