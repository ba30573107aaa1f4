#!/usr/bin/env python3
"""`evaluate` beside museval 0.4.1: the same scores, time on as many threads, and memory for a track ten times as long.

evaluate.py --tool build/release/examples/evaluate --reference TRACK --estimate TRACK [--seconds 60] [--threads 2]
            [--json FILE]

Needs Python with museval, numpy and soundfile. A track that is shorter is repeated.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

STEMS = ["vocals", "drums", "bass", "other"]
METRICS = ["SDR", "ISR", "SIR", "SAR"]


def load_museval():
    """museval/metrics.py by itself: the package asks for ffmpeg."""
    package = Path(importlib.util.find_spec("museval").origin).parent
    spec = importlib.util.spec_from_file_location("metrics", package / "metrics.py")
    metrics = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(metrics)
    np.linalg.linalg = np.linalg  # what museval 0.4.1 calls it
    return metrics


def write_excerpt(source, folder, seconds):
    """The first seconds of the stems, repeated where there are fewer."""
    folder.mkdir(parents=True)
    for stem in STEMS:
        samples, rate = soundfile.read(source / f"{stem}.wav", always_2d=True, dtype="float32")
        count = seconds * rate
        repeated = np.tile(samples, (-(-count // len(samples)), 1))[:count]
        soundfile.write(folder / f"{stem}.wav", repeated, rate, subtype="FLOAT")


def run_tool(arguments, folder, *options):
    """Seconds and peak resident bytes of a run of `evaluate`."""
    command = [arguments.tool, "--reference", folder / "true", "--estimate", folder / "estimated", "--threads",
               str(arguments.threads), *options]
    begin, peak = time.perf_counter(), 0
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL) as process:
        # What the system reports in the end counts this process, too, as it was at the fork
        while process.poll() is None:
            peak = max(peak, peak_bytes(process.pid))
            time.sleep(0.01)
    assert process.returncode == 0, "evaluate failed"
    return time.perf_counter() - begin, peak


def peak_bytes(process="self"):
    """The greatest resident size of a process so far; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def run_museval(folder):
    """Seconds without the start of Python, peak resident bytes, and scores [metric, stem, frame]."""
    metrics = load_museval()
    begin = time.perf_counter()
    sounds = [np.stack([soundfile.read(folder / part / f"{stem}.wav", always_2d=True)[0] for stem in STEMS])
              for part in ("true", "estimated")]
    scores = np.array(metrics.bss_eval(*sounds, window=44100, hop=44100)[:4])
    seconds = time.perf_counter() - begin
    return seconds, peak_bytes(), scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--tool", "--reference", "--estimate"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(arguments.threads):  # before numpy starts its threads
        environment = os.environ | {f"{name}_NUM_THREADS": str(arguments.threads) for name in ("OMP", "OPENBLAS")}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)

    with tempfile.TemporaryDirectory() as temporary:
        folders = {seconds: Path(temporary) / str(seconds) for seconds in (arguments.seconds, 10 * arguments.seconds)}
        for seconds, folder in folders.items():
            write_excerpt(arguments.reference, folder / "true", seconds)
            write_excerpt(arguments.estimate, folder / "estimated", seconds)
        short, long = folders.values()
        ours, peak = run_tool(arguments, short, "--metrics", "bsseval", "--museval", temporary)
        _, long_peak = run_tool(arguments, long, "--metrics", "all")
        _, short_peak = run_tool(arguments, short, "--metrics", "all")
        found = json.loads((Path(temporary) / "true.json").read_text())
        theirs, their_peak, expected = run_museval(short)
    frames = np.array([[[frame["metrics"][name] for frame in target["frames"]] for target in found["targets"]]
                       for name in METRICS])
    row = {
        "seconds_of_music": arguments.seconds,
        "threads": arguments.threads,
        "evaluate_seconds": ours,
        "museval_seconds": theirs,
        "ratio": theirs / ours,
        "evaluate_peak_bytes": peak,
        "museval_peak_bytes": their_peak,
        "all_metrics_peak_bytes": short_peak,
        "all_metrics_peak_bytes_ten_times_as_long": long_peak,
        "largest_difference_of_frames_db": {name: float(np.nanmax(np.abs(a - b)))
                                            for name, a, b in zip(METRICS, frames, expected)},
        "largest_difference_of_medians_db": float(np.abs(np.nanmedian(frames, 2) - np.nanmedian(expected, 2)).max()),
    }
    for name, value in row.items():
        print(f"{name:42} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
