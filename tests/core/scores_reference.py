"""Prints the scores that tests/core/scores.cpp expects, by the definitions in Music-Source-Separation-Training's
utils/metrics.py with PyTorch and librosa (pip install librosa; the filter bank alone is used)."""

import numpy as np
import torch
from librosa.filters import mel

state = 12345
noise = np.empty((20000, 4))
for index in np.ndindex(noise.shape):
    state = (1103515245 * state + 12345) % 2**31
    noise[index] = ((state >> 16) % 201 - 100) / 128
noise = noise.T
reference, estimate = noise[:2].copy(), noise[2:] / 8
reference[:, 1:] += reference[:, :-1]  # not white
reference[:, 9000:15000] /= 1024
estimate += 0.75 * reference
estimate[:, 12000:] /= 2


def si_sdr(s, e, eps=1e-8):
    scale = np.sum(e * s + eps) / np.sum(s**2 + eps)
    return 10 * np.log10(np.sum((s * scale) ** 2) / (np.sum((s * scale - e) ** 2) + eps) + eps)


def l1_frequency(s, e):
    magnitudes = [torch.stft(torch.from_numpy(x), 2048, 1024, return_complex=True).abs() for x in (s, e)]
    return 100 / (1 + float(10 * torch.nn.functional.l1_loss(*magnitudes)))


def bleed_fullness(s, e):
    levels = []
    for x in (s, e):
        window = torch.hann_window(4096, dtype=torch.float64)
        x = torch.stft(torch.from_numpy(x), 4096, 1024, window=window, return_complex=True, pad_mode="constant").abs()
        bank = torch.from_numpy(mel(sr=44100, n_fft=4096, n_mels=512, dtype=np.float64))
        x = 20 * torch.log10(torch.clamp(bank @ x, min=1e-10))  # torchaudio's AmplitudeToDB("magnitude", 80)
        levels.append(torch.maximum(x, x.max() - 80))
    difference = levels[1] - levels[0]
    louder, quieter = difference[difference > 0].mean(), difference[difference < 0].mean()
    return 100 / (1 + float(louder)), 100 / (1 - float(quieter))


if __name__ == "__main__":
    print(f"si_sdr {si_sdr(reference, estimate):.10f}")
    print(f"l1_frequency {l1_frequency(reference, estimate):.10f}")
    print("bleedless {:.10f} fullness {:.10f}".format(*bleed_fullness(reference, estimate)))
