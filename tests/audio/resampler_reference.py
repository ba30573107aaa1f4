"""Prints the values that tests/audio/resampler.cpp compares with, as python-soxr computes them: some samples of three
tones between several rates, away from the ends and from the frequencies that its filter damps by up to 0.01 dB. Run by
hand where numpy and soxr are: python3 tests/audio/resampler_reference.py
"""

import numpy
import soxr

i = numpy.arange(5000)
signal = (numpy.sin(0.05 * i) / 2 + numpy.sin(0.31 * i + 1) / 4 + numpy.sin(0.45 * i) / 8).astype(numpy.float32)
for source, target in [(48000, 44100), (44100, 48000), (22050, 44100), (44100, 16000), (96000, 44100)]:
    resampled = soxr.resample(signal, source, target, quality="VHQ")
    chosen = [600, 601, 777, 1000, 1200]
    values = ", ".join(f"{resampled[k]:.8g}f" for k in chosen)
    print(f"{{{source}, {target}, {{{values}}}}},")
