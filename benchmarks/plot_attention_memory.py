#!/usr/bin/env python3
"""Draws peak memory against sequence length from the rows of `attention_memory --options-at 0 --json`.

plot_attention_memory.py ROWS.json FIGURE.png
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CURVES = [  # implementation, variant, label, colour
    ("torch", "dropout", "PyTorch with dropout: stored in silence", "tab:orange"),
    ("naive", "plain", "matmul, softmax, matmul: stored", "tab:red"),
    ("torch", "plain", "PyTorch, fused", "tab:green"),
    ("tiled", "plain", "headroom", "tab:blue"),
]


def main(rows_file, figure_file):
    with open(rows_file) as file:
        rows = json.load(file)["rows"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 5.2), sharey=True)
    for panel, (name, title) in zip(panels, [("forward", "forward"), ("forward_backward", "forward and backward")]):
        for implementation, variant, label, colour in CURVES:
            curve = [r for r in rows
                     if (r["pass"], r["implementation"], r["variant"]) == (name, implementation, variant)]
            panel.plot([r["length"] for r in curve], [r["peak_bytes"] / 2**20 for r in curve], "o-", color=colour,
                       markersize=4, label=label)
        panel.plot([r["length"] for r in curve], [r["floor_bytes"] / 2**20 for r in curve], "--", color="black",
                   linewidth=1, label="floor: inputs, outputs, gradients")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        lengths = sorted({r["length"] for r in rows})
        panel.set_xticks(lengths, [str(length) for length in lengths], rotation=45)
        panel.set_xlabel("sequence length")
        panel.set_title(title)
        panel.grid(True, which="major", alpha=0.3)
    panels[0].set_ylabel("peak memory, MiB")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize="small")
    batch, heads, dim = (rows[0][key] for key in ["batch", "heads", "head_dim"])
    figure.suptitle(f"Attention, batch {batch}, {heads} heads of dim {dim}, float")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(figure_file, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
