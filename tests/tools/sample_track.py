"""A configuration and WAV files of tests, and a real MUSDB18 track, where there is one, with estimates of its stems:
what tools.py evaluates, and museval_sample.py."""

import array
import os
import random
import wave
from pathlib import Path

STEMS = ["vocals", "drums", "bass", "other"]
RATE = 44100
CONFIG = {  # of a model that is trained in a moment
    "model": {"n_fft": 256, "hop_length": 128, "n_layers": 1, "emb_dim": 8, "n_heads": 2, "ffn_hidden_dim": [8, 8]},
    "training": {"segment_length": 4096, "batch_size": 1, "steps_per_epoch": 2, "epochs": 1, "learning_rate": 1e-3,
                 "warmup_steps": 1},
    "loss": {"windows": [256, 128], "hop": 64, "min_n_fft": 256},
}


def find_sample_track():
    """The folder of Music Delta - 80s Rock below HEADROOM_SAMPLE_DATA or beside the project, or None."""
    beside = Path(__file__).resolve().parents[3] / "shared/data/musdb18-sample"
    tracks = Path(os.environ.get("HEADROOM_SAMPLE_DATA", beside)).glob("train/Music Delta - 80s Rock")
    return next(tracks, None)


def samples_of(path):
    """The number of channels, and integers as they lie in a file of 16 bits."""
    with wave.open(str(path), "rb") as file:
        return file.getnchannels(), array.array("h", file.readframes(file.getnframes()))


def write_samples(path, samples, channels=2, rate=RATE):
    """Writes integers of 16 bits, all channels of a sample side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(array.array("h", samples).tobytes())


def write_noise_tracks(folder, tracks):
    """Writes the stems of tracks, half a second of noise each, without a mixture."""
    dice = random.Random(1)
    for track in tracks:
        for stem in STEMS:
            write_samples(folder / track / f"{stem}.wav", [dice.randrange(-4000, 4000) for _ in range(2 * 20011)])


def write_sample_estimates(track, folder):
    """Estimates of a real track that museval_sample.py evaluates, too: stems through filters of their own, with what is
    left of the others."""
    channels, mixture = samples_of(track / "mixture.wav")
    for delay, stem in enumerate(STEMS, start=2):
        _, true = samples_of(track / f"{stem}.wav")
        before = array.array("h", [0] * (delay * channels)) + true
        estimate = [(11 * s + 3 * b + m) // 16 for s, b, m in zip(true, before, mixture)]
        write_samples(folder / f"{stem}.wav", estimate, channels)
