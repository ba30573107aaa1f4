"""Writes a small checkpoint of demucs for tests/tools/tools.py and tests/training/models.cpp, and the stems that demucs
makes with it of `mixture`.

Run by hand, with what tests/models/htdemucs_reference.py asks for:
    demucs_reference.py SOURCES tests/tools/demucs
"""

import sys
from fractions import Fraction
from pathlib import Path

import published_reference

SAMPLES = 1700


def mixture():
    """[2][SAMPLES] 16-bit samples, whose mean is 0: then silence behind the end is 0 before and after a change of level."""
    halves = [channel[: SAMPLES // 2] for channel in published_reference.mixture()]
    return [half + [-s for s in half] for half in halves]


def save(model, path):
    """As demucs' trainer saves a model: what makes it in Python, weights in half precision, settings of the training."""
    import torch

    args, kwargs = model._init_args_kwargs
    state = {name: x.half() for name, x in model.state_dict().items()}
    settings = {"optim": {"lr": 3e-4, "epochs": 360}, "dset": {"samplerate": 44100}}
    torch.save({"klass": model.__class__, "args": args, "kwargs": kwargs, "state": state, "training_args": settings}, path)
    model.load_state_dict({name: x.float() for name, x in state.items()})


def main(sources, folder):
    sys.path.insert(0, str(sources))
    import torch
    from demucs_infer.apply import apply_model
    from demucs_infer.htdemucs import HTDemucs

    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = HTDemucs(
        sources=["drums", "vocals"], audio_channels=2, samplerate=44100, segment=Fraction(1, 50), channels=4,
        nfft=64, depth=1, kernel_size=4, stride=2, dconv_mode=3, dconv_comp=2, dconv_init=1e-3, multi_freqs=[],
        multi_freqs_depth=2, t_layers=2, t_heads=2, t_hidden_scale=2.0, t_dropout=0.02, t_weight_decay=0.05, t_lr=None,
        t_cape_glob_loc_scale=[5000.0, 1.0, 1.4], t_mask_type="diag")  # fmt: skip
    save(model, folder / "tiny.th")
    x = torch.tensor(mixture(), dtype=torch.float32) / 32768
    reference = x.mean(0)  # as demucs' programs do around apply_model
    normalized = (x - reference.mean()) / reference.std(correction=0)
    stems = apply_model(model, normalized[None], shifts=0, overlap=0.25)[0] * reference.std(correction=0) + reference.mean()
    (folder / "tiny.f32").write_bytes(stems.numpy().astype("<f4").tobytes())
    print(list(stems.shape), "of", model.segment, "s", (folder / "tiny.th").stat().st_size, "bytes of weights",
          [x.std().item(), *(s.std().item() for s in stems)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
