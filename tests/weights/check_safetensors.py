"""Compares a safetensors file with what torch.save wrote, by the published package, and writes one with the package.

Usage: check_safetensors.py STATE.pt OURS.safetensors THEIRS.safetensors; exit code 77 without the package.
"""

import sys

import torch

try:
    import safetensors
    import safetensors.torch
except ImportError:
    sys.exit(77)

state, ours, theirs = sys.argv[1:]
expected = {name: value.detach().clone().contiguous() for name, value in torch.load(state).items()}
found = safetensors.torch.load_file(ours)
assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
for name, value in expected.items():
    assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
    assert torch.equal(found[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name
with safetensors.safe_open(ours, "pt") as file:
    assert file.metadata() == {"format": "pt"}, file.metadata()
safetensors.torch.save_file(expected, theirs, {"format": "pt"})
