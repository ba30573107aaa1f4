"""Prints the values that tests/audio/resampler.cpp compares with, as python-soxr computes them: some samples of a signal
of 5000 samples between several rates. Run by hand where numpy and soxr are: python3 tests/audio/resampler_reference.py
"""

import numpy
import soxr

i = numpy.arange(5000)
signal = ((i * i * 7919) % 10007 / 10007 - 0.5).astype(numpy.float32)
for source, target in [(48000, 44100), (44100, 48000), (22050, 44100), (44100, 16000), (96000, 44100)]:
    resampled = soxr.resample(signal, source, target, quality="VHQ")
    chosen = [0, 1, 100, 777, 1500]
    values = ", ".join(f"{resampled[k]:.8g}f" for k in chosen)
    print(f"{{{source}, {target}, {{{values}}}}},")
