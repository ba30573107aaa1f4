#!/usr/bin/env python3
"""Draws memory and operations of a training step against segment length, from `plan --sweep segment_length=… --json`.

plot_sweep.py ROWS.json FIGURE.png
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(rows_file, figure_file, rate=44100):
    with open(rows_file) as file:
        sweep = json.load(file)
    rows = sweep["rows"]
    names = list(dict.fromkeys(row["configuration"] for row in rows))
    figure, (memory, operations) = plt.subplots(1, 2, figsize=(11, 5.4))
    for index, name in enumerate(names):
        colour = f"C{index}"
        for stored, style in [(True, "--"), (False, "-")]:
            curve = [r for r in rows if r["configuration"] == name and (r["attention"] == "reference") == stored]
            seconds = [r["value"] / rate for r in curve]
            memory.plot(seconds, [r["peak_bytes"] / 2**30 for r in curve], style, marker="o", markersize=4,
                        color=colour)
        label = name.removeprefix("musdb18_")
        operations.plot(seconds, [r["flops"] / 1e12 for r in curve], marker="o", markersize=4, color=colour,
                        label=label)
    memory.axhline(sweep["budget_bytes"] / 2**30, color="black", linewidth=1)
    memory.annotate(f"{sweep['device']}: {sweep['budget_bytes'] / 2**30:.0f} GiB for tensors",
                    (1, sweep["budget_bytes"] / 2**30), xycoords=("axes fraction", "data"), xytext=(-4, -12),
                    textcoords="offset points", ha="right", fontsize="small")
    memory.plot([], [], "--", color="gray", label="scores stored")
    memory.plot([], [], "-", color="gray", label="none stored")
    for panel, title in [(memory, "peak memory, GiB"), (operations, "operations of a step, TFLOP")]:
        panel.set_yscale("log")
        panel.set_xlabel("segment, seconds")
        panel.set_title(title)
        panel.grid(True, which="major", alpha=0.3)
        panel.legend(fontsize="small")
    figure.suptitle("The guide's configurations, planned")
    figure.tight_layout()
    figure.savefig(figure_file, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
