"""Writes what the RoFormers of three PyPI packages compute, for tests/models/roformers.cpp to compare with.

Run by hand, with einops, einx, torch-einops-utils, beartype, librosa and rotary-embedding-torch 0.6 beside PyTorch:
    pip download --no-deps bs-roformer-infer==0.1.5 audio-separator==0.47.1   (both unpacked into SOURCES)
    pip download --no-deps bs-roformer==1.2.4 hyper-connections==0.4.11 PoPE-pytorch==0.2.1   (into SOURCES/streams)
    roformer_reference.py SOURCES tests/models/roformers

A file is for one small model: its output, gradients and loss for one mixture in double precision ("output",
"grad.NAME", "loss"), each flat and followed by the RMS errors of the same in float for eight mixtures, of which it is
the first. Parameters and signals are not in the file: both sides make them of hashed counters.
"""

import sys
import types
from pathlib import Path
from unittest import mock

import torch
from hashed import fingerprint, noise, save, with_errors

sources, folder = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(sources / "streams"))
from bs_roformer import bs_roformer as streams_bs, mel_band_roformer as streams_mel  # noqa: E402

for name in [name for name in sys.modules if name.split(".")[0] == "bs_roformer"]:
    del sys.modules[name]  # another package has this name, too
sys.path[0] = str(sources)
for name in ("audio_separator", "audio_separator.separator"):  # without what their __init__ asks for
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(sources / name.replace(".", "/"))]
sys.modules["bs_roformer"] = types.ModuleType("bs_roformer")
sys.modules["bs_roformer"].__path__ = [str(sources / "bs_roformer")]

from audio_separator.separator.uvr_lib_v5.roformer import bs_roformer as separator_bs  # noqa: E402
from audio_separator.separator.uvr_lib_v5.roformer import mel_band_roformer as separator_mel  # noqa: E402
from bs_roformer import bs_roformer as infer_bs  # noqa: E402

MIXTURES = 8
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
    "bs_streams": (streams_bs.BSRoformer, 150, dict(  # 3 bands: 2 streams do not divide them
        dim=6, depth=2, dim_head=6, time_transformer_depth=2, freq_transformer_depth=1, freqs_per_bands=(2, 3, 4),
        stft_n_fft=16, stft_hop_length=6, stft_win_length=16, mask_estimator_depth=1, num_residual_streams=2,
        mc_hyper_conn_sinkhorn_iters=3, **TINY)),
    "bs_polar": (streams_bs.BSRoformer, 160, dict(
        dim=6, depth=2, dim_head=5, time_transformer_depth=1, freq_transformer_depth=1, freqs_per_bands=(3, 6),
        stereo=True, num_stems=2, stft_n_fft=16, stft_hop_length=4, stft_win_length=16, mask_estimator_depth=1,
        num_residual_streams=1, use_pope=True, zero_dc=True, **TINY)),
    "mel_streams": (streams_mel.MelBandRoformer, 205, dict(  # this package's hops are a quarter of the window or more
        dim=4, depth=2, dim_head=4, time_transformer_depth=1, freq_transformer_depth=1, linear_transformer_depth=1,
        num_bands=4, sample_rate=8000, stft_n_fft=32, stft_hop_length=8, stft_win_length=32, use_pope=True,
        attn_dropout=0.0, ff_dropout=0.0, **TINY | dict(multi_stft_hop_size=16))),
}


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
        elif x.dim() > 1:
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
    in_float = torch.Tensor.float if dtype == torch.float32 else torch.Tensor.double  # which hyper-connections asks for
    with mock.patch.object(torch.Tensor, "float", in_float):
        found = {"output": model(x).detach()}
        stored.clear()
        loss = model(x, target=y)
        loss.backward()
    found["loss"] = loss.detach()
    found |= {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: t.double() for name, t in found.items()}


torch.set_num_threads(1)
in_float = separator_mel._rotate_queries_or_keys  # has angles in float, whatever the model's precision
folder.mkdir(exist_ok=True)
rotate = lambda rotary, x: rotary.rotate_queries_or_keys(x)  # noqa: E731
for name, (kind, samples, options) in MODELS.items():

    def one(mixture, dtype):
        used = in_float if dtype == torch.float32 else rotate
        separator_mel._rotate_queries_or_keys = separator_bs._rotate_queries_or_keys = used
        return results(kind, options, samples, mixture, dtype)

    kept, errors = with_errors(one, MIXTURES)
    save(folder / f"{name}.safetensors", {key: torch.hstack([x.flatten(), errors[key]]) for key, x in kept.items()})
    print(name, len(kept) - 2, "gradients, output", list(kept["output"].shape), "errors",
          errors["output"].median().item(), errors["loss"].median().item())


torch.set_default_dtype(torch.float32)
ONE_BLOCK = dict(stereo=True, time_transformer_depth=1, freq_transformer_depth=1, flash_attn=False)
PUBLISHED = {
    "BS-RoFormer 512/12": (infer_bs.BSRoformer, dict(dim=512, depth=12, stft_hop_length=441)),
    "BS-RoFormer 384/12": (infer_bs.BSRoformer, dict(dim=384, depth=12)),
    "BS-RoFormer 384/8, 4 stems": (separator_bs.BSRoformer,
                                       dict(dim=384, depth=8, num_stems=4, mlp_expansion_factor=2)),
    "Mel-Band RoFormer 384/6": (separator_mel.MelBandRoformer, dict(dim=384, depth=6, mask_estimator_depth=2)),
    "small, linear attention": (separator_bs.BSRoformer, dict(dim=64, depth=2, linear_transformer_depth=1)),
    "BS-RoFormer 384/12, 4 streams": (streams_bs.BSRoformer, dict(dim=384, depth=12, use_pope=True)),
    "Mel-Band RoFormer 384/6, 4 streams": (streams_mel.MelBandRoformer, dict(dim=384, depth=6)),
    "BS-RoFormer 64/2, 1 stream": (streams_bs.BSRoformer, dict(dim=64, depth=2, num_residual_streams=1)),
}
for name, (kind, options) in PUBLISHED.items():
    print(name, *fingerprint(kind(**ONE_BLOCK, **options)))
