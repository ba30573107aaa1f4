"""Writes small checkpoints of demucs and a bag of them for tests/tools/tools.py and tests/training/models.cpp, and the
stems that demucs makes with them of `mixture`.

Run by hand, with what tests/models/htdemucs_reference.py asks for:
    demucs_reference.py SOURCES tests/tools/demucs
"""

import hashlib
import sys
from fractions import Fraction
from pathlib import Path

import published_reference

SAMPLES = 1700
SHIFTS = [20442, 3607]  # samples of silence in front that `separate --shifts 2` draws
BAG = """models: ['tiny', 'other', 'third']
weights: [
  [1., 0.],
  [0.5, 3.],
  [2., 1.],
]
segment: 44
"""


def mixture():
    """[2][SAMPLES] 16-bit samples. Their mean is far from 0: what a model gets of silence behind the end shows."""
    return [[s + 9000 for s in channel[:SAMPLES]] for channel in published_reference.mixture()]


def save(model, path):
    """As demucs' trainer saves a model: what makes it in Python, weights in half precision, settings of the
    training."""
    import torch

    args, kwargs = model._init_args_kwargs
    state = {name: x.half() for name, x in model.state_dict().items()}
    settings = {"optim": {"lr": 3e-4, "epochs": 360}, "dset": {"samplerate": 44100}}
    torch.save({"klass": model.__class__, "args": args, "kwargs": kwargs, "state": state, "training_args": settings},
               path)


def save_small(path, seed, **options):
    import torch
    from demucs_infer.htdemucs import HTDemucs

    torch.manual_seed(seed)
    save(HTDemucs(
        sources=["drums", "vocals"], audio_channels=2, samplerate=44100, segment=Fraction(1, 50), channels=4,
        nfft=64, depth=1, kernel_size=4, stride=2, dconv_mode=3, dconv_comp=2, dconv_init=1e-3, multi_freqs=[],
        multi_freqs_depth=2, t_heads=2, t_hidden_scale=2.0, t_dropout=0.02, t_weight_decay=0.05, t_lr=None,
        t_cape_glob_loc_scale=[5000.0, 1.0, 1.4], t_mask_type="diag", **options), path)  # fmt: skip


def main(sources, folder):
    sys.path.insert(0, str(sources))
    import torch
    from demucs_infer import apply
    from demucs_infer.apply import apply_model
    from demucs_infer.pretrained import get_model

    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    save_small(folder / "tiny.th", 1, t_layers=2)
    save_small(folder / "third.th", 3, t_layers=2)  # of the configuration of the first
    if not list(folder.glob("other-*.th")):  # an archive has the time of its making in it
        save_small(folder / "other.th", 2, t_layers=1)
        checksum = hashlib.sha256((folder / "other.th").read_bytes()).hexdigest()[:8]
        (folder / "other.th").rename(folder / f"other-{checksum}.th")
    (folder / "bag.yaml").write_text(BAG)
    x = torch.tensor(mixture(), dtype=torch.float32) / 32768
    reference = x.mean(0)  # as demucs' programs do around apply_model
    mean, deviation = reference.mean(), reference.std() + 1e-8
    for name, file, shifts in [("tiny", "tiny.f32", 0), ("bag", "bag.f32", 0), ("tiny", "shifts.f32", len(SHIFTS))]:
        apply.random.randint = lambda least, most, left=[*SHIFTS]: most - left.pop(0)
        stems = apply_model(get_model(name, repo=folder), (x - mean)[None] / deviation, shifts=shifts, overlap=0.25)[0]
        stems = stems * deviation + mean
        (folder / file).write_bytes(stems.numpy().astype("<f4").tobytes())
        print(file, list(stems.shape), [x.std().item(), *(s.std().item() for s in stems)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
