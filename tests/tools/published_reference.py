"""Writes small published models for tests/tools/tools.py: the YAML file, the weights as PyTorch saves them, and the
stems that the Python package makes of `mixture`.

Run by hand, with the packages that tests/models/roformer_reference.py asks for, and PyYAML:
    published_reference.py SOURCES tests/tools/published
"""

import sys
import types
from pathlib import Path

TUPLE = "tag:yaml.org,2002:python/tuple"
SAMPLES = 2048


def mixture():
    """[2][SAMPLES] 16-bit samples."""
    state, channels = 1, []
    for _ in range(2):
        samples = []
        for _ in range(SAMPLES):
            state = (state * 1103515245 + 12345) % 2**31
            samples.append((state >> 8) % 20000 - 10000)
        channels.append(samples)
    return channels


def text(model, training):
    """A file as they are published, with small numbers."""
    return f"""audio:
  chunk_size: {SAMPLES}
  dim_f: 1024
  dim_t: 801 # don't work
  hop_length: 16
  n_fft: 64
  num_channels: 2
  sample_rate: 44100
  min_mean_abs: 0.000

model:
  dim: 8
  depth: 1
  stereo: true
{model}  time_transformer_depth: 1
  freq_transformer_depth: 1
  dim_head: 8
  heads: 2
  attn_dropout: 0.1
  ff_dropout: 0.1
  flash_attn: false
  dim_freqs_in: 33
  stft_n_fft: 64
  stft_hop_length: 16
  stft_win_length: 64
  stft_normalized: False
  mask_estimator_depth: 2
  multi_stft_resolution_loss_weight: 1.0
  multi_stft_resolutions_window_sizes: !!python/tuple
  - 256
  - 64
  multi_stft_hop_size: 37
  multi_stft_normalized: False

training:
  batch_size: 1
  gradient_accumulation_steps: 1
  grad_clip: 0
{training}  lr: 1.0e-03
  patience: 2
  reduce_factor: 0.95
  num_epochs: 1
  num_steps: 2
  q: 0.95
  coarse_loss_clip: true
  ema_momentum: 0.999
  optimizer: adam
  other_fix: false
  use_amp: false # float is what is compared

inference:
  batch_size: 1
  dim_t: 801
  num_overlap: 1 # one segment is what is compared
"""


BANDS = "  freqs_per_bands: !!python/tuple\n" + "".join(f"    - {bins}\n" for bins in (2, 2, 4, 8, 17))
FOUR = "  instruments:\n  - vocals\n  - drums\n  - bass\n  - other\n"
FILES = {
    "bs": text("  num_stems: 1\n  linear_transformer_depth: 0\n" + BANDS, FOUR + "  target_instrument: vocals\n"),
    "mel": text("  num_stems: 2\n  num_bands: 4\n  sample_rate: 44100 # of the mel filters\n",
                "  instruments: ['vocals', 'other']\n  target_instrument: null\n"),
}


def main(sources, folder):
    sys.path.insert(0, str(sources))
    for name in ("audio_separator", "audio_separator.separator", "bs_roformer"):  # without what their __init__ asks for
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(sources / name.replace(".", "/"))]
    import torch
    import yaml
    from audio_separator.separator.uvr_lib_v5.roformer.mel_band_roformer import MelBandRoformer
    from bs_roformer.bs_roformer import BSRoformer

    yaml.FullLoader.add_constructor(TUPLE, lambda loader, node: tuple(loader.construct_sequence(node)))
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    x = torch.tensor(mixture(), dtype=torch.float32)[None] / 32768
    for name, published in FILES.items():
        (folder / f"{name}.yaml").write_text(published)
        options = yaml.load(published, Loader=yaml.FullLoader)["model"]
        options.pop("linear_transformer_depth", None)  # 0, and the package does not know it
        if name == "bs":
            options["zero_dc"] = True  # the default of Music-Source-Separation-Training
        torch.manual_seed(1)
        model = (BSRoformer if name == "bs" else MelBandRoformer)(**options).eval()
        state = model.state_dict()
        if name == "mel":  # as Lightning saves it, in half precision
            state = {f"model.{key}": value.half() for key, value in state.items()}
            model.load_state_dict({key[6:]: value.float() for key, value in state.items()})
            state = {"epoch": 3, "state_dict": state}
        torch.save(state, folder / f"{name}.ckpt")
        with torch.no_grad():
            stems = model(x)[0]  # [2,S] or [N,2,S]
        stems = torch.nn.functional.pad(stems, (0, SAMPLES - stems.shape[-1]))
        (folder / f"{name}.f32").write_bytes(stems.numpy().astype("<f4").tobytes())
        print(name, list(stems.shape), (folder / f"{name}.ckpt").stat().st_size, "bytes of weights")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
