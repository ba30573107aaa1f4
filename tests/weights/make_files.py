"""Writes the weight files that tests/weights reads: what PyTorch makes of one state dict in each of its formats, and a
pickle-free copy of the same bytes to compare with.

Usage: make_files.py FOLDER, with a Python that has PyTorch. tests/weights/files was made by it.
"""

import argparse
import collections
import json
import struct
import sys
from pathlib import Path

import torch

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def raw(tensor):
    flat = tensor.detach().contiguous().reshape(-1)
    return b"" if flat.numel() == 0 else bytes(flat.view(torch.uint8).tolist())


def write_plain(name, tensors):
    """The safetensors format, from its definition."""
    header, data = {"__metadata__": {"made by": "make_files.py", "é \"\\\n": "\u00fc\U0001d11e"}}, b""
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        content = raw(tensor)
        header[key] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }  # fmt: skip
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def save(name, content, **options):
    torch.save(content, folder / name, **options)


# Each dtype, and every way in which a tensor can lie in a storage
base = torch.randn(4, 6)
storage = torch.arange(24, dtype=torch.float32)
state = collections.OrderedDict()
for dtype in NAMES:
    values = torch.randn(2, 3, dtype=torch.complex64) if dtype == torch.complex64 else torch.randn(2, 3) * 50
    state[f"dtype.{str(dtype)[6:]}"] = values > 0 if dtype == torch.bool else values.to(dtype)
state["odd.numbers"] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
state["shared.whole"] = base
state["shared.again"] = base
state["shared.transposed"] = base.t()
state["shared.column"] = base[:, 2]
state["shared.block"] = base[1:3, 1:5:2]
state["shared.expanded"] = base[0].expand(3, 6)
state["shared.diagonal"] = storage.as_strided((4,), (5,), 2)
state["scalar"] = torch.tensor(3.5)
state["empty"] = torch.empty(0, 3)
state["name with \u00e9 and \U0001d11e"] = torch.ones(1)
state["parameter"] = torch.nn.Parameter(torch.randn(3))
state._metadata = collections.OrderedDict([("", {"version": 1})])

write_plain("state", state)
save("state.pt", state)
save("legacy.pt", state, _use_new_zipfile_serialization=False)
for protocol in (3, 4, 5):
    save(f"protocol{protocol}.pt", state, pickle_protocol=protocol)

# Checkpoints, with what trainers put beside the weights
layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
optimizer = torch.optim.AdamW(layer.parameters())
layer(torch.randn(5, 3)).sum().backward()
optimizer.step()
write_plain("layer", layer.state_dict())
around = {
    "epoch": 3, "best": 0.25, "done": False, "big": 2**70, "negative": -(2**40), "bytes": b"\x00\xff", "tags": {"a"},
    "scale": torch.tensor(1.0), "args": argparse.Namespace(lr=1e-3, path=Path("x")),
    "optimizer": optimizer.state_dict(),
    "losses": [1.0, 0.5], "rng": torch.get_rng_state(), "size": torch.Size([1, 2]), "dtype": torch.float16,
    "device": torch.device("cpu"), "klass": torch.nn.Linear, "defaults": collections.defaultdict(list, a=[1]),
}  # fmt: skip
for key in ("state", "state_dict", "model", "model_state_dict", "ema"):
    save(f"under_{key}.ckpt", {**around, key: layer.state_dict()})
save("nested.ckpt", {"model": {"state_dict": layer.state_dict()}})
prefixed = {"module.model._orig_mod." + name: value for name, value in layer.state_dict().items()}
save("prefixed.ckpt", {"state_dict": prefixed})
save("half.pth", {name: value.half() if value.is_floating_point() else value for name, value in prefixed.items()})

# What is refused
save("whole_model.pt", layer)
save("list.pt", [torch.ones(1)])
save("no_tensors.pt", {"epoch": 1, "config": {"lr": 0.1}})
save("sparse.pt", {"weight": torch.eye(2).to_sparse()})


class Attack:
    def __reduce__(self):
        import os

        return os.system, ("touch attacked",)


save("attack.pt", {"state_dict": layer.state_dict(), "extra": Attack()})
