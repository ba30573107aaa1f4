"""TensorBoard's event files of a run, from its metrics.jsonl.

    pip install tensorboard
    python3 scripts/metrics_to_tensorboard.py experiments/small events/small
    tensorboard --logdir events

The folder of the events is made anew: convert again to bring it up to date.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path


def scalars(line):
    """Names and values of a line of metrics.jsonl."""
    if line["kind"] == "step":
        for name in ["loss", "learning_rate", "gradient_norm", "seconds", "data_seconds", "live_bytes", "peak_bytes"]:
            yield f"train/{name}", line[name]
        yield "train/examples_per_second", line["examples"] / line["seconds"] if line["seconds"] else None
        for phase, use in line["phases"].items():
            yield f"phases/{phase}/seconds", use["seconds"]
            yield f"phases/{phase}/peak_bytes", use["peak_bytes"]
    if line["kind"] == "validation":
        for metric, of_stems in line["scores"].items():
            for stem, score in of_stems.items():
                yield f"validation/{metric}/{stem}", score


def lines_of(path):
    with open(path) as file:
        for number, text in enumerate(file, 1):
            try:
                yield json.loads(text)
            except json.JSONDecodeError:
                if text.endswith("\n"):
                    sys.exit(f"{path}: line {number} is no JSON; expected a file that train wrote")
                return  # a run that goes on is writing it


def convert(metrics, out):
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        sys.exit(f"the package tensorboard is not installed ({error}); pip install tensorboard")
    if out.exists():
        if any(not path.name.startswith("events.out.tfevents") for path in out.iterdir()):
            sys.exit(f"{out} holds something else than events; give another folder")
        shutil.rmtree(out)
    writer = EventFileWriter(str(out))
    count = 0
    for line in lines_of(metrics):
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(line) if value is not None]
        writer.add_event(Event(wall_time=line["time"], step=line["step"], summary=Summary(value=values)))
        count += len(values)
    writer.close()
    print(f"{count} values: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Converts metrics.jsonl of a run into TensorBoard's event files.")
    parser.add_argument("run", type=Path, help="folder of a run, or its metrics.jsonl")
    parser.add_argument("out", type=Path, help="folder for the event files; events in it are replaced")
    arguments = parser.parse_args()
    metrics = arguments.run / "metrics.jsonl" if arguments.run.is_dir() else arguments.run
    if not metrics.is_file():
        sys.exit(f"there is no {metrics}; give the folder of a run")
    convert(metrics, arguments.out)
