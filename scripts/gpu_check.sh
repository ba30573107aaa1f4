#!/usr/bin/env bash
# Everything that needs a GPU, in one go, for a machine that is there for minutes: tests, then benchmarks, each into one
# log and one JSON file. A part that fails or runs too long does not stop the others; without a GPU each says skipped.
#
#   scripts/gpu_check.sh --bundle DIR [--torch DIR]   on Debian: puts the headers and libraries that the build needs
#                                                     into DIR, and with --torch (a LibTorch folder of the version that
#                                                     the other machine has) also programs that are ready to run
#   scripts/gpu_check.sh [--from DIR] [--out DIR]     on the machine with the GPU, whose python3 has PyTorch
#
#   --from DIR       the bundle; without one, what is installed
#   --programs DIR   programs that are built already (default: those of the bundle, if they start)
#   --build          build, also where there are programs
#   --out DIR        for gpu_check.json and gpu_check.log (default build/gpu_check)
#   --minutes N      what the parts together may take (default 6), without the build
#   --parts "A B"    only these of: tests plan policies attention step step_bf16 cpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bundle= torch= from= programs= out=build/gpu_check minutes=6 build=false
parts="tests plan policies step step_bf16 attention cpu"
targets=(gpu_tests gpu_plan gpu_policies gpu_attention train_step attention_speed)

while [ $# -gt 0 ]; do
  case "$1" in
    --bundle) bundle=$2 ;;
    --torch) torch=$2 ;;
    --from) from=$2 ;;
    --programs) programs=$2 ;;
    --out) out=$2 ;;
    --minutes) minutes=$2 ;;
    --parts) parts=$2 ;;
    --build)
      build=true
      shift
      continue
      ;;
    *)
      sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
      exit 2
      ;;
  esac
  shift 2
done

# Builds the programs against the LibTorch in $1 into the folder $2, with headers below $3 where that is given.
build_programs() {
  cmake -S . -B "$2" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS=-march=x86-64-v3 \
    -DCMAKE_PREFIX_PATH="$1${3:+;$3/usr}" ${3:+"-DCMAKE_LIBRARY_PATH=$3/usr/lib/x86_64-linux-gnu"} \
    -DCMAKE_EXE_LINKER_FLAGS=-Wl,--unresolved-symbols=ignore-in-shared-libs -DHEADROOM_INSTALL=OFF
  cmake --build "$2" --parallel "${HEADROOM_JOBS:-$(nproc)}" --target "${targets[@]}"
}
# The programs of a build folder, wherever they lie in it
collect_programs() {
  local target
  mkdir -p "$2"
  for target in "${targets[@]}"; do
    find "$1" -name "$target" -type f -perm -u+x -exec cp {} "$2/" \;
  done
}

make_bundle() {
  local package library name
  mkdir -p "$bundle"
  for package in libeigen3-dev nlohmann-json3-dev catch2 libcli11-dev libsndfile1-dev libsoxr-dev libyaml-cpp-dev \
    librubberband-dev; do
    dpkg -L "$package" | grep -E '^/usr/(include|lib|share)/' | grep -vE '/(doc|man|pkgconfig)/' |
      while read -r file; do
        if [ -f "$file" ]; then cp -P --parents "$file" "$bundle"; fi
      done
  done
  for name in libsndfile.so.1 libsoxr.so.0 libyaml-cpp.so.0.7 librubberband.so.2; do
    library=$(ldconfig -p | awk -v name="$name" '$1 == name {print $NF; exit}')
    for library in "$library" $(ldd "$library" |
        awk '/=> .*\/lib(FLAC|ogg|vorbis|vorbisenc|opus|mpg123|mp3lame)\.so/ {print $3}'); do
      cp -L --parents "/usr${library#/usr}" "$bundle"
    done
    ln -sf "$name" "$(dirname "$(find "$bundle" -name "$name")")/${name%%.so*}.so"
  done
  if [ -n "$torch" ]; then
    build_programs "$(realpath "$torch")" build/gpu_bundle
    collect_programs build/gpu_bundle "$bundle/programs"
    strip "$bundle"/programs/*
  fi
  du -sh "$bundle"
}

if [ -n "$bundle" ]; then
  make_bundle
  exit
fi

mkdir -p "$out"
out=$(realpath "$out")
log=$out/gpu_check.log
: > "$log"
python=${HEADROOM_PYTHON:-python3}
torch=${torch:-$("$python" -c 'import torch; print(torch.__path__[0])' 2> /dev/null || true)}
if [ -n "$torch" ]; then export LD_LIBRARY_PATH="$torch/lib:${LD_LIBRARY_PATH:-}"; fi
if [ -n "$from" ]; then
  from=$(realpath "$from")
  export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}:$(find "$from/usr/lib" -name 'libsndfile.so.1' -printf '%h\n' | head -1)"
  programs=${programs:-$from/programs}
fi

seconds=0
if "$build" || [ -z "$programs" ] || ! "$programs/gpu_tests" --help > /dev/null 2>> "$log"; then
  start=$SECONDS
  build_programs "$torch" "$out/build" "$from" >> "$log" 2>&1
  collect_programs "$out/build" "$out/programs"
  programs=$out/programs
  seconds=$((SECONDS - start))
  echo "built in $seconds s"
fi
programs=$(realpath "$programs")

rows=$out/parts.jsonl
: > "$rows"
end=$((SECONDS + minutes * 60))
# run NAME SECONDS COMMAND...: what it prints goes to the log and the terminal
run() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  case " $parts " in *" $name "*) ;; *) return 0 ;; esac
  local left=$((end - SECONDS))
  limit=$((limit < left ? limit : left))
  echo "== $name" | tee -a "$log"
  if [ "$limit" -lt 5 ]; then
    status=124
  else
    timeout --kill-after 5 "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
    cat "$out/$name.log" | tee -a "$log"
  fi
  printf '{"name": "%s", "status": %d, "seconds": %d}\n' "$name" "$status" $((SECONDS - start)) >> "$rows"
}

configs="examples/configs/musdb18_small.json examples/configs/musdb18_memory_optimized.json"
step="$programs/train_step $configs --device cuda --segment 66150 --steps 4 --python $python --compiled"
run tests 150 "$programs/gpu_tests"
run plan 170 "$programs/gpu_plan" --json "$out/plan.json"
run policies 40 "$programs/gpu_policies" --json "$out/policies.json"
run step 120 $step --json "$out/step.json"
run step_bf16 120 $step --bf16 --json "$out/step_bf16.json"
run attention 150 "$programs/gpu_attention" --json "$out/attention.json"
run cpu 60 "$programs/attention_speed" --shape 8x12x431 1x4x2049 --head-dim 16 64 --variant plain --json "$out/cpu.json"

"$python" - "$out" "$seconds" << 'END'
import json, pathlib, re, sys

out, build_seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2])
parts = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
for part in parts:
    file, log = out / (part["name"] + ".json"), out / (part["name"] + ".log")
    text = log.read_text() if log.exists() else ""
    if part["name"] == "tests":
        part["skipped"] = sorted(set(re.findall(r"skipped: (.*)", text)))
        part["summary"] = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    skipped = re.search(r"skipped: (there is no|LibTorch was not built)", text)
    part["result"] = ("skipped" if skipped else "too long" if part["status"] in (124, 137)
                      else "passed" if part["status"] == 0 else "failed")
    if file.exists():
        try:
            part["figures"] = json.loads(file.read_text())
        except ValueError:
            part["figures"] = None
(out / "gpu_check.json").write_text(json.dumps({"build_seconds": build_seconds, "parts": parts}, indent=1) + "\n")
for part in parts:
    print(f'{part["name"]:12} {part["result"]:10} {part["seconds"]:4} s')
END
