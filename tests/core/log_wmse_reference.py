"""Prints the scores that tests/core/scores.cpp expects of logWMSE, as torch-log-wmse 1.1.0 (pip install torch-log-wmse
torchaudio) computes them in double precision. The signals are those of scores_reference.py, the mixture is their sum.
"""

import numpy as np
import torch
from torch_log_wmse import LogWMSE

from scores_reference import estimate, reference


def score(mixture, estimate, reference, rate):
    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in (mixture, estimate, reference)]
    return LogWMSE(sample_rate=rate)(tensors[0][None], tensors[1][None, :, None], tensors[2][None, :, None]).item()


mixture = reference + estimate
for rate in (44100, 48000, 32000):
    print(f"{rate} Hz: {score(mixture, estimate, reference, rate):.10f}")
print(f"silent reference: {score(mixture, estimate, 0 * reference, 44100):.10f}")
print(f"silent mixture: {score(0 * mixture, estimate, reference, 44100):.10f}")
print(f"no error: {score(mixture, reference, reference, 44100):.10f}")
print(f"10 samples: {score(mixture[:, :10], estimate[:, :10], reference[:, :10], 44100):.10f}")
