"""Writes museval_sample.json, which tools.py compares `evaluate` with: the frames that museval 0.4.1 finds in estimates
of the real track of sample_track.py. Run by hand, with museval, numpy and soundfile.
"""

import importlib.util
import json
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from sample_track import STEMS, find_sample_track, write_sample_estimates

# museval/metrics.py by itself: the package asks for ffmpeg
package = Path(importlib.util.find_spec("museval").origin).parent
spec = importlib.util.spec_from_file_location("metrics", package / "metrics.py")
metrics = importlib.util.module_from_spec(spec)
spec.loader.exec_module(metrics)
np.linalg.linalg = np.linalg  # what museval 0.4.1 calls it


def read(folder):
    return np.stack([soundfile.read(Path(folder) / f"{stem}.wav", always_2d=True)[0] for stem in STEMS])


track = find_sample_track()
with tempfile.TemporaryDirectory() as folder:
    write_sample_estimates(track, Path(folder) / "estimates")
    scores = metrics.bss_eval(read(track), read(Path(folder) / "estimates"), window=44100, hop=44100)[:4]
result = {
    stem: [{name: score[i, t] for name, score in zip(("SDR", "ISR", "SIR", "SAR"), scores)}
           for t in range(scores[0].shape[1])]
    for i, stem in enumerate(STEMS)
}
(Path(__file__).parent / "museval_sample.json").write_text(json.dumps(result, indent=1) + "\n")
