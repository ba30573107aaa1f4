#!/usr/bin/env python3
"""Joins what training and evaluation measured into one JSON file and prints it as a table; see scripts/demo.sh."""

import argparse
import json
from pathlib import Path

STEMS = ("vocals", "drums", "bass", "other", "mean")

# Written by `evaluate --json`, each with one value a stem and their mean, and by `train` in its summary.json
EVALUATED = {"nsdr": "separated", "nsdr_silence": "silence", "nsdr_mixture": "mixture itself"}
TRAINED = ("train_seconds", "peak_bytes", "stored_scores_bytes")


def summarize(training, evaluation):
    """Returns the summary: nSDR of the separation and of two trivial estimators, time and memory of the training."""
    summary = {key: {stem: evaluation[key][stem] for stem in STEMS} for key in EVALUATED}
    return summary | {key: training[key] for key in TRAINED}


def table(summary):
    """Returns the summary as text."""
    lines = [f"{'nSDR in dB of':16}" + "".join(f"{stem:>9}" for stem in STEMS)]
    for key, name in EVALUATED.items():
        lines.append(f"{name:16}" + "".join(f"{summary[key][stem]:9.2f}" for stem in STEMS))
    peak, stored = summary["peak_bytes"], summary["stored_scores_bytes"]
    lines += [
        "",
        f"trained for               {summary['train_seconds']:8.0f} s",
        f"peak memory, measured     {peak / 2**20:8.0f} MiB",
        f"stored scores would add   {stored / 2**20:8.0f} MiB to the same step: "
        f"{(peak + stored) / peak:.1f} times as much",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training", type=Path, required=True, help="summary.json that train wrote")
    parser.add_argument("--evaluation", type=Path, required=True, help="JSON file that evaluate wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    summary = summarize(json.loads(arguments.training.read_text()), json.loads(arguments.evaluation.read_text()))
    arguments.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(table(summary))


if __name__ == "__main__":
    main()
