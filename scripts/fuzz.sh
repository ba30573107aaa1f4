#!/usr/bin/env bash
# Fuzzes the readers of weight files and of YAML with libFuzzer, under the address and undefined-behaviour sanitizers.
#
#   scripts/fuzz.sh [RUNS [FORMAT...]]   executions for each format (default 100000) of: safetensors zip pickle legacy
#                                        yaml
#
# Needs clang (Debian: clang libclang-rt-14-dev). The inputs that reached something new are kept in build/fuzz and are
# where the next run begins; an input that breaks a reader is then build/fuzz/crash-*.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
runs=${1:-100000}
formats=("${@:2}")
[ ${#formats[@]} -gt 0 ] || formats=(safetensors zip pickle legacy yaml)
mkdir -p build/fuzz/{safetensors,zip,pickle,legacy,yaml}
for reader in weights yaml; do
  clang++ -std=c++20 -O2 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -I include \
    "tests/fuzz/$reader.cpp" -o "build/fuzz/read_$reader" -lyaml-cpp
done

# The small files of the tests are what to begin with, and the pickles in the archives
cp -n tests/weights/files/*.safetensors build/fuzz/safetensors
cp -n tests/weights/files/legacy.pt build/fuzz/legacy
cp -n tests/tools/published/*.yaml build/fuzz/yaml
for file in tests/weights/files/*.{pt,ckpt,pth}; do
  case $file in */legacy.pt) continue ;; esac
  [ "$(stat -c %s "$file")" -gt 4096 ] || cp -n "$file" build/fuzz/zip
  python3 -c 'import sys, zipfile
archive = zipfile.ZipFile(sys.argv[1])
sys.stdout.buffer.write(archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl"))))' \
    "$file" > "build/fuzz/pickle/$(basename "$file")"
done
for format in "${formats[@]}"; do
  echo "== $format"
  reader=weights
  [ "$format" != yaml ] || reader=yaml
  "build/fuzz/read_$reader" -runs="$runs" -max_len=4096 -malloc_limit_mb=64 -rss_limit_mb=1024 -timeout=10 \
    -print_final_stats=1 -artifact_prefix=build/fuzz/ "build/fuzz/$format" 2>&1 |
    grep -E "^(Done|stat::|SUMMARY|==|.*ERROR|    #)"
done
