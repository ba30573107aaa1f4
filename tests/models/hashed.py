"""What the scripts of this folder share: signals and parameters that C++ makes as well, errors in float, files."""

import json
import struct

import numpy as np
import torch


def noise(shape, salt):
    """Numbers in [-1, 1), each a hash of its place and the salt, as tests/support/hashed_noise.hpp has them."""
    x = (np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(salt * 0x9E3779B9)).astype(np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x = x ^ (x >> np.uint32(16))
    return torch.from_numpy(x.astype(np.float64) / 2**31 - 1).reshape(shape)


def with_errors(results, mixtures):
    """What `results(mixture, dtype)` has in double for the first mixture, and the RMS errors of the same in float for
    each mixture."""
    errors = {}
    for mixture in range(mixtures):
        inexact, exact = results(mixture, torch.float32), results(mixture, torch.float64)
        kept = kept if mixture > 0 else exact
        for key, x in exact.items():
            errors.setdefault(key, []).append((inexact[key] - x).square().mean().sqrt())
    return kept, {key: torch.stack(e) for key, e in errors.items()}


def save(path, tensors):
    header, data = {}, b""
    for name, x in tensors.items():
        raw = x.contiguous().numpy().astype("<f8").tobytes()
        header[name] = {"dtype": "F64", "shape": list(x.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def fingerprint(model):
    """Number, elements and FNV-1a hash of the names and shapes of a state dict."""
    lines = [f"{name} {list(x.shape)}\n" for name, x in sorted(model.state_dict().items())]
    hashed = 0xCBF29CE484222325
    for byte in "".join(lines).encode():
        hashed = (hashed ^ byte) * 0x100000001B3 % 2**64
    return len(lines), sum(x.numel() for x in model.parameters()), f"0x{hashed:016x}"
