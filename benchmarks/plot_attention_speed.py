#!/usr/bin/env python3
"""Draws speed against head dim from the rows of `attention_speed --json`: GF/s of every implementation on one shape,
and headroom's ratio to PyTorch on all shapes; one column for each pass and dtype.

plot_attention_speed.py ROWS.json FIGURE.png [BxHxL of the upper row, 1x4x2049 unless given]
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = [(what, dtype) for dtype in ("float", "bfloat16") for what in ("forward", "forward_backward")]
IMPLEMENTATIONS = [("naive", "matmul, softmax, matmul", "tab:red"), ("torch", "PyTorch, fused", "tab:green"),
                   ("chunked", "headroom, chunked", "tab:cyan"), ("tiled", "headroom, tiled", "tab:blue")]


def shape_of(row):
    return f"{row['batch']}x{row['heads']}x{row['length']}"


def draw(panel, rows, key, **style):
    rows = sorted(rows, key=lambda row: row["head_dim"])
    panel.plot([row["head_dim"] for row in rows], [row[key] for row in rows], "o-", markersize=4, **style)


def main(rows_file, figure_file, shape="1x4x2049"):
    with open(rows_file) as file:
        report = json.load(file)
    machine = report["machine"]
    plain = [row for row in report["rows"] if row["variant"] == "plain"]
    if not any(shape_of(row) == shape for row in plain):
        sys.exit(f"{rows_file} has no plain rows of shape {shape}; there are {sorted({shape_of(r) for r in plain})}")
    columns = [column for column in COLUMNS if any((r["pass"], r["dtype"]) == column for r in plain)]
    dims = sorted({row["head_dim"] for row in plain})
    figure, panels = plt.subplots(2, len(columns), figsize=(3.6 * len(columns) + 0.6, 7), sharex=True, sharey="row",
                                  squeeze=False)
    for (name, dtype), (speed, ratio) in zip(columns, panels.T):
        rows = [row for row in plain if (row["pass"], row["dtype"]) == (name, dtype)]
        for implementation, label, colour in IMPLEMENTATIONS:
            draw(speed, [r for r in rows if r["implementation"] == implementation and shape_of(r) == shape], "gflops",
                 color=colour, label=label)
        speed.axhline(machine["fma_peak_gflops"], color="black", linewidth=1, linestyle="--", label="FMA limit, float")
        speed.set_title(f"{name.replace('_', ' + ')}, {dtype}", fontsize="medium")
        for other in dict.fromkeys(shape_of(row) for row in rows):
            draw(ratio, [r for r in rows if r["implementation"] == "tiled" and shape_of(r) == other], "ratio_to_torch",
                 label=other)
        ratio.axhline(1, color="tab:green", linewidth=1, linestyle="--")
        ratio.set_xlabel("head dim")
        ratio.set_xscale("log", base=2)
        ratio.set_xticks(dims, [str(dim) for dim in dims])
        ratio.minorticks_off()
        for panel in (speed, ratio):
            panel.grid(True, alpha=0.3)
    for row in panels:
        row[0].set_ylim(bottom=0)  # once all curves are there: a limit ends the fitting of the axis
    panels[0, 0].set_ylabel(f"GF/s, B x H x L = {shape}")
    panels[1, 0].set_ylabel("times PyTorch's speed")
    panels[0, 0].legend(fontsize="x-small")
    panels[1, 0].legend(title="B x H x L", fontsize="x-small", title_fontsize="x-small")
    figure.suptitle(f"Attention, {machine['threads']} threads" + (f", {machine['cpu']}" if "cpu" in machine else ""))
    figure.tight_layout()
    figure.savefig(figure_file, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
