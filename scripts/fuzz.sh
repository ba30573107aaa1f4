#!/usr/bin/env bash
# Fuzzes what reads files and words of strangers with libFuzzer, under the address and undefined-behaviour sanitizers.
#
#   scripts/fuzz.sh [RUNS [FORMAT...]]   executions for each format (default 100000), of those below
#
# Without LibTorch: safetensors zip pickle legacy (weights), demucs (the model in a checkpoint), yaml, json, container
# (lengths in headers of audio files), table (CSV of a data set). With LibTorch: configuration, profile (of a device),
# words (that have a syntax of their own on a command line), audio (through libsndfile), state (saved, up to its
# archive).
#
# HEADROOM_FUZZ_LENGTH in the environment is the longest input (4096 bytes); with 256 there are three times as many a
# second. Blocks do not keep who allocated them, which costs a third: the input that breaks a reader tells it when run
# alone.
#
# Needs clang 16 or newer, in CLANG or by Debian's name (clang-19 libclang-rt-19-dev), and is skipped without. The
# inputs that reached something new are kept in build/fuzz/FORMAT, or below HEADROOM_FUZZ_FOLDER, and are where the next
# run begins; an input that breaks a reader is then FORMAT-crash-* there. tests/fuzz/found has those that once did.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
runs=${1:-100000}
formats=("${@:2}")
plain=(safetensors zip pickle legacy demucs yaml json container table)
with_torch=(configuration profile words audio state)
[ ${#formats[@]} -gt 0 ] || formats=("${plain[@]}" "${with_torch[@]}")
out=${HEADROOM_FUZZ_FOLDER:-build/fuzz}
export ASAN_OPTIONS=malloc_context_size=0:${ASAN_OPTIONS:-}
if ! "$clang" -fsanitize=fuzzer -x c++ - -o /dev/null 2> /dev/null \
  <<< 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }'; then
  echo "skipped: $clang is not here, or without libFuzzer"
  exit 77
fi
flags=(-std=c++20 -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -I include -I .)
for format in "${plain[@]}" "${with_torch[@]}"; do mkdir -p "$out/$format"; done

# The name of the reader of a format: of tests/fuzz/READER.cpp
reader_of() {
  case $1 in safetensors | zip | pickle | legacy) echo weights ;; *) echo "$1" ;; esac
}

# True when FILE is newer than every source; its own dependencies would say no more than that sources changed
is_built() {
  [ -e "$1" ] && [ -z "$(find include examples tests/fuzz scripts/fuzz.sh -newer "$1" -type f -print -quit)" ]
}

build_plain() {
  is_built "$out/read_$1" ||
    "$clang" "${flags[@]}" -fsanitize=fuzzer "tests/fuzz/$1.cpp" -o "$out/read_$1" -lyaml-cpp
}

# torch/torch.h and what reads configurations are compiled once. Nothing is computed, so the kernels may be missing;
# types of LibTorch that it does not export are unknown to the check of virtual calls (vptr)
build_with_torch() {
  local name objects=()
  is_built "$out/read_$1" && return
  find_torch_for_clang
  local compile=("$clang" "${flags[@]}" -fsanitize=fuzzer-no-link -fno-sanitize=vptr -w
    -DHEADROOM_SEPARATE_KERNELS -DHEADROOM_SEPARATE_TRAINING "${torch_headers[@]}")
  [ "$out/torch.pch" -nt scripts/fuzz.sh ] ||
    "${compile[@]}" -x c++-header "${torch_headers[-1]}/torch/torch.h" -o "$out/torch.pch"
  for name in tests/fuzz/training examples/command_line "tests/fuzz/$1"; do
    objects+=("$out/$(basename "$name").o")
    is_built "${objects[-1]}" ||
      "${compile[@]}" -include-pch "$out/torch.pch" -c "$name.cpp" -o "${objects[-1]}"
  done
  "$clang" -fsanitize=fuzzer,address,undefined "${objects[@]}" -o "$out/read_$1" -Wl,-z,now \
    -Wl,--unresolved-symbols=ignore-in-object-files "${torch_libraries[@]}" -lsndfile -lsoxr -lyaml-cpp
}

python3 tests/fuzz/seeds.py "$out"
for format in "${formats[@]}"; do
  echo "== $format"
  reader=$(reader_of "$format")
  case " ${plain[*]} " in
    *" $format "*) build_plain "$reader" ;;
    *) build_with_torch "$reader" ;;
  esac
  options=("-max_len=${HEADROOM_FUZZ_LENGTH:-4096}" -malloc_limit_mb=64 -rss_limit_mb=1536 -timeout=60
    -report_slow_units=60 -error_exitcode=1 "-artifact_prefix=$out/$format-")  # its own, 77, would be "skipped" here
  [ ! -e "$out/$format.dict" ] || options+=("-dict=$out/$format.dict")
  [ ! -d "tests/fuzz/found/$format" ] || "$out/read_$reader" "${options[@]}" "tests/fuzz/found/$format"/*
  "$out/read_$reader" -runs="$runs" "${options[@]}" -print_final_stats=1 "$out/$format" 2>&1 |
    grep -aE "^(Done|stat::number|#.*DONE|SUMMARY|==|.*ERROR|    #)|runtime error|terminate"
done
