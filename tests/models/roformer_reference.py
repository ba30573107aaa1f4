"""Writes what the RoFormers of two PyPI packages compute, for tests/models/roformers.cpp to compare with.

Run by hand, with einops, beartype, librosa and rotary-embedding-torch 0.6 beside PyTorch:
    pip download --no-deps bs-roformer-infer==0.1.5 audio-separator==0.47.1   (both unpacked into SOURCES)
    roformer_reference.py SOURCES tests/models/roformers

A file is for one small model: its output, loss and gradients in double precision ("output", "loss", "grad.NAME"), each
flat with one number more, the RMS error of the same in float: that of several mixtures, since the error of one number is
a matter of luck. Parameters and signals are not in the file: both sides make them of hashed counters.
"""

import json
import struct
import sys
import types
from pathlib import Path

import numpy as np
import torch

sources, folder = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(sources))
for name in ("audio_separator", "audio_separator.separator"):  # without what their __init__ asks for
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(sources / name.replace(".", "/"))]
sys.modules["bs_roformer"] = types.ModuleType("bs_roformer")
sys.modules["bs_roformer"].__path__ = [str(sources / "bs_roformer")]

from audio_separator.separator.uvr_lib_v5.roformer import bs_roformer as separator_bs  # noqa: E402
from audio_separator.separator.uvr_lib_v5.roformer import mel_band_roformer as separator_mel  # noqa: E402
from bs_roformer import bs_roformer as infer_bs  # noqa: E402

MIXTURES = 8  # over which errors of floats are averaged
TINY = dict(heads=2, multi_stft_resolutions_window_sizes=(64, 32, 16), multi_stft_hop_size=7, flash_attn=False)
MODELS = {
    "bs_mono": (infer_bs.BSRoformer, 203, dict(
        dim=6, depth=1, dim_head=6, time_transformer_depth=1, freq_transformer_depth=1, freqs_per_bands=(2, 3, 5, 7),
        stft_n_fft=32, stft_hop_length=8, stft_win_length=24, zero_dc=True, **TINY)),
    "bs_linear": (separator_bs.BSRoformer, 150, dict(
        dim=6, depth=1, dim_head=6, time_transformer_depth=2, freq_transformer_depth=1, linear_transformer_depth=1,
        freqs_per_bands=(2, 3, 4), stereo=True, num_stems=4, stft_n_fft=16, stft_hop_length=6, stft_win_length=16,
        mask_estimator_depth=3, mlp_expansion_factor=1, **TINY)),
    "bs_skip": (separator_bs.BSRoformer, 160, dict(
        dim=8, depth=3, dim_head=4, time_transformer_depth=1, freq_transformer_depth=1, freqs_per_bands=(3, 6),
        stft_n_fft=16, stft_hop_length=4, stft_win_length=16, mask_estimator_depth=1, skip_connection=True, **TINY)),
    "mel_stereo": (separator_mel.MelBandRoformer, 205, dict(
        dim=4, depth=1, dim_head=8, time_transformer_depth=1, freq_transformer_depth=1, num_bands=4, sample_rate=8000,
        stereo=True, stft_n_fft=32, stft_hop_length=8, stft_win_length=32, attn_dropout=0.0, ff_dropout=0.0, **TINY)),
    "mel_stems": (separator_mel.MelBandRoformer, 211, dict(
        dim=4, depth=1, dim_head=4, time_transformer_depth=1, freq_transformer_depth=2, num_bands=4, sample_rate=8000,
        num_stems=2, stft_n_fft=32, stft_hop_length=10, stft_win_length=32, mask_estimator_depth=2,
        match_input_audio_length=True, attn_dropout=0.0, ff_dropout=0.0, **TINY)),
}


def noise(shape, salt):
    """Numbers in [-1, 1), each a hash of its place and the salt."""
    x = (np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(salt * 0x9E3779B9)).astype(np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x = x ^ (x >> np.uint32(16))
    return torch.from_numpy(x.astype(np.float64) / 2**31 - 1).reshape(shape)


def set_parameters(model):
    for salt, (name, x) in enumerate(sorted(model.named_parameters()), 1):
        if name.endswith("freqs"):
            continue
        u = noise(x.shape, salt)
        if name.endswith("gamma"):
            u = 1 + 0.25 * u
        elif name.endswith("bias"):
            u = 0.1 * u
        elif name.endswith("temperature"):
            u = 0.5 * u
        else:
            u = u * (3 / x.shape[1]) ** 0.5
        x.data.copy_(u.float())


def signals(options, samples, mixture):
    """A mixture [2,C,S] with silence in it, and targets as the model takes them."""
    channels, stems = 1 + options.get("stereo", False), options.get("num_stems", 1)
    x = 0.5 * noise((2, channels, samples), 1000 + mixture).float()
    x[0, -1, samples // 3 : samples // 2] = 0
    x[1, :, : samples // 2] = 0
    y = 0.5 * noise((2, stems, channels, samples), 2000 + mixture).float()
    return x, y if stems > 1 else y[:, 0]


def connect_skips(model):
    """What Music-Source-Separation-Training does for skip_connection; the packages take the option and leave it out."""
    outputs = []

    def before(_, inputs):  # (b k) t d
        x = inputs[0]
        for y in outputs:  # (b t) k d
            y = y.unflatten(0, (-1, x.shape[1])).transpose(1, 2)
            x = x + y.reshape(x.shape)
        return (x,)

    for layer in model.layers:
        layer[0].register_forward_pre_hook(before)
        layer[-1].register_forward_hook(lambda _, __, y: outputs.append(y))
    return outputs


def results(kind, options, samples, mixture, dtype):
    torch.set_default_dtype(torch.float32)
    model = kind(**options).train()
    set_parameters(model)
    model.to(dtype)
    torch.set_default_dtype(dtype)  # of windows
    stored = connect_skips(model) if options.get("skip_connection") else []
    x, y = (t.to(dtype) for t in signals(options, samples, mixture))
    found = {"output": model(x).detach()}
    stored.clear()
    loss = model(x, target=y)
    loss.backward()
    found["loss"] = loss.detach()
    found |= {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: t.double() for name, t in found.items()}


def save(path, tensors):
    header, data = {}, b""
    for name, x in tensors.items():
        raw = x.contiguous().numpy().astype("<f8").tobytes()
        header[name] = {"dtype": "F64", "shape": list(x.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


torch.set_num_threads(1)
in_float = separator_mel._rotate_queries_or_keys  # has angles in float, whatever the model's precision
folder.mkdir(exist_ok=True)
for name, (kind, samples, options) in MODELS.items():
    squares = {}
    for mixture in range(MIXTURES):
        separator_mel._rotate_queries_or_keys = separator_bs._rotate_queries_or_keys = in_float
        inexact = results(kind, options, samples, mixture, torch.float32)
        rotate = lambda rotary, x: rotary.rotate_queries_or_keys(x)  # noqa: E731
        separator_mel._rotate_queries_or_keys = separator_bs._rotate_queries_or_keys = rotate
        exact = results(kind, options, samples, mixture, torch.float64)
        if mixture == 0:
            kept = exact
        for key, x in exact.items():
            squares.setdefault(key, []).append((inexact[key] - x).square().mean())
    errors = {key: torch.stack(s).mean().sqrt() for key, s in squares.items()}
    save(folder / f"{name}.safetensors", {key: torch.hstack([x.flatten(), errors[key]]) for key, x in kept.items()})
    print(name, len(kept) - 2, "gradients, output", list(kept["output"].shape), "loss", kept["loss"].item(), "error",
          errors["output"].item(), errors["loss"].item())
