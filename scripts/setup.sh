#!/usr/bin/env bash
# Installs what is missing, and nothing twice: Debian packages, and .venv with LibTorch and a few Python packages.
#
#   scripts/setup.sh            what building and testing need
#   scripts/setup.sh demo       also what scripts/demo.sh needs: songs, a synthesizer and its sounds
#   scripts/setup.sh figures    also what drawing the figures in docs/ needs
#   scripts/setup.sh docs       also what scripts/docs.sh needs
#
# A LibTorch of your own is used instead of .venv's when CMAKE_PREFIX_PATH or Torch_DIR names it, or CMake finds it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

debian_packages=(
  g++ cmake ninja-build ccache git pkg-config clang-format-14 python3-venv ca-certificates
  libeigen3-dev catch2 nlohmann-json3-dev libsndfile1-dev libsoxr-dev libyaml-cpp-dev libcli11-dev
  librubberband-dev
  chromium # a test opens the page that plan --html writes
)
python_packages=(numpy mido soundfile safetensors scikit-build-core)
for group in "$@"; do
  case "$group" in
    demo) debian_packages+=(freedoom fluidsynth fluid-soundfont-gm) ;;
    figures) python_packages+=(matplotlib) ;;
    docs) debian_packages+=(doxygen) ;;
    *)
      echo "setup.sh: '$group' is no group of packages; there are: demo, figures, docs" >&2
      exit 2
      ;;
  esac
done

# True when this project's own CMake code finds a LibTorch
has_torch() {
  local folder found=1
  folder=$(mktemp -d)
  cat > "$folder/CMakeLists.txt" << END
cmake_minimum_required(VERSION 3.25)
project(probe CXX)
list(APPEND CMAKE_MODULE_PATH "$PWD/cmake")
include(HeadroomTorch)
if(NOT TARGET torch AND NOT TARGET headroom::torch)
  message(FATAL_ERROR "no LibTorch")
endif()
END
  if cmake -S "$folder" -B "$folder/build" > /dev/null 2>&1; then found=0; fi
  rm -rf "$folder"
  return "$found"
}

install_python_packages() {
  [ -x .venv/bin/python ] || python3 -m venv .venv
  if ! has_torch; then
    echo "Installing LibTorch: the Python package torch has its headers and libraries"
    python_packages+=(torch==2.13.0)
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${python_packages[@]}"
}

if command -v apt-get > /dev/null; then
  install_debian_packages "${debian_packages[@]}"
else
  echo "This system has no apt-get. Its counterparts of these Debian packages must be there: ${debian_packages[*]}"
fi
install_python_packages
