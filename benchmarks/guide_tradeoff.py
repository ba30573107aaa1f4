#!/usr/bin/env python3
"""The guide's table of memory, speed and quality, measured: its configurations, scaled to a small machine, trained for
equally many steps and scored on whole songs that were held out by a seed.

render_musdb.py --out SONGS --songs all --fullness 0.5 --held-out 5 --seed 1 --seconds 45
guide_tradeoff.py train --data SONGS --out FOLDER [--configurations xlarge,small] [--steps 180] [--points 3]
guide_tradeoff.py time  --data SONGS --out FOLDER [--configurations …]
guide_tradeoff.py table --out FOLDER [--json FILE]

`train` keeps a run a configuration and number of steps in FOLDER; those that are finished are kept. `time` takes the
shortest of some steps of each on all cores, and wants a machine without other work. `table` prints what is there.
"""

import argparse
import json
import re
import subprocess
from pathlib import Path

NAMES = ("xlarge", "memory_optimized_first", "memory_optimized", "small", "ultra_safe")
CONFIGURATIONS = Path("examples/configs")

SAMPLE_RATE = 16000
TIMED_STEPS = 12


def scaled(name):
    """Returns the guide's configuration of a name, scaled: depth and width a quarter, segments a twentieth of the
    time, windows of the same time with half of it between them, batches of 8 are 2 and of several passes 2 are left."""
    config = json.loads(re.sub(r"//[^\n]*", "", (CONFIGURATIONS / f"musdb18_{name}.json").read_text()))
    model, training = config["model"], config["training"]
    model |= {
        "n_fft": 512,
        "hop_length": 256,
        "n_layers": max(1, round(model["n_layers"] / 4)),
        "emb_dim": model["emb_dim"] // 4,
        "n_heads": round(model["n_heads"] / 4),
        "ffn_hidden_dim": [width // 4 for width in model["ffn_hidden_dim"]],
    }
    config["audio"]["sample_rate"] = SAMPLE_RATE
    config["data"]["convert"] = True
    training |= {
        "segment_length": training["segment_length"] * SAMPLE_RATE // (20 * 44100),
        "batch_size": max(1, training["batch_size"] // 4),
        "gradient_accumulation_steps": min(2, training["gradient_accumulation_steps"]),
        "learning_rate": 3e-3,
        "warmup_steps": 20,
        "validation": "tracks",
    }
    config["loss"] = {"windows": [1024, 512, 256], "hop": 128, "min_n_fft": 1024}
    return config


def run(arguments, folder, config, *options):
    """Runs `train` with a configuration; its files are in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "scaled.json"
    file.write_text(json.dumps(config, indent=1))
    subprocess.run([arguments.tool, "--config", file, "--data", arguments.data, "--out", folder, "--overwrite",
                    *options], check=True)


def lines(folder, kind):
    """Returns the lines of a kind in a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    found = (json.loads(line) for line in path.read_text().splitlines()) if path.exists() else ()
    return [line for line in found if line["kind"] == kind]


def train(arguments):
    """Trains on one core, so that several may run beside each other: quality and memory do not depend on the clock."""
    for name in arguments.configurations:
        folder = arguments.out / f"{name}-{arguments.steps}"
        if (folder / "summary.json").exists():
            continue
        config = scaled(name)
        per_point = arguments.steps // arguments.points
        config["training"] |= {"steps_per_epoch": per_point, "epochs": arguments.points}
        run(arguments, folder, config, "--threads", "1", "--steps", str(per_point * arguments.points))


def time(arguments):
    """Keeps the seconds of the shortest step of each configuration on all cores; one segment is validated."""
    for name in arguments.configurations:
        folder = arguments.out / f"{name}-timed"
        config = scaled(name)
        config["training"] |= {"validation": "segments", "validation_segments": 1, "steps_per_epoch": 100}
        run(arguments, folder, config, "--steps", str(TIMED_STEPS))


def row(folder):
    """Returns what was measured of a run, up to its last validation."""
    name = folder.name.split("-")[0]
    training = scaled(name)["training"]
    scores = {line["step"]: line["scores"]["nsdr"] for line in lines(folder, "validation")}
    timed = folder.with_name(f"{name}-timed")
    batch = training["batch_size"] * training["gradient_accumulation_steps"]
    return {
        "configuration": name,
        "steps": max(scores),
        "heard_seconds": max(scores) * batch * training["segment_length"] / SAMPLE_RATE,
        "peak_bytes": max(use["peak_bytes"] for line in lines(folder, "step") for use in line["phases"].values()),
        "seconds_per_step": min((line["seconds"] for line in lines(timed, "step")), default=None),
        "nsdr": scores[max(scores)],
        "curve": {step: score["mean"] for step, score in scores.items()},
    }


def table(arguments):
    """Prints a line a run, and what each validation scored."""
    rows = [row(folder) for folder in arguments.out.glob("*-[0-9]*") if lines(folder, "validation")]
    rows.sort(key=lambda measured: (measured["steps"], NAMES.index(measured["configuration"])))
    print(f"{'':24}{'steps':>6}{'heard, s':>10}{'peak, MiB':>11}{'s a step':>10}{'nSDR':>7}  at each validation")
    for r in rows:
        seconds = "" if r["seconds_per_step"] is None else f"{r['seconds_per_step']:.3f}"
        curve = " ".join(f"{score:.2f}" for score in r["curve"].values())
        print(f"{r['configuration']:24}{r['steps']:6}{r['heard_seconds']:10.0f}{r['peak_bytes'] / 2**20:11.1f}"
              f"{seconds:>10}{r['nsdr']['mean']:7.2f}  {curve}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "time", "table"))
    parser.add_argument("--tool", default="build/release/examples/train", help="the trainer (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder that render_musdb.py made")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--configurations", type=lambda text: text.split(","), default=NAMES,
                        help="some of them (default: all)")
    parser.add_argument("--steps", type=int, default=180, help="of each (default: %(default)s)")
    parser.add_argument("--points", type=int, default=3, help="validations, evenly spread (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    if not 1 <= arguments.points <= arguments.steps:
        parser.error(f"{arguments.points} validations of {arguments.steps} steps; give at least one step to each")
    if arguments.what != "table" and arguments.data is None:
        parser.error("--data is missing: the folder that render_musdb.py made")
    {"train": train, "time": time, "table": table}[arguments.what](arguments)


if __name__ == "__main__":
    main()
