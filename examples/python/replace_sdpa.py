"""A stock PyTorch model, trained a step with and without headroom below it, and what each step allocated.

    PYTHONPATH=build/release/python python examples/python/replace_sdpa.py
"""

import headroom
import torch

LENGTH, WIDTH, HEADS = 2049, 32, 2
layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.1, batch_first=True)
sound = torch.randn(1, LENGTH, WIDTH)


def step():
    layer(sound).square().mean().backward()


plain = headroom.measure(step)
with headroom.replace_sdpa():
    replaced = headroom.measure(step)

MIB = 2**20
print(f"one layer of {HEADS} heads, {LENGTH} frames, with dropout: scores of {HEADS * LENGTH**2 * 4 / MIB:.1f} MiB")
print(f"largest block: PyTorch {plain.largest / MIB:.1f} MiB, headroom {replaced.largest / MIB:.2f} MiB")
print(f"added at the peak: PyTorch {plain.added_peak / MIB:.1f} MiB, headroom {replaced.added_peak / MIB:.1f} MiB")
