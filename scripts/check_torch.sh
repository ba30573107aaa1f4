#!/usr/bin/env bash
# Builds the library's tests against one version of LibTorch and runs them on the CPU, in a folder of their own.
#
#   scripts/check_torch.sh 2.11.0 [ctest options]   takes the version from PyPI, which may be a CUDA build of gigabytes
#
# The folder is build/torch-VERSION; the version's Python environment is in it. docs/100_gpu.md has a table of what was
# tried.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
version=${1:?scripts/check_torch.sh VERSION [ctest options]}
shift
folder=build/torch-$version
scripts/setup.sh
[ -x "$folder/venv/bin/python" ] || python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$version" numpy
torch=$("$folder/venv/bin/python" -c 'import torch; print(torch.__path__[0])')
cmake -S . -B "$folder/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DHEADROOM_NATIVE=ON -DHEADROOM_UNITY=ON \
  -DCMAKE_PREFIX_PATH="$torch"
cmake --build "$folder/build" --parallel 2 \
  --target torch_tests training_tests gpu_tests train separate evaluate plan failing_calls
ctest --test-dir "$folder/build" --output-on-failure -R '^(torch|training|gpu|tools):' \
  -E 'gpu: the check of a machine' "$@"
