"""Sings a line with pysinsy's Japanese singing voice, for render_musdb.py --vocals sinsy.

Needs the Python packages pysinsy and pyworld, which are compiled on installation, and scipy. The voice is
nitech_jp_song070_f001 (CC BY 3.0, Nagoya Institute of Technology).
"""

import importlib.metadata
import importlib.util
import random
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
from scipy.signal import fftconvolve, resample_poly

SAMPLE_RATE = 44100
SINSY_RATE = 48000

# The voice is in tune from E4 to D5 only: it sings each note there and WORLD moves the note to its pitch
LOWEST_IN_TUNE, HIGHEST_IN_TUNE = 64, 74

# One sung syllable a note
SYLLABLES = "らりるれろなまやわだばさたかはあ"

# The score runs at 120 beats a minute with 24 divisions a beat, so a bar of four beats lasts 2 s
DIVISIONS_PER_SECOND, DIVISIONS_PER_BAR = 48, 96

WORLD_FRAMES_PER_SECOND = 200


def sing(line, seconds):
    """Returns samples [time, 2] at 44.1 kHz of a list of midi_song.Note, one at a time, each on a syllable."""
    _provide_pkg_resources()
    import pysinsy

    with tempfile.NamedTemporaryFile("w", suffix=".xml", encoding="utf-8") as score:
        score.write(music_xml(line, seconds))
        score.flush()
        samples, rate = pysinsy.synthesize(score.name)
    if rate != SINSY_RATE:
        raise RuntimeError(f"pysinsy sang at {rate} Hz, expected {SINSY_RATE} Hz")
    voice = _in_tune(np.asarray(samples, np.float64) / 32768, line)
    return _in_a_room(resample_poly(voice, 147, 160)).astype(np.float32)  # 48000 * 147 / 160 = 44100


def _provide_pkg_resources():
    """Stands in for the part of pkg_resources that pysinsy and pyworld use; setuptools 82 and later lack it."""
    if importlib.util.find_spec("pkg_resources"):
        return
    stand_in = types.ModuleType("pkg_resources")
    stand_in.get_distribution = lambda name: types.SimpleNamespace(version=importlib.metadata.version(name))
    stand_in.resource_filename = lambda package, path: str(
        Path(importlib.util.find_spec(package).origin).parent / path)
    sys.modules["pkg_resources"] = stand_in


def music_xml(line, seconds):
    """Returns the line as a MusicXML score in which every note stands at its time; ties carry notes over bar lines."""
    bars, position = [[]], 0
    for pitch, duration, syllable in _score(line, seconds):
        first = True
        while duration:
            if position == DIVISIONS_PER_BAR:
                bars.append([])
                position = 0
            part = min(duration, DIVISIONS_PER_BAR - position)
            bars[-1].append(_note_xml(pitch, part, syllable if first else None, first, part == duration))
            duration -= part
            position += part
            first = False
    attributes = ("<attributes><divisions>24</divisions><key><fifths>0</fifths></key>"
                  "<time><beats>4</beats><beat-type>4</beat-type></time>"
                  "<clef><sign>G</sign><line>2</line></clef></attributes><direction><sound tempo=\"120\"/></direction>")
    measures = "".join(f'<measure number="{number}">{attributes if number == 1 else ""}{"".join(bar)}</measure>'
                       for number, bar in enumerate(bars, 1))
    return ('<?xml version="1.0" encoding="UTF-8"?><score-partwise version="2.0"><part-list><score-part id="P1">'
            f'<part-name>V</part-name></score-part></part-list><part id="P1">{measures}</part></score-partwise>')


def _score(line, seconds):
    """Yields (pitch, divisions, syllable) without gaps; rests have pitch None. The same line has the same syllables."""
    syllables, now = random.Random(len(line)), 0
    for note in line:
        start, end = max(now, round(note.start * DIVISIONS_PER_SECOND)), round(note.end * DIVISIONS_PER_SECOND)
        if end - start < 3:
            continue  # too short for a syllable
        if start > now:
            yield None, start - now, None
        yield min(HIGHEST_IN_TUNE, max(LOWEST_IN_TUNE, note.pitch)), end - start, syllables.choice(SYLLABLES)
        now = end
    # sinsy wants a bar of rest at the end
    yield None, max(0, round(seconds * DIVISIONS_PER_SECOND) - now) + DIVISIONS_PER_BAR, None


def _note_xml(pitch, duration, syllable, first, last):
    if pitch is None:
        return f"<note><rest/><duration>{duration}</duration><voice>1</voice></note>"
    step = "CCDDEFFGGAAB"[pitch % 12]
    alter = "<alter>1</alter>" if pitch % 12 in (1, 3, 6, 8, 10) else ""
    ties = ("" if first else '<tie type="stop"/>') + ("" if last else '<tie type="start"/>')
    lyric = f'<lyric number="1"><syllabic>single</syllabic><text>{syllable}</text></lyric>' if syllable else ""
    return (f"<note><pitch><step>{step}</step>{alter}<octave>{pitch // 12 - 1}</octave></pitch>"
            f"<duration>{duration}</duration>{ties}<voice>1</voice>{lyric}</note>")


def _in_tune(voice, line):
    """Moves each note of the voice [time] to its pitch: WORLD's analysis, another f0, WORLD's synthesis."""
    import pyworld

    f0, times = pyworld.dio(voice, SINSY_RATE, f0_floor=150.0, f0_ceil=800.0, speed=4)
    f0 = pyworld.stonemask(voice, f0, times, SINSY_RATE)
    voiced = f0 > 0
    sung = 69 + 12 * np.log2(np.where(voiced, f0, 440.0) / 440)

    correction = np.full(len(f0), np.nan)  # in semitones, one a frame
    for note in line:
        first, last = (int(at * WORLD_FRAMES_PER_SECOND) for at in (note.start, note.end))
        heard = sung[first : last + 1][voiced[first : last + 1]]
        if len(heard):
            correction[first : last + 1] = note.pitch - np.median(heard)
    known = np.flatnonzero(~np.isnan(correction))
    correction = np.interp(np.arange(len(correction)), known, correction[known])
    glide = 9  # frames: 45 ms from one note to the next
    correction = np.convolve(np.pad(correction, glide // 2, "edge"), np.full(glide, 1 / glide), "valid")

    envelope = pyworld.cheaptrick(voice, f0, times, SINSY_RATE)
    aperiodicity = pyworld.d4c(voice, f0, times, SINSY_RATE)
    return pyworld.synthesize(np.where(voiced, f0 * 2 ** (correction / 12), 0.0), envelope, aperiodicity, SINSY_RATE)


def _in_a_room(voice):
    """Makes a mono voice stereo with a small room: decaying noise, the same for every song."""
    length, decay, predelay, loudness = int(0.9 * SAMPLE_RATE), 0.16, int(0.012 * SAMPLE_RATE), 0.22
    room = np.random.default_rng(7).standard_normal((length, 2))
    room *= np.exp(-np.arange(length) / SAMPLE_RATE / decay)[:, np.newaxis]
    room[:predelay] = 0
    room *= loudness / np.sqrt((room**2).sum(axis=0))
    return np.stack([voice + fftconvolve(voice, room[:, side])[: len(voice)] for side in (0, 1)], axis=1)
