"""Writes what HTDemucs of the PyPI package demucs-infer computes, for tests/models/htdemucs.cpp to compare with.

Run by hand, with einops, julius, numpy, PyYAML and tqdm beside PyTorch:
    pip download --no-deps demucs-infer==4.4.0   (unpacked into SOURCES)
    htdemucs_reference.py SOURCES tests/models/htdemucs

Files are as roformer_reference.py describes them: parameters and signals are hashed counters on both sides.
"""

import sys
from fractions import Fraction
from pathlib import Path

import torch

sources, folder = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(sources))
from demucs_infer.htdemucs import HTDemucs  # noqa: E402
from hashed import fingerprint, noise, save, with_errors  # noqa: E402

MIXTURES = 8
MODELS = {
    "stereo": (203, dict(
        sources=["a", "b"], channels=4, nfft=64, depth=2, kernel_size=4, stride=2, dconv_mode=3, dconv_comp=2,
        dconv_init=0.1, norm_starts=1, norm_groups=2, bottom_channels=4, t_layers=2, t_heads=2, t_hidden_scale=2.0,
        use_train_segment=False)),
    "mono": (301, dict(
        sources=["a", "b", "c"], audio_channels=1, channels=4, growth=1, nfft=256, depth=2, context=0, context_enc=1,
        dconv_comp=4, dconv_depth=1, emb_smooth=False, t_layers=2, t_heads=1, t_hidden_scale=1.0, t_cross_first=True,
        t_norm_in=False, t_norm_in_group=True, t_group_norm=True, t_gelu=False, t_weight_pos_embed=0.5,
        samplerate=1000, segment=Fraction(1, 2))),
    "plain": (34, dict(
        sources=["a"], channels=4, nfft=64, depth=1, kernel_size=4, stride=2, rewrite=False, freq_emb=0.0,
        dconv_mode=0, t_layers=2, t_heads=2, t_hidden_scale=1.0, t_norm_first=False, t_layer_scale=False,
        t_max_period=100.0, use_train_segment=False)),
}


def set_parameters(model):
    for salt, (name, x) in enumerate(sorted(model.named_parameters()), 1):
        u = noise(x.shape, salt)
        if name.endswith("bias"):
            u = 0.1 * u
        elif x.dim() == 1:
            u = 1 + 0.25 * u
        else:
            u = u * (3 / x[0].numel()) ** 0.5
        x.data.copy_(u.float())


def signals(options, samples, mixture):
    """A mixture [2,C,S] with silence in it, and targets [2,N,C,S]."""
    channels = options.get("audio_channels", 2)
    x = 0.5 * noise((2, channels, samples), 1000 + mixture).float()
    x[0, -1, samples // 3 : samples // 2] = 0
    x[1, :, : samples // 2] = 0
    return x, 0.5 * noise((2, len(options["sources"]), channels, samples), 2000 + mixture).float()


def results(options, samples, mixture, dtype):
    torch.set_default_dtype(torch.float32)
    model = HTDemucs(**options).train()
    set_parameters(model)
    model.to(dtype)
    torch.set_default_dtype(dtype)  # of windows and positions
    x, y = (t.to(dtype) for t in signals(options, samples, mixture))
    found = {"evaluated": model.eval()(x).detach()} if options.get("use_train_segment", True) else {}
    found["output"] = model.train()(x)
    found["loss"] = (found["output"] - y).abs().mean()
    found["loss"].backward()
    found |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return {name: t.detach().double() for name, t in found.items() if t is not None}  # some parameters are never used


torch.set_num_threads(1)
folder.mkdir(exist_ok=True)
for name, (samples, options) in MODELS.items():
    kept, errors = with_errors(lambda mixture, dtype: results(options, samples, mixture, dtype), MIXTURES)
    save(folder / f"{name}.safetensors", {key: torch.hstack([x.flatten(), errors[key]]) for key, x in kept.items()})
    print(name, len(kept) - 2, "tensors, output", list(kept["output"].shape), "errors",
          errors["output"].median().item(), errors["loss"].median().item())

torch.set_default_dtype(torch.float32)
PUBLISHED = dict(bottom_channels=512, dconv_mode=3)
for stems in (4, 6):
    print(stems, "stems", *fingerprint(HTDemucs(sources=list("abcdef")[:stems], **PUBLISHED)))
