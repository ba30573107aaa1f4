"""Prints the scores that tests/core/bsseval.cpp expects, as museval (pip install museval) computes them.

The signals are whole numbers from one generator, which both programs have.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np

# museval/metrics.py by itself: the package asks for ffmpeg
package = Path(importlib.util.find_spec("museval").origin).parent
spec = importlib.util.spec_from_file_location("metrics", package / "metrics.py")
metrics = importlib.util.module_from_spec(spec)
spec.loader.exec_module(metrics)
np.linalg.linalg = np.linalg  # what museval 0.4.1 calls it
bss_eval = metrics.bss_eval


def signals(sources, channels, samples):
    """References and estimates [sources, samples, channels]; see `signals` in bsseval.cpp."""
    state = 12345
    noise = np.empty((2, samples, sources, channels))
    for index in np.ndindex(noise.shape):
        state = (1103515245 * state + 12345) % 2**31
        noise[index] = (state >> 16) % 201 - 100
    references = noise[0]
    references[1:] += references[:-1]  # not white
    delayed = np.zeros_like(references)
    delayed[3:] = references[:-3]
    others = references.sum(1, keepdims=True) - references
    estimates = 2 * references + delayed[..., ::-1] + others + noise[1]
    return references.transpose(1, 0, 2), estimates.transpose(1, 0, 2)


def coloured(signals):
    """Mostly low frequencies, as music has them: sums over 32 samples of sums over 32 samples."""
    low = signals
    for _ in range(2):
        padded = np.pad(low, ((0, 0), (31, 0), (0, 0)))
        low = sum(padded[:, i:i + signals.shape[1]] for i in range(32))
    return 1000 * low + signals


def show(name, references, estimates, window, hop, taps):
    scores = bss_eval(references, estimates, window=window, hop=hop, filters_len=taps)[:4]
    print(f"// {name}: window {window}, hop {hop}, {taps} taps")
    for frame in range(scores[0].shape[1]):
        for source in range(references.shape[0]):
            print("    {" + ", ".join(f"{score[source, frame]:.10f}" for score in scores) + "},")


references, estimates = signals(3, 2, 1000)
show("stereo", references, estimates, 300, 200, 8)
show("short", references[:, :250], estimates[:, :250], 300, 200, 8)
references[1, 200:500] = 0
show("silence in source 1", references, estimates, 300, 200, 8)
equal = references.copy()
equal[..., 1] = equal[..., 0]
show("equal channels", equal[:, 500:], estimates[:, 500:], 300, 200, 4)
references, estimates = signals(2, 2, 1000)
references, estimates = coloured(references), coloured(estimates) + 1000 * estimates
references[0, :, 1] = references[0, :, 0]
show("equal channels of coloured sources", references, estimates, 500, 500, 24)
if len(sys.argv) > 1:  # the time for a track, to compare with
    import time

    references, estimates = np.random.randn(2, 4, int(sys.argv[1]) * 44100, 2)
    begin = time.time()
    bss_eval(references, estimates, window=44100, hop=44100, filters_len=512)
    print(f"{time.time() - begin:.1f} s")
