#!/usr/bin/env bash
# Trains a small separator from nothing and measures it on a song it never heard, within 20 minutes on two cores:
# installs, builds the tools, renders the songs, trains, separates, evaluates. Everything it makes is in build/demo.
#
# A stage that is finished is not done again; after an interruption start the script again.
# HEADROOM_DEMO_SECONDS sets the time for training (default 420).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tools=build/release/examples
config=examples/configs/demo.json
data=build/demo/data
training=build/demo/training
model=$training/last.pt
training_seconds=${HEADROOM_DEMO_SECONDS:-420}

stage() {
  echo
  echo "== $1 (after $((SECONDS / 60)) min $((SECONDS % 60)) s)"
}

# What the training depends on: its configuration, its time and the songs
training_inputs() {
  echo "$training_seconds"
  cat "$config" "$data"/*/*/song.json
}

# Training goes on where it was killed, unless what it depends on has changed
train() {
  local inputs
  inputs=$(training_inputs | sha256sum)
  if [ "$(cat "$training/inputs.sha256" 2> /dev/null)" != "$inputs" ]; then
    rm -rf "$training"
    mkdir -p "$training"
    echo "$inputs" > "$training/inputs.sha256"
  fi
  if [ -f "$training/summary.json" ]; then
    echo "$training is there"
  else
    local resume=(--overwrite)  # what a run left that was killed before its first checkpoint
    [ ! -f "$model" ] || resume=(--resume "$model")
    "$tools/train" --config "$config" --data "$data" --out "$training" --seconds "$training_seconds" "${resume[@]}"
  fi
}

# The stems appear under their name only when all of them are written
separate() {
  if [ "$separated" -nt "$training/summary.json" ]; then
    echo "$separated is there"
  else
    rm -rf "$separated" "$separated.partial"
    mkdir -p "$separated.partial"
    "$tools/separate" --model "$model" "$song/mixture.wav" "$separated.partial"
    mv "$separated.partial" "$separated"
  fi
}

stage "Installing what is missing"
scripts/setup.sh demo

stage "Building the tools"
build train separate evaluate

stage "Rendering songs"
.venv/bin/python examples/data/render_musdb.py --out "$data"

stage "Training for $training_seconds s"
train

held_out=("$data"/test/*/)
song=${held_out[0]%/}
separated=build/demo/separated/$(basename "$song")

stage "Separating $(basename "$song")"
separate

stage "Evaluating"
"$tools/evaluate" --reference "$song" --estimate "$separated" --json build/demo/evaluation.json

stage "Result"
.venv/bin/python scripts/demo_summary.py --training "$training/summary.json" --evaluation build/demo/evaluation.json \
  --out build/demo/summary.json
echo "Listen: $PWD/$separated/{vocals,drums,bass,other}.wav beside $PWD/$song/mixture.wav"
