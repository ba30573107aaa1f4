#!/usr/bin/env python3
"""Renders MIDI songs of Debian's `freedoom` package as a data set in the MUSDB18-HQ layout.

    render_musdb.py --out DIR [--songs e3m5,evil] [--test-songs e1m1] [--seconds 75] [--vocals choir|sinsy|none]
                    [--jobs 2]
    render_musdb.py --out DIR --songs all --fullness 0.5 --held-out 5 --seed 1
    render_musdb.py --list

makes DIR/train/<Artist - Title>/{mixture,vocals,drums,bass,other}.wav and DIR/test/... : 44.1 kHz, stereo, 16 bits.
The mixture is the sum of the four stems bit for bit. Songs that are there already, made with the same settings, are
kept; a song appears in DIR only when it is complete, so an interrupted run is simply started again.

With --held-out nobody chooses which songs a model is tested on: so many of --songs, drawn by --seed, become DIR/valid,
which `train` validates on, and there is no DIR/test.

Needs the Debian packages freedoom, fluidsynth and fluid-soundfont-gm, and the Python packages mido, numpy and
soundfile; `--vocals sinsy` also scipy, pysinsy and pyworld. docs/080_demo_data.md explains how the stems are made.
"""

import argparse
import concurrent.futures
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

import midi_song
from midi_song import STEMS

SAMPLE_RATE = 44100

WADS = ("/usr/share/games/doom/freedoom1.wad", "/usr/share/games/doom/freedoom2.wad")
SOUND_FONT = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
LICENCES = {
    "LICENCE-freedoom.txt": "/usr/share/doc/freedoom/copyright",
    "LICENCE-fluid-soundfont.txt": "/usr/share/doc/fluid-soundfont-gm/copyright",
}

# Songs in which all four stems sound most of the time (see --list), and one of their style to test with
TRAIN_SONGS = "e3m5,evil,stlks3,shawn,e3m3,e1m7,e3m6,in_cit,romero,romer2,e2m3,theda2"
TEST_SONGS = "e1m1"

# RMS of each stem where it sounds; the whole song is then scaled to MIXTURE_RMS, or less where a peak would clip
STEM_LEVEL_DB = {"vocals": 0.0, "drums": -1.0, "bass": -2.0, "other": -2.0}
MIXTURE_RMS = 10 ** (-18 / 20)
LARGEST_PEAK = 0.95

# Peaks of a stem are rounded off (tanh) towards this many times its level, so that one stroke sets no song's gain
PEAK_TO_LEVEL = 5.0

CHOIR_PROGRAM = 53  # General MIDI 54, "Voice Oohs"

# Changes whenever the same settings give other samples: older songs are then rendered again
RENDERING = 1


def play(events, seconds):
    """Plays MIDI events with fluidsynth and returns samples [time, 2] of exactly `seconds`, float32."""
    with tempfile.TemporaryDirectory() as folder:
        midi, wave = f"{folder}/part.mid", f"{folder}/part.wav"
        midi_song.write_midi(events, midi)
        played = subprocess.run(
            ["fluidsynth", "-n", "-i", "-q", "-r", str(SAMPLE_RATE), "-g", "0.35", "-R", "1", "-C", "0",
             "-o", "synth.polyphony=1024", "-o", "synth.dynamic-sample-loading=1",
             "-O", "float", "-T", "wav", "-F", wave, SOUND_FONT, midi],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if played.returncode != 0:
            raise RuntimeError(f"fluidsynth ended with {played.returncode}: {played.stderr.strip()}")
        return with_length(soundfile.read(wave, dtype="float32", always_2d=True)[0], seconds)


def with_length(samples, seconds):
    """Cuts samples [time, 2] to `seconds`, or pads them with silence."""
    count = round(seconds * SAMPLE_RATE)
    return np.pad(samples[:count], ((0, max(0, count - len(samples))), (0, 0)))


def sing(line, seconds, vocals):
    """Returns the sung line as samples [time, 2]."""
    if vocals == "sinsy":
        import sung_voice  # needs packages that nothing else needs

        return with_length(sung_voice.sing(line, seconds), seconds)
    return play(midi_song.line_events(line, CHOIR_PROGRAM), seconds)


def render_stems(midi, seconds, vocals):
    """Returns {stem: samples [time, 2]} of the fullest excerpt of a song (MIDI bytes), not yet balanced."""
    events = midi_song.read_events(midi)
    lead = None if vocals == "none" else midi_song.lead_channel(midi_song.notes(events))
    start, _ = midi_song.fullest_start(midi_song.notes(events, lead), seconds)
    seconds = min(seconds, events[-1].seconds - start)
    events = midi_song.excerpt(events, start, seconds)

    stems = {stem: play(midi_song.stem_events(events, stem, lead), seconds) for stem in STEMS}
    line = midi_song.sung_line(midi_song.notes(events, lead))
    if line:
        stems["vocals"] += sing(line, seconds, vocals)
    return stems


def sounding_level(samples):
    """RMS of the 0.1 s frames in which something sounds, without the loudest 5 % of them; 0 for silence."""
    frame = SAMPLE_RATE // 10
    count = len(samples) // frame
    power = np.sort((samples[: count * frame].reshape(count, -1) ** 2).mean(axis=1))
    power = power[power > 1e-8]
    if len(power) == 0:
        return 0.0
    return float(np.sqrt(power[: max(1, int(0.95 * len(power)))].mean()))


def balance(stems):
    """Returns the stems at the levels of STEM_LEVEL_DB, with rounded peaks, a fade at the end and the song's gain."""
    balanced = {}
    for stem, samples in stems.items():
        level = sounding_level(samples)
        if level == 0.0:
            balanced[stem] = samples
            continue
        wanted = 10 ** (STEM_LEVEL_DB[stem] / 20)
        ceiling = PEAK_TO_LEVEL * wanted
        balanced[stem] = ceiling * np.tanh(samples * (wanted / level) / ceiling)

    # The excerpt ends in the middle of the music
    fade = np.linspace(1.0, 0.0, SAMPLE_RATE // 2)[:, np.newaxis]
    for samples in balanced.values():
        samples[-len(fade) :] *= fade

    mixture = sum(balanced.values())
    peak = max(np.abs(samples).max() for samples in [mixture, *balanced.values()])
    gain = min(LARGEST_PEAK / peak, MIXTURE_RMS / rms(mixture))
    return {stem: gain * samples for stem, samples in balanced.items()}


def rms(samples):
    """Root mean square over time and channels."""
    return float(np.sqrt((samples**2).mean()))


def quantize(stems):
    """Returns int16 stems and their mixture, which is the sum of the rounded stems bit for bit."""
    rounded = {stem: np.rint(samples * 32767).astype(np.int32) for stem, samples in stems.items()}
    rounded["mixture"] = sum(rounded[stem] for stem in STEMS)
    return {name: samples.astype(np.int16) for name, samples in rounded.items()}


def render_song(midi, folder, settings):
    """Makes one song's folder, beside its place and moved there when complete. Returns what song.json holds."""
    waves = quantize(balance(render_stems(midi, settings["seconds"], settings["vocals"])))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    song = {"settings": settings, "rms_db": {}, "sha256": {}}
    for name, samples in waves.items():
        soundfile.write(partial / f"{name}.wav", samples, SAMPLE_RATE, subtype="PCM_16")
        song["rms_db"][name] = round(20 * np.log10(max(rms(samples / 32768), 1e-9)), 1)
        song["sha256"][name] = file_hash(partial / f"{name}.wav")
    (partial / "song.json").write_text(json.dumps(song, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return song


def file_hash(path):
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def finished_song(folder, settings):
    """Returns what song.json holds when the folder has the song as asked for, every file intact; else None."""
    try:
        song = json.loads((folder / "song.json").read_text())
        if song["settings"] == settings and all(
                file_hash(folder / f"{name}.wav") == digest for name, digest in song["sha256"].items()):
            return song
    except (OSError, ValueError, KeyError):
        pass
    return None


def remove_other_songs(out, wanted):
    """Removes songs that an earlier run made and this one does not want, so that none is in train and test."""
    for made in [*out.glob("*/*/song.json"), *out.glob("*/.*.partial")]:
        folder = made.parent if made.name == "song.json" else made
        if folder not in wanted:
            print(f"removing {folder.relative_to(out)}: not among the songs asked for")
            shutil.rmtree(folder)


def write_readme(out, vocals, song_count):
    """Writes what the data set is, where it comes from and under which licences, with the licences beside it."""
    for name, source in LICENCES.items():
        shutil.copyfile(source, out / name)
    voice = {
        "choir": "The melody of each song is played with the sound font's voices.",
        "sinsy": "The melody of each song is sung by the HTS voice nitech_jp_song070_f001 in pysinsy (CC BY 3.0,\n"
                 "Nagoya Institute of Technology).",
        "none": "There is no sung line.",
    }[vocals]
    (out / "README.md").write_text(f"""# Rendered songs in the MUSDB18-HQ layout

{song_count} songs for trying out a separator: train/ and test/ or valid/ hold one folder a song with mixture, vocals,
drums, bass and other as 16-bit WAV at 44.1 kHz. Each mixture is the sum of its stems bit for bit. song.json in each
folder tells the settings, levels and SHA-256 of the files.

Made by examples/data/render_musdb.py of the project headroom.

- Songs: MIDI files of Freedoom 0.12 (Debian package freedoom), three-clause BSD-like licence: LICENCE-freedoom.txt.
  Authors are named in the package's CREDITS.
- Sounds: FluidR3 GM by Frank Wen (Debian package fluid-soundfont-gm), MIT licence: LICENCE-fluid-soundfont.txt.
- Vocals: {voice}
""")


def choose(available, names):
    """Returns the list of song names that a comma-separated argument means; "all" means every song."""
    chosen = list(available) if names == "all" else [name for name in names.split(",") if name]
    unknown = [name for name in chosen if name not in available]
    if unknown:
        sys.exit(f"no song is named {', '.join(unknown)}; there are: {', '.join(sorted(available))}")
    return chosen


def fullest_excerpt(midi, seconds):
    """Returns (length, start, coverage): of a song (MIDI bytes), of its fullest excerpt, and how much of that the
    sparsest stem sounds, 0 to 1."""
    events = midi_song.read_events(midi)
    lead = midi_song.lead_channel(midi_song.notes(events))
    return events[-1].seconds, *midi_song.fullest_start(midi_song.notes(events, lead), seconds)


def list_songs(available, seconds):
    """Prints each song's length and how much of its fullest excerpt the sparsest stem sounds."""
    print("song      length (s)  excerpt from (s)  sparsest stem sounds")
    for name, midi in sorted(available.items()):
        length, start, coverage = fullest_excerpt(midi, seconds)
        print(f"{name:8}  {length:10.0f}  {start:16.0f}  {100 * coverage:18.0f} %")


def divide(available, arguments):
    """Returns {part: song names} of the data set that the command line asks for."""
    tested = [] if arguments.held_out else choose(available, arguments.test_songs)
    songs = [name for name in choose(available, arguments.songs) if name not in tested
             and (arguments.fullness == 0
                  or fullest_excerpt(available[name], arguments.seconds)[2] >= arguments.fullness)]
    if arguments.held_out >= max(len(songs), 1):
        sys.exit(f"--held-out {arguments.held_out} of {len(songs)} songs leaves none to train on")
    held_out = random.Random(arguments.seed).sample(sorted(songs), arguments.held_out)
    return {"train": [name for name in songs if name not in held_out], "valid": sorted(held_out), "test": tested}


def parse_arguments():
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the data set")
    parser.add_argument("--songs", default=TRAIN_SONGS,
                        help='songs of DIR/train, by name, or "all" that are not tested (default: %(default)s)')
    parser.add_argument("--test-songs", default=TEST_SONGS, help="songs of DIR/test (default: %(default)s)")
    parser.add_argument("--fullness", type=float, default=0,
                        help="leave out songs of which some stem sounds less than this share of the excerpt, 0 to 1")
    parser.add_argument("--held-out", type=int, default=0,
                        help="so many of --songs become DIR/valid, drawn by --seed, and --test-songs have no part")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=75, help="longest excerpt of a song (default: %(default)s)")
    parser.add_argument("--vocals", choices=("choir", "sinsy", "none"), default="choir",
                        help="who sings the melody (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="songs rendered at a time (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the songs there are and stop")
    arguments = parser.parse_args()
    if arguments.out is None and not arguments.list:
        parser.error("--out DIR is missing: the folder that the data set is to be written to")
    if arguments.seconds < 1 or arguments.jobs < 1:
        parser.error("--seconds and --jobs must be at least 1")
    if arguments.held_out < 0 or not 0 <= arguments.fullness <= 1:
        parser.error("--held-out must be at least 0, --fullness between 0 and 1")
    return arguments


def require_files():
    """Ends the program when something it reads is not installed."""
    missing = [path for path in (*WADS, SOUND_FONT, *LICENCES.values()) if not Path(path).exists()]
    if not shutil.which("fluidsynth"):
        missing.append("fluidsynth")
    if missing:
        sys.exit(f"not found: {', '.join(missing)}; install the Debian packages freedoom, fluidsynth and "
                 "fluid-soundfont-gm (scripts/setup.sh demo does)")


def main():
    arguments = parse_arguments()
    require_files()
    available = midi_song.wad_songs(WADS)
    if arguments.list:
        list_songs(available, arguments.seconds)
        return

    songs = {}  # folder: (MIDI bytes, settings)
    for part, names in divide(available, arguments).items():
        for name in names:
            settings = {"song": name, "seconds": arguments.seconds, "vocals": arguments.vocals, "rendering": RENDERING}
            songs[arguments.out / part / f"Freedoom - {name.upper()}"] = (available[name], settings)

    arguments.out.mkdir(parents=True, exist_ok=True)
    remove_other_songs(arguments.out, songs)
    write_readme(arguments.out, arguments.vocals, len(songs))

    def report(folder, song, what):
        levels = "  ".join(f"{name} {song['rms_db'][name]:6.1f}" for name in (*STEMS, "mixture"))
        print(f"{str(folder.relative_to(arguments.out)):24} {what:10} RMS in dB: {levels}", flush=True)

    with concurrent.futures.ProcessPoolExecutor(arguments.jobs) as pool:
        rendering = {}
        for folder, (midi, settings) in songs.items():
            if song := finished_song(folder, settings):
                report(folder, song, "is there")
            else:
                rendering[pool.submit(render_song, midi, folder, settings)] = folder
        for future in concurrent.futures.as_completed(rendering):
            report(rendering[future], future.result(), "rendered")


if __name__ == "__main__":
    main()
