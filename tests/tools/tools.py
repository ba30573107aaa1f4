"""The tools from end to end on a tiny data set, and what they say to wrong input.

Usage: tools.py <folder with the tools>
"""

import array
import json
import pickle
import math
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import wave
from pathlib import Path

import demucs_reference
import published_reference
from sample_track import CONFIG, RATE, STEMS, find_sample_track, samples_of, write_sample_estimates, write_samples

TOOLS = Path(sys.argv.pop(1))
PUBLISHED = Path(__file__).parent / "published"
DEMUCS = Path(__file__).parent / "demucs"
CONFIGS = Path(__file__).parents[2] / "examples/configs"


def run(tool, *arguments, **options):
    return subprocess.run([TOOLS / tool, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)


def start(tool, *arguments, **options):
    """A tool that runs on its own; signals that the tests' own shell may ignore have their default actions."""
    def defaults():
        for number in [signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGQUIT, signal.SIGTERM]:
            signal.signal(number, signal.SIG_DFL)
    return subprocess.Popen([TOOLS / tool, *map(str, arguments)], preexec_fn=defaults, **options)


def small_files(limit):
    """Files get no larger than this: writing fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def little_memory(limit):
    """The process gets no more memory than this, however much the machine has."""
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def peak_resident_bytes(tool, *arguments, environment=None, code=0):
    process = subprocess.Popen([TOOLS / tool, *map(str, arguments)], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == code, process.returncode
    return usage.ru_maxrss * 1024


def write_wav(path, samples, rate=RATE, channels=2):
    """Writes integers, the same in all channels."""
    write_samples(path, [s for s in samples for _ in range(channels)], channels, rate)


def write_floats(path, samples):
    """Writes a stereo WAV file in float, a pair of samples after the other."""
    data = array.array("f", samples).tobytes()
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 3, 2, RATE, 8 * RATE, 8,
                         32,
                         b"data", len(data))
    path.write_bytes(header + data)


def read_wav(path):
    with wave.open(str(path), "rb") as file:
        return file.getnframes(), file.getnchannels(), file.getframerate()


def read_floats(path):
    """The samples of a WAV file in float, one channel after the other."""
    content = path.read_bytes()
    data = content.index(b"data")
    samples = array.array("f", content[data + 8:data + 8 + int.from_bytes(content[data + 4:data + 8], "little")])
    return samples[::2] + samples[1::2]


class Tools(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.root = Path(cls.temporary.name)
        dice = random.Random(1)
        frames = 20011
        for track in ["train/A - One", "train/B - Two", "test/C - Three"]:
            stems = {stem: [dice.randrange(-4000, 4000) for _ in range(frames)] for stem in STEMS}
            stems["mixture"] = [sum(samples) for samples in zip(*stems.values())]
            for stem, samples in stems.items():
                write_wav(cls.root / "data" / track / f"{stem}.wav", samples)
        cls.song = cls.root / "data/test/C - Three"
        cls.frames = frames
        (cls.root / "config.json").write_text(json.dumps(CONFIG))
        cls.trained = run("train", "--config", cls.root / "config.json", "--data", cls.root / "data", "--out",
                          cls.root / "run", "--steps", 2)
        cls.model = cls.root / "run/last.pt"

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def fails(self, result, *parts, code=1):
        self.assertEqual(result.returncode, code, result.stderr)
        for part in parts:
            self.assertIn(part, result.stderr)

    def test_train_separate_evaluate(self):
        self.assertEqual(self.trained.returncode, 0, self.trained.stderr)
        summary = json.loads((self.root / "run/summary.json").read_text())
        self.assertEqual(summary["steps"], 2)
        frames, bins = 1 + 4096 // 128, 129
        self.assertEqual(summary["stored_scores_bytes"], 2 * bins * frames * (bins + frames) * 4)

        separated = run("separate", "--model", self.model, self.song / "mixture.wav", self.root / "stems")
        self.assertEqual(separated.returncode, 0, separated.stderr)
        for stem in STEMS:
            self.assertEqual(read_wav(self.root / "stems" / f"{stem}.wav"), (self.frames, 2, RATE))

        evaluated = run("evaluate", "--reference", self.song, "--estimate", self.root / "stems", "--json",
                        self.root / "evaluation.json")
        self.assertEqual(evaluated.returncode, 0, evaluated.stderr)
        scores = json.loads((self.root / "evaluation.json").read_text())
        for stem in STEMS:
            self.assertAlmostEqual(scores["nsdr_silence"][stem], 0, places=6)
            # four independent stems of one level: what is too much is three times the stem's energy
            self.assertAlmostEqual(scores["nsdr_mixture"][stem], -10 * math.log10(3), delta=0.3)
            # masks that start at a quarter leave 12/16 of the energy as error
            self.assertAlmostEqual(scores["nsdr"][stem], -10 * math.log10(12 / 16), delta=0.3)

    def test_a_mono_file_is_separated(self):
        write_wav(self.root / "mono.wav", [1000, -1000] * 3000, channels=1)
        result = run("separate", "--model", self.model, self.root / "mono.wav", self.root / "mono")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(read_wav(self.root / "mono/bass.wav"), (6000, 2, RATE))

    def test_separate_resamples_and_groups_channels(self):
        for rate, channels, written in [(48000, 2, 2), (22050, 1, 2), (44100, 4, 4)]:
            song, out = self.root / f"{rate} {channels}.wav", self.root / f"{rate} {channels}"
            write_wav(song, [s % 2000 - 1000 for s in range(10001)], rate, channels)
            result = self.separate(song, out, "--residual", "rest")
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual("resampled to the model's 44100 Hz" in result.stderr, rate != RATE)
            for stem in [*STEMS, "rest"]:
                self.assertEqual(read_wav(out / f"{stem}.wav"), (10001, written, rate))

    def test_separate_writes_what_is_asked_for(self):
        song = self.song / "mixture.wav"
        every = self.root / "every"
        self.assertEqual(self.separate(song, every, "--format", "wav24", "--residual", "rest").returncode, 0)
        few = self.root / "few"
        result = self.separate("--stems", "vocals,bass", "--format", "wav24", song, few, "--name",
                               "{model}/{track} {stem}")
        self.assertEqual(result.returncode, 0, result.stderr)
        names = [few / "last" / f"mixture {stem}.wav" for stem in ["vocals", "bass"]]
        self.assertEqual(result.stdout.splitlines(), [str(name) for name in names])
        self.assertEqual(sorted(few.rglob("*.wav")), sorted(names))
        self.assertEqual(names[1].read_bytes(), (every / "bass.wav").read_bytes())
        two = self.root / "two"
        self.assertEqual(self.separate(song, two, "--two-stems", "vocals", "--format", "flac24").returncode, 0)
        self.assertEqual(sorted(path.name for path in two.iterdir()), ["no_vocals.flac", "vocals.flac"])
        self.assertEqual((two / "no_vocals.flac").read_bytes()[:4], b"fLaC")
        again = self.separate(two / "no_vocals.flac", self.root / "again")
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertEqual(read_wav(self.root / "again/drums.wav"), (self.frames, 2, RATE))
        for arguments, parts in [(["--stems", "vocal"], ["did you mean \"vocals\"?"]),
                                 (["--stems", "bass,bass"], ["called bass"]),
                                 (["--two-stems", "all"], ["expected one of vocals, drums, bass, other"]),
                                 (["--residual", "bass"], ["called bass"]),
                                 (["--residual", "a/b"], ["--residual a/b"])]:
            self.fails(self.separate(song, self.root / "never", *arguments), "headroom.separate.stems", *parts)
        for name in ["{song}", "{stem", "../{stem}", "/{stem}", "{track}", "{stem}/"]:
            self.fails(self.separate(song, self.root / "never", "--name", name), "headroom.separate.name")
        self.fails(self.separate(song, self.root / "never", "--stems", "bass", "--two-stems", "bass"), "excludes",
                   code=2)
        self.fails(self.separate(song), code=2)
        self.assertFalse((self.root / "never").exists())

    def test_separate_blends_as_asked(self):
        song = self.song / "mixture.wav"

        def bass(*options):
            out = self.root / ("blend " + " ".join(map(str, options)))
            result = self.separate(song, out, *options)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual(read_wav(out / "bass.wav"), (self.frames, 2, RATE))
            return (out / "bass.wav").read_bytes()

        quarter, default = bass("--num-overlap", 4), bass()
        self.assertEqual(bass("--step", 1024), quarter)
        self.assertEqual(bass("--overlap", 0.75), quarter)
        self.assertEqual(bass("--like", "msst", "--batch", 3), bass("--like", "msst", "--num-overlap", 4))
        different = [quarter, default, bass("--like", "msst"), bass("--like", "audio-separator"), bass("--shifts", 2),
                     bass("--like", "demucs"), bass("--window", "hann"), bass("--augment"), bass("--segment", 2048)]
        self.assertEqual(len(set(different)), len(different))
        bass("--bf16")
        self.fails(self.separate(song, self.root / "never", "--overlap", "0.5", "--step", "3"), "excludes", code=2)
        self.fails(self.separate(song, self.root / "never", "--step", "5000"), "headroom.core.segments.options")

    def test_separate_takes_several_models(self):
        song = self.song / "mixture.wav"
        alone = self.root / "alone"
        self.assertEqual(self.separate(song, alone).returncode, 0)
        for ensemble in ["mean", "median", "max", "min:spectrum"]:
            out = self.root / f"ensemble {ensemble}"
            result = self.separate("--model", self.model, "--ensemble", ensemble, song, out, "--name", "{model} {stem}")
            self.assertEqual(result.returncode, 0, result.stderr)
            name = f"{self.model.stem}+{self.model.stem} bass.wav"
            self.assertEqual(read_wav(out / name), (self.frames, 2, RATE))
            if ensemble != "min:spectrum":  # a model and itself
                self.assertEqual((out / name).read_bytes(), (alone / "bass.wav").read_bytes())
        self.fails(self.separate(song, self.root / "never", "--ensemble", "mode"), "--ensemble", code=2)

    def test_separate_takes_folders(self):
        songs, out = self.root / "songs", self.root / "separated songs"
        noise = [s * 7919 % 4001 - 2000 for s in range(9000)]
        write_wav(songs / "first.wav", noise)
        write_wav(songs / "album/second.WAV", noise, rate=32000)
        write_wav(songs / "album/.hidden.wav", noise)
        write_wav(songs / "__MACOSX/first.wav", noise)
        (songs / "album/cover.jpg").write_text("no sound")
        (songs / "album/broken.mp3").write_text("no sound either")
        (songs / "album/late.wav").write_bytes((songs / "first.wav").read_bytes()[:-10])
        result = self.separate(songs, out)
        self.fails(result, "2 could not be separated", "broken.mp3", "late.wav", "1 file of 32000 Hz", "2/2 first")
        expected = [f"{folder}/{stem}.wav" for folder in ["album/second", "first"] for stem in STEMS]
        self.assertEqual(sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()),
                         sorted(expected))
        self.assertFalse((out / "album/late").exists())
        self.assertEqual(read_wav(out / "album/second/bass.wav"), (9000, 2, 32000))
        # What lies in the output folder is no input, and what is there is kept
        inside = songs / "stems"
        for extra, code in [([], 1), (["--overwrite"], 1)]:
            self.fails(self.separate(songs, inside, *extra), "2 could not be separated", code=code)
        self.fails(self.separate(songs, inside), "headroom.separate.exists")
        self.assertFalse((inside / "stems").exists())
        # Two files of one name; several files; nothing at all
        write_wav(songs / "first.aif", noise)
        self.fails(self.separate(songs, self.root / "alike"), "headroom.separate.name", "first.aif", "first.wav")
        result = self.separate(songs / "first.wav", songs / "album/second.WAV", self.root / "several")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(len(list(self.root.glob("several/*/*.wav"))), 8)
        (self.root / "bare").mkdir()
        self.fails(self.separate(self.root / "bare", self.root / "never"), "headroom.separate.inputs", "bare")

    def test_separate_leaves_nothing_half_written(self):
        songs = self.root / "half"
        write_wav(songs / "a.wav", [s * 7919 % 40001 - 20000 for s in range(60000)])
        for form in ["wav24", "flac24"]:
            out = self.root / f"full {form}"
            result = run("separate", "--model", self.model, songs, out, "--format", form,
                         preexec_fn=lambda: small_files(50000))
            self.fails(result, "headroom.audio.file.write", "a/vocals." + form[:-2])
            self.assertFalse(out.exists())
        write_floats(songs / "b.wav", [0.0] * 150000 + [math.nan] + [0.0] * 49999)
        out = self.root / "broken half way"
        self.fails(self.separate(songs, out, "--format", "flac16"), "headroom.audio.file.not_finite", "b.wav")
        self.assertEqual(sorted(path.name for path in out.rglob("*")),
                         sorted(["a", *[f"{stem}.flac" for stem in STEMS]]))
        if os.geteuid() != 0:
            out.chmod(0o500)
            self.fails(self.separate(songs / "a.wav", out / "x"), "headroom.separate.output")

    def test_separate_refuses_what_it_cannot_read(self):
        out = self.root / "refused"
        self.fails(run("separate", "--model", self.model, self.root / "nothing.wav", out), "nothing.wav")
        (self.root / "text.wav").write_text("this is no music")
        self.fails(run("separate", "--model", self.model, self.root / "text.wav", out), "text.wav")
        truncated = self.root / "truncated.pt"
        truncated.write_bytes(self.model.read_bytes()[:-1000])
        self.fails(run("separate", "--model", truncated, self.song / "mixture.wav", out), "truncated.pt",
                   "headroom.training.state.corrupt")
        self.fails(run("separate", "--model", self.model, self.root / "text.wav", self.root / "refused/below/it"),
                   "text.wav")
        self.assertFalse(out.exists())
        self.fails(self.separate(self.song / "mixture.wav", out, "--device", "meta"), "headroom.tools.device",
                   "no device meta")
        self.fails(self.separate(self.song / "mixture.wav", out, "--num-overlap", 5000), "headroom.separate.overlap",
                   "--num-overlap 5000 is more than the 4096 samples")

    def test_names_are_shown_without_control_characters_and_may_be_long(self):
        songs = self.root / "odd names"
        write_wav(songs / "red\x1b[31m.wav", [1000, -1000] * 3000)
        write_wav(songs / ("n" * 250 + ".wav"), [1000, -1000] * 3000)
        (songs / "bell\a.wav").write_text("no sound")
        out = self.root / "odd stems"
        result = self.separate(songs, out, "--stems", "bass", "--name", "{track}")
        self.fails(result, "1 could not be separated", "bell\\x07.wav", "red\\x1b[31m, ")
        self.assertFalse({"\x1b", "\a"} & set(result.stderr))
        self.assertEqual(read_wav(out / ("n" * 250 + ".wav")), (6000, 2, RATE))
        self.fails(self.separate(songs / "red\x1b[31m.wav", out, "--stems", "bass", "--name", "n" * 252),
                   "File name too long")
        track = self.root / "odd tracks/a\x1bb"
        shutil.copytree(self.song, track)
        write_wav(track / "bass.wav", [0] * self.frames)
        result = self.evaluate(track.parent, track.parent)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("a\\x1bb: the true bass is silent", result.stderr)
        self.assertNotIn("\x1b", result.stdout + result.stderr)
        shutil.copytree(self.song, self.root / "odd data/train/whole")
        for stem in STEMS:
            write_wav(self.root / "odd data/train/a\x1bb" / f"{stem}.wav", [1] * 100)
        result = run("train", "--config", self.root / "config.json", "--data", self.root / "odd data", "--out",
                     self.root / "odd run", "--steps", 1)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("a\\x1bb is left out: it has 100 frames", result.stdout)
        self.assertNotIn("\x1b", result.stdout + result.stderr)
        config = self.root / "odd.yaml"
        published = published_reference.FILES["bs"]
        self.assertIn("optimizer: adam\n", published)
        config.write_text(published.replace("optimizer: adam\n", 'optimizer: "a\\eb"\n'))
        result = run("plan", "--config", config)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("training.optimizer: a\\x1bb is not here", result.stdout)
        self.assertNotIn("\x1b", result.stdout + result.stderr)

    def test_names_of_files_that_are_no_utf_8_get_into_json(self):
        odd, result = os.fsdecode(b"caf\xe9"), self.root / "odd.json"
        track = self.root / "latin tracks" / odd
        shutil.copytree(self.song, track)
        (track / "bass.wav").rename(track / f"{odd}.wav")
        done = self.evaluate(track.parent, track.parent, "--stems", f"vocals,{odd}", "--metrics", "nsdr", "--json", result,
                             "--museval", self.root / "latin scores", errors="surrogateescape")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(list(json.loads(result.read_text())["tracks"]), ["caf\ufffd"])
        museval = json.loads((self.root / "latin scores" / f"{odd}.json").read_text())
        self.assertEqual([target["name"] for target in museval["targets"]], ["vocals", "caf\ufffd"])
        config = self.root / f"{odd}.json"
        config.write_text(json.dumps(CONFIG))
        done = run("plan", "--config", config, "--sweep", "batch_size=1", "--json", result, errors="surrogateescape")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(json.loads(result.read_text())["rows"][0]["configuration"], "caf\ufffd")

    def test_evaluate_refuses_what_does_not_fit(self):
        short = self.root / "short"
        for stem in STEMS:
            write_wav(short / f"{stem}.wav", [0] * 100)
        self.fails(run("evaluate", "--reference", self.song, "--estimate", short), "100", str(self.frames))
        self.fails(run("evaluate", "--reference", self.song, "--estimate", self.root / "nowhere"), "nowhere")
        self.fails(self.evaluate(short, short, "--metrics", "nsdr,l1_freq", "--museval", self.root / "never"),
                   "headroom.evaluate.length", "short/vocals.wav", "needs 1025")
        self.assertFalse((self.root / "never").exists())

    def evaluate(self, reference, estimate, *arguments, **options):
        return run("evaluate", "--reference", reference, "--estimate", estimate, *arguments, **options)

    def test_evaluate_scores_what_is_asked_for(self):
        estimates, out = self.root / "two estimates", self.root / "scores"
        for track in ["A - One", "B - Two"]:  # each stem is its mixture's half; the first track has silence in drums
            for stem in STEMS:
                _, samples = samples_of(self.root / "data/train" / track / "mixture.wav")
                silent = stem == "drums" and track == "A - One"
                write_wav(estimates / track / f"{stem}.wav", [0 if silent else s // 2 for s in samples[::2]])
        arguments = [self.root / "data/train", estimates, "--metrics", "all", "--museval", out / "train", "--json",
                     self.root / "all.json"]
        runs = [self.evaluate(*arguments, "--threads", threads) for threads in (1, 2)]
        self.assertEqual(runs[0].returncode, 0, runs[0].stderr)
        self.assertEqual(runs[0].stdout, runs[1].stdout)
        self.assertIn("A - One: the estimate of drums is silent", runs[0].stderr)
        self.assertIn("A - One: BSSEval leaves out 1 of 1 frames", runs[0].stderr)
        scores = json.loads((self.root / "all.json").read_text())
        self.assertIsNone(scores["tracks"]["A - One"]["sdr"]["drums"])
        self.assertIsNone(scores["tracks"]["A - One"]["si_sdr"]["drums"])
        self.assertEqual(scores["sdr"], scores["tracks"]["B - Two"]["sdr"])  # the median of one track
        first, second = (scores["tracks"][track]["l1_freq"]["bass"] for track in ["A - One", "B - Two"])
        self.assertAlmostEqual(scores["l1_freq"]["bass"], (first + second) / 2)
        museval = json.loads((out / "train/B - Two.json").read_text())
        self.assertEqual([target["name"] for target in museval["targets"]], STEMS)
        frame = museval["targets"][0]["frames"][0]
        self.assertEqual((frame["time"], frame["duration"], len(frame["metrics"])), (0, 1, 4))
        self.assertAlmostEqual(frame["metrics"]["SDR"], scores["sdr"]["vocals"], places=8)
        self.assertIn('"SDR": NaN', (out / "train/A - One.json").read_text())

        self.fails(self.evaluate(*arguments[:2], "--metrics", "sisdr"), "headroom.evaluate.metrics", "si_sdr?")
        self.fails(self.evaluate(*arguments[:2], "--museval", self.root / "config.json"), "headroom.evaluate.json")
        (out / "train/B - Two.json").write_text("precious")
        self.fails(self.evaluate(*arguments[:6], preexec_fn=lambda: small_files(100)), "headroom.evaluate.json")
        self.assertEqual((out / "train/B - Two.json").read_text(), "precious")
        self.assertFalse(list(out.glob("train/*.partial")))

        cut = estimates / "B - Two/bass.wav"
        cut.write_bytes(cut.read_bytes()[:-10000])
        (self.root / "all.json").unlink()
        self.fails(self.evaluate(*arguments), "headroom.audio.file.truncated", "bass.wav")
        self.assertFalse((self.root / "all.json").exists())

    def test_evaluate_equals_museval_on_a_real_track(self):
        track = find_sample_track()
        if track is None:
            self.skipTest("skipped: set HEADROOM_SAMPLE_DATA to a folder in the MUSDB18-HQ layout")
        write_sample_estimates(track, self.root / "sample")
        result = self.evaluate(track, self.root / "sample", "--museval", self.root / "museval")
        self.assertEqual(result.returncode, 0, result.stderr)
        found = json.loads((self.root / f"museval/{track.name}.json").read_text())
        expected = json.loads((Path(__file__).parent / "museval_sample.json").read_text())
        for target in found["targets"]:
            for frame, metrics in zip(target["frames"], expected[target["name"]], strict=True):
                for name, value in metrics.items():
                    self.assertAlmostEqual(frame["metrics"][name], value, delta=1e-6)

    def separate(self, *arguments):
        return run("separate", "--model", self.model, *arguments)

    def long_separation(self, out, **options):
        """A separation that takes many segments, once its first temporary files are there."""
        song = self.root / "long.wav"
        if not song.exists():
            write_wav(song, [0] * 4_000_000)
        process = start("separate", "--model", self.model, "--threads", 1, song, out, **options)
        while not list(out.glob("*.partial")) and process.poll() is None:
            time.sleep(0.01)
        return process

    def test_signals_end_separate_and_leave_nothing(self):
        for number in [signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGQUIT, signal.SIGTERM]:
            out = self.root / f"signal {number}"
            process = self.long_separation(out, stderr=subprocess.PIPE, text=True)
            process.send_signal(number)
            _, text = process.communicate()
            self.assertEqual(process.returncode, 128 + number, text)
            self.assertIn("headroom.separate.interrupted", text)
            self.assertFalse(out.exists())
        # Nobody reads what it prints; and a second signal, before the first was seen, ends it at once
        out = self.root / "two signals"
        process = self.long_separation(out, stderr=subprocess.DEVNULL)
        process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        self.assertLess(process.wait(), 0)
        self.assertEqual(list(out.iterdir()), [])

    def test_stems_are_written_all_or_none_and_replaced_when_told(self):
        out = self.root / "all or none"
        (out / "other.wav").mkdir(parents=True)
        self.fails(self.separate(self.song / "mixture.wav", out), "headroom.separate.exists", "other.wav")
        self.fails(self.separate(self.song / "mixture.wav", out, "--overwrite"), "headroom.audio.file.write",
                   "it is a folder")
        self.assertEqual([path.name for path in out.iterdir()], ["other.wav"])
        track = self.root / "true stems"
        shutil.copytree(self.song, track)
        self.fails(self.separate(track / "mixture.wav", track), "headroom.separate.exists", "--overwrite")
        self.assertEqual((track / "bass.wav").read_bytes(), (self.song / "bass.wav").read_bytes())
        again = self.separate(track / "mixture.wav", track, "--overwrite")
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertNotEqual((track / "bass.wav").read_bytes(), (self.song / "bass.wav").read_bytes())

    def test_progress_text_goes_into_no_file(self):
        arguments = ["--model", self.model, self.song / "mixture.wav"]
        self.assertEqual(run("separate", *arguments, self.root / "open").returncode, 0)
        command = " ".join(f"'{a}'" for a in [TOOLS / "separate", *arguments, self.root / "closed"])
        self.assertEqual(subprocess.run(["sh", "-c", command + " <&- >&- 2>&-"], timeout=300).returncode, 0)
        for stem in STEMS:
            self.assertEqual((self.root / "open" / f"{stem}.wav").read_bytes(),
                             (self.root / "closed" / f"{stem}.wav").read_bytes())

    def test_results_survive_a_full_disk(self):
        config, result = self.root / "full.json", self.root / "precious.json"
        config.write_text(json.dumps(CONFIG))
        for tool, arguments in [("plan", ["--config", config]),
                                ("evaluate", ["--reference", self.song, "--estimate", self.song])]:
            result.write_text("precious")
            full = run(tool, *arguments, "--json", result, preexec_fn=lambda: small_files(100))
            self.fails(full, f"headroom.{tool}." + ("output" if tool == "plan" else "json"), "precious.json")
            self.assertEqual(result.read_text(), "precious")
            self.assertFalse(result.with_name("precious.json.partial").exists())
            self.fails(run(tool, *arguments, "--json", self.root), "it is a folder")
            self.fails(run(tool, *arguments, "--json", self.root / "no/such.json"), "there is no folder")
            self.fails(run(tool, *arguments, "--json", ""), "empty path", code=2)
            printed = run(tool, *arguments, "--json", "/dev/stdout")
            self.assertEqual(printed.returncode, 0, printed.stderr)
            self.assertIn('{\n', printed.stdout)
            if os.path.exists("/dev/full"):
                with open("/dev/full", "w") as nowhere:
                    self.fails(subprocess.run([TOOLS / tool, *map(str, arguments)], stdout=nowhere, text=True,
                                              stderr=subprocess.PIPE), "headroom.tools.output")

    def test_an_earlier_run_is_not_lost_by_a_slip(self):
        arguments = ["--config", self.root / "config.json", "--data", self.root / "data", "--steps", 2, "--out"]
        out = self.root / "used"
        self.assertEqual(run("train", *arguments, out).returncode, 0)
        before = (out / "last.pt").read_bytes()
        self.fails(run("train", *arguments, out), "headroom.train.used", "--overwrite")
        self.fails(run("train", *arguments, out, "--resume", ""), "--resume", "empty path", code=2)
        self.fails(run("train", *arguments, out, "--resume", self.model), "headroom.train.used")
        self.assertEqual((out / "last.pt").read_bytes(), before)
        for more in [["--resume", out / "last.pt"], ["--overwrite"]]:
            result = run("train", *arguments, out, *more)
            self.assertEqual(result.returncode, 0, result.stderr)
        # Two at once: the second one is refused, the lock ends with its owner
        shared = self.root / "shared"
        first = start("train", *arguments[:-3], "--steps", 1000000, "--out", shared, stdout=subprocess.DEVNULL)
        while not (shared / "last.pt").exists() and first.poll() is None:
            time.sleep(0.01)
        self.fails(run("train", *arguments, shared, "--overwrite"), "headroom.train.locked")
        first.kill()
        first.wait()
        self.assertEqual(run("train", *arguments, shared, "--overwrite").returncode, 0)

    def test_numbers_are_numbers(self):
        training = ["--config", self.root / "config.json", "--data", self.root / "data", "--out", self.root / "never"]
        for option, value in [("--seconds", "nan"), ("--seconds", "inf"), ("--seconds", "0"), ("--steps", "1.5"),
                              ("--steps", "99999999999999999999"), ("--steps", "-1"), ("--threads", "1000000"),
                              ("--threads", "")]:
            result = run("train", *training, f"{option}={value}")
            self.fails(result, option, code=2)
            self.assertLess(len(result.stderr), 300)
        for value in ["inf", "nan", "0", "-5GiB", "1e300", "9" * 400, "0x10", "5 parsecs", "1.5.2MB"]:
            self.fails(run("train", *training, f"--budget={value}"), "headroom.tools.bytes")
        for value in ["1", "-0.1", "nan", "x"]:
            self.fails(self.separate(self.song / "mixture.wav", self.root / "never", f"--overlap={value}"), "--overlap",
                       code=2)
        for value in ["batch_size=nan,1", "batch_size=1..inf", "segment_length=1e300s,2"]:
            self.fails(run("plan", "--config", self.root / "config.json", "--sweep", value), "headroom.training.sweep")
        for value in ["nanx3s", "1xinf", "1x1e400", "0x10x3"]:
            self.fails(run("plan", "--config", self.root / "config.json", "--bucket", value),
                       "headroom.training.bucket")
        self.assertFalse((self.root / "never").exists())

    def test_memory_that_runs_out_is_explained(self):
        config = self.root / "large.json"  # more than any machine has, by the plan
        config.write_text(json.dumps({**CONFIG, "training": {**CONFIG["training"], "batch_size": 1000000}}))
        arguments = ["--config", config, "--data", self.root / "data", "--out", self.root / "large", "--threads", 2]
        self.fails(run("train", *arguments), "headroom.train.memory", "--fit")
        result = run("train", *arguments, "--unplanned", preexec_fn=lambda: little_memory(3 << 30))
        self.fails(result, "headroom.tools.memory", "training.batch_size")
        self.assertIn("this fits (the same training)", result.stdout)

    def test_separate_warns_when_segments_do_not_fade(self):
        result = self.separate(self.song / "mixture.wav", self.root / "edges", "--overlap", 0)
        self.assertEqual(result.returncode, 0)
        self.assertIn("without overlap", result.stderr)

    def test_inputs_that_are_no_files(self):
        deep = self.root / "deep.json"
        deep.write_text('{"x": ' + "[" * 100000 + "]" * 100000 + "}")
        self.fails(run("plan", "--config", deep), "headroom.training.json", "x[0]")
        os.mkfifo(self.root / "pipe")
        for path, reason in [(self.root, "it is a folder"), ("/dev/null", "it is a device"),
                             (self.root / "pipe", "nobody writes to"), (self.root / "none", "no such file")]:
            self.fails(run("plan", "--config", path), "headroom.training.config_file", reason)
            if path != self.root:
                self.fails(self.separate(path, self.root / "no input"), "headroom.audio.file.missing", reason)
        config = (self.root / "config.json").read_text()
        read = subprocess.run([TOOLS / "plan", "--config", "-"], input=config, capture_output=True, text=True)
        self.assertEqual(read.returncode, 0, read.stderr)
        for name in ["-", "/dev/stdin"]:
            out = self.root / "piped" / name.strip("/-")
            with open(self.song / "mixture.wav", "rb") as song:
                piped = subprocess.run([TOOLS / "separate", "--model", self.model, name, out], input=song.read(),
                                       capture_output=True)
            self.assertEqual(piped.returncode, 0, piped.stderr)
            self.assertEqual(read_wav(out / "bass.wav"), (self.frames, 2, RATE))

    def test_nothing_that_was_given_is_replaced(self):
        config, stem = self.root / "config.json", self.song / "bass.wav"
        before = stem.read_bytes(), config.read_bytes()
        self.fails(run("evaluate", "--reference", self.song, "--estimate", self.song, "--json", stem),
                   "headroom.evaluate.json", "bass.wav")
        self.fails(run("plan", "--config", config, "--json", config), "headroom.plan.output", "it would be replaced")
        self.assertEqual((stem.read_bytes(), config.read_bytes()), before)
        self.fails(run("plan", "--config", config, config), "headroom.plan.configs", "got 2")
        self.fails(run("evaluate", "--reference", self.song, "--estimate", self.song, "--stems", "bass,bass"),
                   "headroom.evaluate.stems", "twice")

    def test_a_limit_on_file_sizes_is_an_error(self):
        out = self.root / "limited"
        result = run("separate", "--model", self.model, "--stems", "bass", self.song / "mixture.wav", out,
                     preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)))
        self.fails(result, "headroom.audio.file.write")
        self.assertFalse(out.exists())

    def test_recordings_that_differ_in_their_extension(self):
        folder = self.root / "twins"
        for name in ["a.wav", "a.flac"]:
            write_wav(folder / name, [1000, -1000] * 3000)
        self.fails(self.separate("--stems", "bass", folder, self.root / "one"), "headroom.separate.name", "{ext}")
        result = self.separate("--stems", "bass", folder, self.root / "both", "--name", "{track}.{ext} {stem}")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(sorted(p.name for p in (self.root / "both").iterdir()), ["a.flac bass.wav", "a.wav bass.wav"])

    def test_a_track_needs_no_mixture(self):
        data = self.root / "no mixture"
        for track in ["train/A - One", "train/B - Two"]:
            shutil.copytree(self.root / "data" / track, data / track)
            (data / track / "mixture.wav").unlink()
        (data / "train/__MACOSX/A - One").mkdir(parents=True)
        for stem in STEMS:
            write_wav(data / "train/C - Short" / f"{stem}.wav", [1] * 100)
        result = run("train", "--config", self.root / "config.json", "--data", data, "--out", self.root / "summed",
                     "--steps", 1)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("C - Short is left out: it has 100 frames", result.stdout)
        self.assertIn("__MACOSX is left out", result.stdout)
        track = data / "train/A - One"
        scores = [run("evaluate", "--reference", reference, "--estimate", track).stdout.splitlines()[-1]
                  for reference in [track, self.root / "data/train/A - One"]]
        self.assertEqual(scores[0], scores[1])
        self.fails(run("evaluate", "--reference", track, "--estimate", track, "--stems", "../x"),
                   "headroom.evaluate.stems")

    def test_data_sets_of_other_layouts(self):
        more = self.root / "more"
        for stem in STEMS:
            write_wav(more / "train" / stem / "any.wav", [1000, -1000] * 5000)
        (self.root / "list.csv").write_text("instrum,path\n" + "".join(f"{s},more/train/{s}/any.wav\n" for s in STEMS))
        config = self.root / "layouts.json"
        arguments = ["--config", config, "--data", self.root / "data", "--out", self.root / "layouts", "--steps", 2]
        data = {"more_paths": [str(more), str(self.root / "list.csv")], "weights": [1, 1, 2], "equalizer": 1,
                "noise": 1}
        config.write_text(json.dumps({**CONFIG, "data": data}))
        result = run("train", *arguments)
        self.assertEqual(result.returncode, 0, result.stderr)
        tracks = len(list((self.root / "data/train").iterdir())) + 2 * len(STEMS)
        self.assertRegex(result.stdout, rf"data: +{tracks} tracks, ")
        self.assertRegex(result.stdout, rf"data: +{STEMS[0]}: {tracks - 2 * len(STEMS) + 2} files; of ")
        config.write_text(json.dumps({**CONFIG, "data": {**data, "remix": 0}}))
        self.assertEqual(run("train", *arguments, "--overwrite").returncode, 0)  # of the tracks alone
        self.fails(run("train", "--config", config, "--data", self.root / "list.csv", "--out", self.root / "loose"),
                   "headroom.training.dataset.loose", "data.remix")

    def test_the_process_grows_as_planned(self):
        """The highest resident size of training: within 5 % and 30 MB of the plan."""
        config, plan = self.root / "resident.json", self.root / "resident.out.json"
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        for policy in ["none", "full", "tiled+offload"]:
            model = {"n_fft": 1024, "hop_length": 256, "n_layers": 2, "emb_dim": 32, "n_heads": 4,
                     "ffn_hidden_dim": [128, 128], "gradient_checkpointing": policy}
            training = {**CONFIG["training"], "segment_length": 16384}
            config.write_text(json.dumps({**CONFIG, "model": model, "training": training}))
            self.assertEqual(run("plan", "--config", config, "--json", plan).returncode, 0)
            planned = json.loads(plan.read_text())
            self.assertGreater(planned["occupied_bytes"], planned["reserved_bytes"])
            resident = peak_resident_bytes("train", "--config", config, "--data", self.root / "data", "--out",
                                           self.root / f"resident {policy}", "--steps", "2", environment=environment)
            self.assertLess(abs(resident - planned["occupied_bytes"]), 0.05 * planned["occupied_bytes"] + 30e6, policy)

    def test_planning_takes_little_memory(self):
        # Three times as deep as the guide's largest, so that the trace is long
        largest = (CONFIGS / "musdb18_xlarge.json").read_text()
        self.assertIn('"n_layers": 12,', largest)
        config, trace = self.root / "largest.json", self.root / "largest.trace"
        config.write_text(largest.replace('"n_layers": 12,', '"n_layers": 36,'))
        self.assertLess(peak_resident_bytes("plan", "--config", config, "--trace", trace, code=3), 200e6)
        self.assertGreater(trace.stat().st_size, 50e6)

    def test_plan(self):
        config = self.root / "plan.json"
        config.write_text(json.dumps(CONFIG))
        files = [self.root / f"plan{suffix}" for suffix in (".out.json", ".trace", ".html")]
        result = run("plan", "--config", config, "--device", "rtx-4060-8gb", "--json", files[0], "--trace", files[1],
                     "--html", files[2])
        self.assertEqual(result.returncode, 0, result.stderr)
        plan = json.loads(files[0].read_text())
        self.assertTrue(plan["fits"])
        self.assertEqual(sum(plan["parts"].values()), plan["peak_bytes"])
        self.assertGreaterEqual(plan["reserved_bytes"], plan["peak_bytes"])
        self.assertGreaterEqual(plan["peak_bytes"], plan["largest_allocation"]["bytes"])
        events = json.loads(files[1].read_text())["traceEvents"]
        live = max(sum(e["args"].values()) for e in events if e["ph"] == "C")
        self.assertEqual(live, plan["peak_bytes"])
        self.assertIn("<svg", files[2].read_text())
        self.assertNotIn("http", files[2].read_text())
        snapshot = self.root / "plan.pickle"
        self.assertEqual(run("plan", "--config", config, "--snapshot", snapshot).returncode, 0)
        self.assertEqual(pickle.loads(snapshot.read_bytes())["segments"][0]["device"], 0)
        full = run("plan", "--config", config, "--budget", "100KB", "--recommend")
        self.assertEqual(full.returncode, 3, full.stderr)
        self.assertIn("out of memory:", full.stdout)
        length = CONFIG["training"]["segment_length"]
        table = self.root / "buckets.json"
        buckets = run("plan", "--config", config, "--bucket", f"3x{2 * length}", "1x0.1s", "--json", table)
        self.assertEqual(buckets.returncode, 0, buckets.stderr)
        self.assertRegex(buckets.stdout, rf"3x{2 * length} .*makes the peak\n +1x4410 ")
        rows = json.loads(table.read_text())
        self.assertEqual([row["segment_length"] for row in rows["buckets"]], [2 * length, 4410])
        self.assertEqual(rows["buckets"][0]["peak_bytes"], rows["peak_bytes"])
        self.assertGreater(rows["peak_bytes"], plan["peak_bytes"])
        self.fails(run("plan", "--config", config, "--bucket", "3 of 1s"), "headroom.training.bucket", "8x3s")
        self.fails(run("plan", "--config", config, "--bucket", "1x1s", "--sweep", "batch_size=1,2"), code=2)
        self.fails(run("plan", "--config", config, "--device", "rtx"), "headroom.memory.device_name")
        self.fails(run("plan", "--config", config, "--budget", "much"), "headroom.tools.bytes")
        self.fails(run("plan", "--config", config, "--budget", "1B"), "headroom.memory.plan.budget")

    def test_the_same_plan_is_the_same_files(self):
        config = self.root / "same.json"
        config.write_text(json.dumps(CONFIG))
        kinds = ("json", "trace", "html", "snapshot")
        runs = [{kind: self.root / f"same {number}.{kind}" for kind in kinds} for number in range(3)]
        for files in runs:
            paths = [argument for kind, path in files.items() for argument in (f"--{kind}", path)]
            self.assertEqual(run("plan", "--config", config, "--device", "rtx-4060-8gb", *paths).returncode, 0)
        for kind in kinds:
            self.assertEqual(len({files[kind].read_bytes() for files in runs}), 1, kind)

    def test_sweep(self):
        config, table = self.root / "sweep.json", self.root / "table.json"
        config.write_text(json.dumps(CONFIG))
        length = CONFIG["training"]["segment_length"]
        result = run("plan", "--config", config, config, "--sweep", f"segment_length={length}..{3 * length}:3",
                     "--json", table, "--device", "rtx-4060-8gb")
        self.assertEqual(result.returncode, 0, result.stderr)
        rows = json.loads(table.read_text())["rows"]
        self.assertEqual([row["value"] for row in rows[:6]],
                         [v for v in (length, 2 * length, 3 * length) for _ in "ab"])
        self.assertEqual(len(rows), 12)
        for stored, none in zip(rows[::2], rows[1::2]):
            self.assertEqual((stored["attention"], none["attention"]), ("reference", "automatic"))
            self.assertGreater(none["seconds"], 0)
        self.assertEqual(sorted(row["peak_bytes"] for row in rows[1:6:2]), [row["peak_bytes"] for row in rows[1:6:2]])
        single = self.root / "single.json"
        run("plan", "--config", config, "--device", "rtx-4060-8gb", "--json", single)
        self.assertEqual(json.loads(single.read_text())["peak_bytes"], rows[1]["peak_bytes"])
        self.assertEqual(result.stdout.count("\n"), 2 + 6)
        self.fails(run("plan", "--config", config, "--sweep", "segment=1,2"), "headroom.training.sweep", "segment")

    def write_mixture(self, channels=None):
        """What tests/tools/published_reference.py gave to the Python models, or other channels."""
        path = self.root / "published.wav"
        write_samples(path, [s for pair in zip(*(channels or published_reference.mixture())) for s in pair])
        return path

    def test_published_weights_give_the_stems_of_the_python_package(self):
        song = self.write_mixture()
        for name, stems in [("bs", ["vocals"]), ("mel", ["vocals", "other"])]:
            config, weights = PUBLISHED / f"{name}.yaml", PUBLISHED / f"{name}.ckpt"
            out = self.root / f"stems of {name}"
            self.assertEqual(config.read_text(), published_reference.FILES[name])
            result = run("separate", "--config", config, "--weights", weights, song, out, "--format", "wav32f")
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertIn("without effect here: audio.dim_f, ", result.stderr)
            expected = array.array("f", (PUBLISHED / f"{name}.f32").read_bytes())
            found = array.array("f")
            for stem in stems:
                found += read_floats(out / f"{stem}.wav")
            self.assertEqual(len(found), len(expected))
            self.assertLess(max(abs(a - b) for a, b in zip(found, expected)), 1e-5)
            self.assertGreater(max(map(abs, expected)), 1e-2)
            planned = run("plan", "--config", config)
            self.assertEqual(planned.returncode, 0, planned.stderr)
            self.assertIn(f"{name}.yaml: without effect here: audio.dim_f, ", planned.stdout)

    def test_a_checkpoint_of_demucs_gives_the_stems_of_demucs(self):
        song, out = self.write_mixture(demucs_reference.mixture()), self.root / "stems of demucs"
        for model, stems, options in [("tiny.th", "tiny.f32", []), ("tiny.th", "shifts.f32", ["--shifts", 2]),
                                      ("bag.yaml", "bag.f32", ["--overlap", 0.25])]:
            arguments = ["--like", "demucs", song, out, "--format", "wav32f", "--overwrite", *options]
            result = run("separate", "--model", DEMUCS / model, *arguments)
            self.assertEqual(result.returncode, 0, result.stderr)
            expected = array.array("f", (DEMUCS / stems).read_bytes())
            found = read_floats(out / "drums.wav") + read_floats(out / "vocals.wav")
            self.assertEqual(len(found), len(expected))
            self.assertLess(max(abs(a - b) for a, b in zip(found, expected)), 1e-6)
            self.assertGreater(max(map(abs, expected)), 1e-2)

    def test_of_a_bag_of_demucs_only_the_models_of_wanted_stems_are_read(self):
        song, bag = self.write_mixture(demucs_reference.mixture()), self.root / "bag"
        shutil.copytree(DEMUCS, bag)
        arguments = ["--like", "demucs", song, self.root / "stems of a bag", "--overwrite", "--stems"]
        (bag / "tiny.th").write_bytes((DEMUCS / "tiny.th").read_bytes().replace(b"data/1", b"data/x"))
        self.assertEqual(run("separate", "--model", bag / "bag.yaml", *arguments, "vocals").returncode, 0)
        damaged = run("separate", "--model", bag / "bag.yaml", *arguments, "drums")
        self.fails(damaged, "tiny.th")
        named = run("separate", "--model", DEMUCS / "bag.yaml", *arguments, "vocals", "--name", "{model} {stem}")
        self.assertEqual(named.returncode, 0, named.stderr)
        self.assertTrue((self.root / "stems of a bag/bag vocals.wav").exists())
        self.fails(run("separate", "--model", DEMUCS / "bag.yaml", *arguments, "vocal"), "did you mean \"vocals\"?")

    def test_a_bag_of_demucs_takes_no_configuration_and_leaves_it_to_the_others(self):
        song, bag, config = self.write_mixture(demucs_reference.mixture()), DEMUCS / "bag.yaml", self.root / "tiny.json"
        others = ["--like", "demucs", song, self.root / "stems of a bag and others", "--overwrite"]
        config.write_text("{}")
        self.fails(run("separate", "--model", bag, "--config", config, *others), "[headroom.separate.configs]",
                   "for a bag")
        others = ["--model", DEMUCS / "tiny.th", "--config", config, *others]
        self.fails(run("separate", "--model", bag, *others), "tiny.json")  # which is read for tiny.th
        self.fails(run("separate", "--model", bag, "--config", config, *others),
                   "got 2 configurations for 1 models that are no bags")

    def test_a_model_of_a_bag_that_counts_for_no_stem_is_left_out(self):
        song, bag = self.write_mixture(demucs_reference.mixture()), self.root / "bag with zeros"
        shutil.copytree(DEMUCS, bag)
        (bag / "bag.yaml").write_text("models: ['tiny', 'third']\nweights: [[0., 0.], [1., 1.]]\n")
        for stems in [["drums", "vocals"], ["vocals"]]:
            found = []
            for model in ["bag.yaml", "third.th"]:
                out = self.root / f"{len(stems)} stems of {model}"
                only = ["--stems", *stems] if len(stems) == 1 else []
                result = run("separate", "--model", bag / model, "--like", "demucs", song, out, "--format", "wav32f",
                             *only)
                self.assertEqual(result.returncode, 0, result.stderr)
                self.assertEqual(sorted(path.stem for path in out.iterdir()), stems)
                found.append([read_floats(out / f"{stem}.wav") for stem in stems])
            self.assertEqual(*found)
            self.assertGreater(max(map(abs, found[0][0])), 1e-2)

    def test_a_model_of_a_bag_draws_the_same_silences_whichever_models_are_left_out(self):
        song, bag = self.write_mixture(demucs_reference.mixture()), self.root / "bag of shifts"
        shutil.copytree(DEMUCS, bag)
        (bag / "bag.yaml").write_text("models: ['tiny', 'third']\nweights: [[1., 0.], [0., 1.]]\n")
        found = []
        for only in [[], ["--stems", "vocals"]]:
            out = self.root / f"silences {len(only)}"
            result = run("separate", "--model", bag / "bag.yaml", "--like", "demucs", "--shifts", 2, song, out,
                         "--format",
                         "wav32f", *only)
            self.assertEqual(result.returncode, 0, result.stderr)
            found.append(read_floats(out / "vocals.wav"))
        self.assertEqual(*found)

    def test_a_published_file_may_ask_for_a_level_and_a_batch(self):
        song, config, leveled = self.write_mixture(), self.root / "leveled.yaml", self.root / "leveled.wav"
        config.write_text((PUBLISHED / "bs.yaml").read_text().replace("inference:\n",
                                                                     "inference:\n  normalize: true\n"))
        left, right = ([s / 32768 for s in channel] for channel in published_reference.mixture())
        mono = [(a + b) / 2 for a, b in zip(left, right)]
        mean = sum(mono) / len(mono)
        deviation = math.sqrt(sum((s - mean) ** 2 for s in mono) / len(mono))
        write_floats(leveled, [(s - mean) / deviation for pair in zip(left, right) for s in pair])
        stems = []
        for name, used, recording in [("asked", config, song), ("done", PUBLISHED / "bs.yaml", leveled)]:
            out = self.root / f"level {name}"
            result = run("separate", "--config", used, "--weights", PUBLISHED / "bs.ckpt", recording, out, "--format",
                         "wav32f")
            self.assertEqual(result.returncode, 0, result.stderr)
            stems.append(read_floats(out / "vocals.wav"))
        self.assertLess(max(abs(a - (b * deviation + mean)) for a, b in zip(*stems, strict=True)), 1e-5)

        long = self.root / "batched.wav"
        write_wav(long, [0] * 800_000)
        arguments = ["--model", self.model, "--stems", "bass", "--overwrite", long, self.root / "batched"]
        one = peak_resident_bytes("separate", *arguments)
        config = self.root / "batched.json"
        config.write_text(json.dumps({**CONFIG, "inference": {"batch": 200}}))
        self.assertGreater(peak_resident_bytes("separate", *arguments, "--config", config), one + 50e6)

    def test_published_weights_are_trained_further(self):
        song, out = self.write_mixture(), self.root / "finetuned"
        arguments = ["--data", self.root / "data", "--out", out, "--steps", 2, "--threads", 1]
        config, weights = PUBLISHED / "bs.yaml", PUBLISHED / "bs.ckpt"
        result = run("train", "--config", config, "--weights", weights, *arguments)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertRegex(result.stdout, r"weights:  \d+ of the model's \d+ tensors from \S+bs.ckpt\n")
        self.assertEqual(json.loads((out / "config.json").read_text())["data"]["accompaniment"],
                         ["drums", "bass", "other"])
        # The weights alone have their configuration with them, and are those of the saved state
        for name in ["last", "best"]:
            for file in [f"{name}.pt", f"{name}.safetensors"]:
                separated = run("separate", "--model", out / file, song, self.root / file)
                self.assertEqual(separated.returncode, 0, separated.stderr)
            self.assertEqual((self.root / f"{name}.pt/vocals.wav").read_bytes(),
                             (self.root / f"{name}.safetensors/vocals.wav").read_bytes())
        header = (out / "last.safetensors").read_bytes()
        header = json.loads(header[8:8 + int.from_bytes(header[:8], "little")])
        metadata = header["__metadata__"]
        self.assertEqual((metadata["format"], metadata["headroom.step"]), ("pt", "2"))
        self.assertEqual(json.loads(metadata["headroom.config"])["model"]["type"], "bs_roformer")
        self.assertIn("final_norm.gamma", header)
        again = run("train", "--config", config, "--weights", out / "best.safetensors", *arguments, "--overwrite")
        self.assertEqual(again.returncode, 0, again.stderr)

    def test_weights_of_another_model_are_refused_with_the_keys_to_look_at(self):
        song, config = self.write_mixture(), self.root / "other.yaml"
        config.write_text((PUBLISHED / "bs.yaml").read_text().replace("depth: 1\n  stereo", "depth: 3\n  stereo"))
        arguments = ["--config", config, "--weights", PUBLISHED / "bs.ckpt"]
        self.fails(run("separate", *arguments, song, self.root / "never"), "headroom.training.weights",
                   "\n  model.depth: the weights have 1, the configuration 3", 'missing in the file: "layers.1.0.')
        self.fails(run("separate", "--config", PUBLISHED / "mel.yaml", "--weights", PUBLISHED / "bs.ckpt", song,
                       self.root / "never"), 'model.type: the weights have "bs_roformer"',
                   "number of stems (audio.stems, or model.num_stems with training.instruments): the weights have 1")
        self.fails(run("separate", "--weights", PUBLISHED / "bs.ckpt", song, self.root / "never"), "--config")
        train = ["--data", self.root / "data", "--out", self.root / "partial", "--steps", 1]
        self.fails(run("train", *arguments, *train), "headroom.training.weights", "--allow-partial")
        result = run("train", *arguments, *train, "--allow-partial")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn('missing in the file: "layers.1.0.', result.stdout)
        self.fails(run("train", *arguments, *train, "--resume", self.model), "--resume", code=2)
        self.assertFalse((self.root / "never").exists())

    def test_usage(self):
        for tool in ["train", "separate", "evaluate", "plan"]:
            self.assertEqual(run(tool, "--help").returncode, 0)
            self.fails(run(tool, "--no-such-option"), code=2)


unittest.main()
