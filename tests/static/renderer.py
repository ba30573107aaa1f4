#!/usr/bin/env python3
"""Tests examples/data on songs built here: which note goes to which stem, the sung line, the excerpt, the bits.

Prints "skipped" and ends well when a Python package that the renderer needs is not installed.
"""

import struct
import sys
import tempfile
import types
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
try:
    import mido
    import numpy as np
    import soundfile
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(0)

import demo_summary
import midi_song
import render_musdb


def program(channel, number):
    return mido.Message("program_change", channel=channel, program=number)


def note(start, end, channel, pitch, velocity=100):
    return [midi_song.Event(start, mido.Message("note_on", channel=channel, note=pitch, velocity=velocity)),
            midi_song.Event(end, mido.Message("note_on", channel=channel, note=pitch, velocity=0))]


def song(*parts):
    events = [event for part in parts for event in (part if isinstance(part, list) else [midi_song.Event(0.0, part)])]
    return sorted(events, key=lambda event: event.seconds)


def melody(channel, pitches, length=0.5):
    return [event for i, pitch in enumerate(pitches) for event in note(i * length, (i + 0.9) * length, channel, pitch)]


def midi_bytes(events):
    with tempfile.NamedTemporaryFile(suffix=".mid") as file:
        midi_song.write_midi(events, file.name)
        return Path(file.name).read_bytes()


class Stems(unittest.TestCase):
    def test_a_note_belongs_to_the_program_it_began_with(self):
        events = song(program(0, 33), program(9, 0), program(1, 52), note(1.0, 3.0, 0, 40), note(1.0, 1.1, 9, 36),
                      [midi_song.Event(2.0, program(0, 30))], note(4.0, 5.0, 0, 64), note(4.0, 5.0, 1, 60))
        found = {(n.start, n.channel): (n.stem, n.end) for n in midi_song.notes(events)}
        self.assertEqual(found, {(1.0, 0): ("bass", 3.0), (1.0, 9): ("drums", 1.1),
                                 (4.0, 0): ("other", 5.0), (4.0, 1): ("vocals", 5.0)})

    def test_every_note_message_is_in_exactly_one_stem(self):
        events = song(program(0, 33), program(2, 25), note(0, 1, 0, 40), note(0, 1, 9, 36), note(0, 1, 2, 60),
                      note(0, 1, 3, 70))
        lead = [event for event, owner in zip(events, midi_song.assign_stems(events, 3)) if owner == midi_song.LEAD]
        parts = [lead] + [[e for e in midi_song.stem_events(events, stem, 3) if midi_song.is_note(e.message)]
                          for stem in midi_song.STEMS]
        self.assertEqual([len(part) for part in parts], [2, 0, 2, 2, 2])
        self.assertEqual({e.message.channel for e in lead}, {3})
        for stem in midi_song.STEMS:
            kept = midi_song.stem_events(events, stem, 3)
            self.assertEqual(sum(e.message.type == "program_change" for e in kept), 2)

    def test_the_lead_is_the_melody_not_the_chords(self):
        chords = melody(1, [48] * 40) + melody(1, [52] * 40) + melody(1, [55] * 40)
        tune = melody(2, [60, 62, 64, 65, 67, 69, 71, 72] * 5)
        self.assertEqual(midi_song.lead_channel(midi_song.notes(song(chords, tune))), 2)
        self.assertIsNone(midi_song.lead_channel(midi_song.notes(song(tune[:20]))))

    def test_the_sung_line_has_one_note_at_a_time_in_the_voice(self):
        events = song(melody(2, [36, 38, 40, 67]), note(0.5, 1.6, 2, 33))
        line = midi_song.sung_line(midi_song.notes(events, lead=2))
        # 33 begins with 38 and is lower: left out. The median, 40, moves up two octaves; 67 comes down again from there
        self.assertEqual([n.pitch for n in line], [60, 62, 64, 67])
        self.assertTrue(all(a.end <= b.start for a, b in zip(line, line[1:])))

    def test_the_excerpt_is_where_the_sparsest_stem_sounds_most(self):
        events = song(program(0, 33), program(1, 52), note(0, 40, 0, 40), note(0, 40, 1, 60), note(20, 30, 2, 60),
                      *[note(t * 0.4, t * 0.4 + 0.1, 9, 36) for t in range(100)])
        start, coverage = midi_song.fullest_start(midi_song.notes(events), 10)
        self.assertEqual(start, 20.0)
        self.assertEqual(coverage, 1.0)

    def test_an_excerpt_keeps_the_sound_but_no_note_from_outside(self):
        events = song(program(0, 33), note(0, 6, 0, 40), note(5, 20, 0, 41), note(12, 13, 0, 42))
        cut = midi_song.excerpt(events, 4.0, 6.0)
        self.assertEqual(cut[0], midi_song.Event(0.0, program(0, 33)))
        self.assertEqual([(n.start, n.end, n.pitch, n.stem) for n in midi_song.notes(cut)], [(1.0, 6.0, 41, "bass")])


class Files(unittest.TestCase):
    def test_midi_files_keep_times_and_messages(self):
        events = song(program(0, 33), melody(0, [40, 43]), note(0.25, 1.0, 9, 36))
        for written, read in zip(events, midi_song.read_events(midi_bytes(events)), strict=True):
            self.assertAlmostEqual(written.seconds, read.seconds, delta=0.001)
            self.assertEqual(written.message.copy(time=0), read.message.copy(time=0))

    def test_tempo_changes_are_followed(self):
        track = mido.MidiTrack([mido.Message("note_on", note=60, time=0),
                                mido.MetaMessage("set_tempo", tempo=250000, time=480),
                                mido.Message("note_off", note=60, time=480)])
        file = mido.MidiFile(type=0, ticks_per_beat=480, tracks=[track])
        with tempfile.NamedTemporaryFile(suffix=".mid") as path:
            file.save(path.name)
            self.assertAlmostEqual(midi_song.read_events(Path(path.name).read_bytes())[-1].seconds, 0.75)

    def test_wad_songs_are_the_midi_lumps_each_once(self):
        def wad(*lumps):
            body, directory = b"", b""
            for name, data in lumps:
                directory += struct.pack("<ii8s", 12 + len(body), len(data), name)
                body += data
            return struct.pack("<4sii", b"IWAD", len(lumps), 12 + len(body)) + body + directory

        with tempfile.TemporaryDirectory() as folder:
            first, second, wrong = (Path(folder) / name for name in ("1.wad", "2.wad", "3.wad"))
            first.write_bytes(wad((b"D_E1M1", b"MThd one"), (b"D_MUS", b"MUS\x1a"), (b"MAP01", b"MThd")))
            second.write_bytes(wad((b"D_E1M1", b"MThd two"), (b"D_EVIL", b"MThd evil"), (b"D_TWIN", b"MThd one")))
            wrong.write_bytes(b"RIFF" + bytes(8))
            self.assertEqual(midi_song.wad_songs([first, second]), {"e1m1": b"MThd one", "evil": b"MThd evil"})
            with self.assertRaisesRegex(ValueError, "expected a WAD"):
                midi_song.wad_songs([wrong])


class Samples(unittest.TestCase):
    def setUp(self):
        noise = np.random.default_rng(1).standard_normal((4, render_musdb.SAMPLE_RATE * 2, 2)).astype(np.float32)
        self.stems = {stem: gain * wave for stem, gain, wave in zip(midi_song.STEMS, (0.5, 0.01, 3.0, 0.1), noise)}

    def test_the_mixture_is_the_sum_bit_for_bit_and_nothing_clips(self):
        waves = render_musdb.quantize(render_musdb.balance(self.stems))
        total = sum(waves[stem].astype(np.int64) for stem in midi_song.STEMS)
        np.testing.assert_array_equal(waves["mixture"].astype(np.int64), total)
        self.assertLessEqual(np.abs(total).max(), 0.951 * 32767)

    def test_levels_do_not_depend_on_how_loud_a_stem_was_rendered(self):
        self.stems["other"][:] = 0
        balanced = render_musdb.balance(self.stems)
        level = {stem: 20 * np.log10(render_musdb.rms(wave) + 1e-12) for stem, wave in balanced.items()}
        self.assertAlmostEqual(level["vocals"] - level["drums"], 1.0, delta=0.2)
        self.assertAlmostEqual(level["vocals"] - level["bass"], 2.0, delta=0.2)
        self.assertEqual(np.abs(balanced["other"]).max(), 0)
        self.assertAlmostEqual(20 * np.log10(render_musdb.rms(sum(balanced.values()))), -18, delta=0.1)

    def test_a_song_is_reused_only_when_settings_and_bits_are_the_same(self):
        with tempfile.TemporaryDirectory() as out:
            folder, settings = Path(out) / "train" / "Freedoom - X", {"song": "x"}
            render_musdb.render_stems, original = (lambda midi, seconds, vocals: self.stems), render_musdb.render_stems
            try:
                made = render_musdb.render_song(b"", folder, settings | {"seconds": 2, "vocals": "none"})
            finally:
                render_musdb.render_stems = original
            settings = made["settings"]
            self.assertEqual(sorted(path.name for path in folder.parent.iterdir()), ["Freedoom - X"])
            self.assertEqual(render_musdb.finished_song(folder, settings), made)
            self.assertIsNone(render_musdb.finished_song(folder, settings | {"seconds": 3}))
            info = soundfile.info(str(folder / "mixture.wav"))
            self.assertEqual((info.samplerate, info.channels, info.frames, info.subtype), (44100, 2, 88200, "PCM_16"))
            with open(folder / "bass.wav", "r+b") as file:
                file.seek(1000)
                byte = file.read(1)
                file.seek(1000)
                file.write(bytes([byte[0] ^ 1]))
            self.assertIsNone(render_musdb.finished_song(folder, settings))

            # A song that moves from train to test must not stay in train
            render_musdb.remove_other_songs(Path(out), {Path(out) / "test" / "Freedoom - X": None})
            self.assertFalse(folder.exists())


class Parts(unittest.TestCase):
    def setUp(self):
        full = song(program(0, 33), program(1, 52), note(0, 40, 0, 40), note(0, 40, 1, 60), note(0, 40, 2, 60),
                    *[note(t * 0.4, t * 0.4 + 0.1, 9, 36) for t in range(100)])
        sparse = [event for event in full if event.message.channel != 1]  # nobody sings
        self.available = {f"s{number}": midi_bytes(full) for number in range(12)} | {"sparse": midi_bytes(sparse)}

    def divide(self, **changes):
        options = {"songs": "all", "test_songs": "s3", "fullness": 0, "held_out": 0, "seed": 1, "seconds": 10}
        return render_musdb.divide(self.available, types.SimpleNamespace(**(options | changes)))

    def test_songs_are_held_out_by_a_draw_that_the_seed_repeats(self):
        parts = self.divide(held_out=4)
        self.assertEqual((len(parts["train"]), len(parts["valid"]), parts["test"]), (9, 4, []))
        self.assertEqual(sorted(parts["train"] + parts["valid"]), sorted(self.available))
        self.assertEqual(self.divide(held_out=4), parts)
        self.assertGreater(len({tuple(self.divide(held_out=4, seed=seed)["valid"]) for seed in range(8)}), 4)
        with self.assertRaisesRegex(SystemExit, "leaves none"):
            self.divide(held_out=13)

    def test_without_a_draw_the_test_songs_are_those_that_are_named(self):
        parts = self.divide()
        self.assertEqual((len(parts["train"]), parts["valid"], parts["test"]), (12, [], ["s3"]))

    def test_songs_in_which_a_stem_hardly_sounds_are_left_out_where_that_is_wanted(self):
        self.assertIn("sparse", self.divide()["train"])
        self.assertNotIn("sparse", self.divide(fullness=0.5)["train"])


class Summary(unittest.TestCase):
    def test_the_summary_has_what_both_tools_measured(self):
        scores = dict(zip(demo_summary.STEMS, (4.0, 3.0, 2.0, 1.0, 2.5)))
        zero = dict.fromkeys(demo_summary.STEMS, 0.0)
        training = {"train_seconds": 420, "peak_bytes": 2**30, "stored_scores_bytes": 3 * 2**30, "epochs": 7}
        summary = demo_summary.summarize(training, {"nsdr": scores, "nsdr_silence": zero, "nsdr_mixture": zero})
        self.assertEqual(set(summary), {"nsdr", "nsdr_silence", "nsdr_mixture", "train_seconds", "peak_bytes",
                                        "stored_scores_bytes"})
        self.assertEqual(summary["nsdr"], scores)
        text = demo_summary.table(summary)
        self.assertIn("1024 MiB", text)
        self.assertIn("4.0 times", text)


if __name__ == "__main__":
    unittest.main()
