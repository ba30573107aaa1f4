#!/usr/bin/env python3
"""Draws memory of activations against time for every checkpoint policy from the rows of `recompute --json`, relative to
a step that recomputes nothing; beside it the planned peaks of the guide's configurations.

plot_recompute.py ROWS.json FIGURE.png
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONFIGURATIONS = ["small", "ultra_safe", "memory_optimized", "memory_optimized_first", "xlarge"]
BARS = ["none", "selective", "full", "nested", "tiled", "full+offload", "tiled+nested", "tiled+offload"]

# Labels to the left of their points, so that they are not on top of others
LABELS_BEFORE = ["full+bf16", "full+offload", "selective+offload", "nested", "tiled+nested", "full", "selective"]


def main(rows_file, figure_file):
    with open(rows_file) as file:
        report = json.load(file)
    measured = [row for row in report["rows"] if row["seconds"] is not None and "activation_bytes" in row]
    none = next(row for row in measured if row["policy"] == "none")
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4))
    for row in measured:
        x = row["seconds"] / none["seconds"]
        y = 100 * row["activation_bytes"] / none["activation_bytes"]
        colour = "tab:red" if row["policy"] == "none" else "tab:green" if row["policy"] == "reversible" else "tab:blue"
        left.plot(x, y, "o", color=colour)
        before = row["policy"] in LABELS_BEFORE
        left.annotate(row["policy"], (x, y), textcoords="offset points", xytext=(-6 if before else 6, -3), fontsize=8,
                      ha="right" if before else "left")
    left.set_xlabel("time, relative to none")
    left.set_ylabel("memory of activations, % of none")
    left.set_yscale("log")
    left.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
    left.margins(x=0.15)
    left.set_title(none["configuration"] + ": forward and backward")
    left.grid(alpha=0.3)

    planned = {(row["configuration"], row["policy"]): row["planned_bytes"] for row in report["rows"]}
    width = 0.8 / len(BARS)
    for i, policy in enumerate(BARS):
        right.bar([j + (i - len(BARS) / 2 + 0.5) * width for j in range(len(CONFIGURATIONS))],
                  [planned[name, policy] / 2**30 for name in CONFIGURATIONS], width, label=policy,
                  color=plt.get_cmap("viridis")(i / (len(BARS) - 1)))
    for limit in [8, 16, 24]:
        right.axhline(limit, color="black", linewidth=0.6, linestyle="--")
        right.annotate(f"{limit} GiB", (-0.48, limit), fontsize=7, va="bottom")
    right.set_yscale("log")
    right.set_xticks(range(len(CONFIGURATIONS)), [name.replace("_", "\n") for name in CONFIGURATIONS], fontsize=8)
    right.set_ylabel("planned peak of a training step, GiB")
    right.set_title("the guide's configurations, batch 1")
    right.legend(fontsize=7, ncols=2, loc="upper left")
    figure.suptitle(f"Checkpoint policies ({report['processor']}, {report['threads']} threads)")
    figure.tight_layout()
    figure.savefig(figure_file, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
