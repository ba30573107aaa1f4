#!/usr/bin/env python3
"""Draws peak memory against sequence length from the rows of `attention_memory --json`.

plot_attention_memory.py ROWS.json FIGURE.png
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(rows_file, figure_file):
    with open(rows_file) as file:
        report = json.load(file)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True)
    for panel, (name, title) in zip(panels, [("forward", "forward"), ("forward_backward", "forward and backward")]):
        for implementation, colour in [("naive", "tab:red"), ("tiled", "tab:blue")]:
            rows = [r for r in report["rows"] if r["pass"] == name and r["implementation"] == implementation]
            panel.plot([r["length"] for r in rows], [r["peak_bytes"] / 2**20 for r in rows], "o-", color=colour,
                       label={"naive": "naive: scores stored", "tiled": "headroom: tiled"}[implementation])
        panel.plot([r["length"] for r in rows], [r["floor_bytes"] / 2**20 for r in rows], "--", color="black",
                   linewidth=1, label="floor: inputs, outputs, gradients")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        lengths = sorted({r["length"] for r in report["rows"]})
        panel.set_xticks(lengths, [str(length) for length in lengths], rotation=45)
        panel.set_xlabel("sequence length")
        panel.set_title(title)
        panel.grid(True, which="major", alpha=0.3)
    panels[0].set_ylabel("peak memory, MiB")
    panels[0].legend(loc="lower right", fontsize="small")
    figure.suptitle(f"Attention, {report['heads']} heads of dim {report['head_dim']}, float")
    figure.tight_layout()
    figure.savefig(figure_file, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
