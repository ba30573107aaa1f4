"""Every call of a tool that changes a file fails once, every one that gets memory for tensors, and what else gets
memory, once at each place: on a full disk, on a dying one, with too little memory. A tool then says so and leaves whole
files or none; writes that are cut short are continued. Left out are places in the headers of LibTorch, which may end
the program when it has no memory for a graph or a dictionary (of save_state, where they are inlined), and of
nlohmann_json, whose destructor takes memory, and what glibc ends the program for.

Usage: failing.py <folder with the tools> <failing_calls library> [<points>]

<points>: so many calls of each kind, default all
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from sample_track import CONFIG, write_noise_tracks

POINTS = int(sys.argv.pop(3)) if len(sys.argv) > 3 else None
LIBRARY = Path(sys.argv.pop(2)).resolve()
TOOLS = Path(sys.argv.pop(1)).resolve()
REASONS = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}


class Failing(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.root = Path(cls.temporary.name)
        write_noise_tracks(cls.root / "data", ["train/A", "valid/B"])
        cls.song = cls.root / "data/valid/B/drums.wav"
        (cls.root / "config.json").write_text(json.dumps(CONFIG))
        cls.out = cls.root / "out"
        assert cls.run_tool("train", *cls.train_arguments(cls)).returncode == 0
        shutil.move(cls.out, cls.root / "run")

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def train_arguments(self):
        return ["--config", self.root / "config.json", "--data", self.root / "data", "--out", self.out,
                "--threads", 1]

    def separate_arguments(self):
        return ["--model", self.root / "run/last.pt", "--format", "flac16", "--threads", 1, self.song, self.out]

    @staticmethod
    def run_tool(tool, *arguments, **settings):
        environment = {**os.environ, **{f"HEADROOM_{name}": str(value) for name, value in settings.items()}}
        if settings:
            environment["LD_PRELOAD"] = str(LIBRARY)
        return subprocess.run([TOOLS / tool, *map(str, arguments)], capture_output=True, text=True,
                              timeout=120, env=environment)

    def function_at(self, tool, place):
        """The name of the program's function that got no memory."""
        table = subprocess.run(["nm", "-C", "--defined-only", "--numeric-sort", TOOLS / tool],
                               capture_output=True, text=True)
        name = "unknown"
        for line in table.stdout.splitlines():
            address, _, function = line.split(" ", 2)
            if int(address, 16) > int(place.read_text()):
                break
            name = function
        return name

    def files(self):
        return {path.relative_to(self.out).as_posix(): path.read_bytes()
                for path in self.out.rglob("*") if path.is_file()}

    def clear(self, tool):
        shutil.rmtree(self.out, ignore_errors=True)
        if tool == "plan":  # the other tools make their folder
            self.out.mkdir()

    def sweep(self, failing, ways, tool, arguments, check):
        """Runs the tool once as it is, then once for each way and call; `check` gets the result and what lies there."""
        calls, place = self.root / "calls", self.root / "place"
        self.clear(tool)
        whole = self.run_tool(tool, *arguments, FAILING=failing, CALLS=calls)
        self.assertEqual(whole.returncode, 0, whole.stderr)
        expected, count = self.files(), int(calls.read_text())
        self.assertGreater(count, 5)
        for way in ways:
            points = min(POINTS or count, count)
            for call in (1 + point * count // points for point in range(points)):
                with self.subTest(tool=tool, way=way, call=call, of=count):
                    self.clear(tool)
                    result = self.run_tool(tool, *arguments, FAILING=failing, FAIL_FROM=call, FAIL_WITH=way,
                                           PLACE=place)
                    left = self.files()
                    if failing == "places" and result.returncode not in (0, 1):
                        function = self.function_at(tool, place)
                        if re.match(r"(c10|at|torch|nlohmann)::|headroom::v0::training::save_state", function):
                            continue
                        if "Fatal glibc error" in result.stderr:
                            continue
                        self.fail(f"{function}: {result.stderr[-2000:]}")
                    self.assertIn(result.returncode, (0, 1), result.stderr[-2000:])
                    self.assertFalse([name for name in left if name.endswith(".partial")], result.stderr)
                    if result.returncode == 1:
                        self.assertRegex(result.stderr, r"\[headroom\.[a-z_.]+\] ")
                        self.assertNotIn("terminate", result.stderr)
                    check(result, left, expected, way)

    def files_are_whole(self, result, left, expected, way):
        for name, content in left.items():
            self.assertEqual(content, expected[name], name)
        if way == "short":
            self.assertEqual(result.returncode, 0, result.stderr)
        if result.returncode == 0:
            self.assertEqual(sorted(left), sorted(expected))
        elif way in REASONS:
            self.assertIn(REASONS[way], result.stderr)

    def plans_are_whole(self, result, left, expected, way):
        if "a.json" in left:  # the process's own size, which is told too, differs from run to run
            self.assertEqual(json.loads(left["a.json"])["peak_bytes"], json.loads(expected["a.json"])["peak_bytes"])
        if "a.html" in left:
            self.assertEqual(left["a.html"][-100:], expected["a.html"][-100:])
        self.assertEqual(result.returncode == 0, sorted(left) == sorted(expected), result.stderr)
        if way == "short":
            self.assertEqual(result.returncode, 0, result.stderr)
        elif result.returncode == 1:
            self.assertIn(REASONS[way], result.stderr)

    def run_is_whole(self, result, left, expected, way):
        for name in ["last.pt", "best.pt", "last.safetensors", "best.safetensors", "config.json"]:
            if name in left:
                self.assertEqual(left[name], expected[name], name)
        for line in left.get("metrics.jsonl", b"").splitlines():
            json.loads(line)
        if way == "short":
            self.assertEqual((result.returncode, sorted(left)), (0, sorted(expected)), result.stderr)
        if result.returncode == 0:
            self.assertIn("last.pt", left)
        elif way in REASONS:
            self.assertIn(REASONS[way], result.stderr)

    def test_the_disk_of_separate(self):
        self.sweep("disk", ["ENOSPC", "EIO", "short"], "separate", self.separate_arguments(), self.files_are_whole)

    def test_the_memory_of_separate(self):
        self.sweep("memory", ["ENOMEM"], "separate", self.separate_arguments(), self.files_are_whole)

    def test_the_places_of_separate(self):
        self.sweep("places", ["ENOMEM"], "separate", self.separate_arguments(), self.files_are_whole)

    def test_the_disk_of_train(self):
        self.sweep("disk", ["ENOSPC", "EIO", "short"], "train", self.train_arguments(), self.run_is_whole)

    def test_the_memory_of_train(self):
        self.sweep("memory", ["ENOMEM"], "train", self.train_arguments(), self.run_is_whole)

    def test_the_places_of_train(self):
        self.sweep("places", ["ENOMEM"], "train", self.train_arguments(), self.run_is_whole)

    def test_the_disk_of_plan(self):
        arguments = ["--config", self.root / "config.json", "--budget", 10**9, "--json", self.out / "a.json", "--html",
                     self.out / "a.html"]
        self.sweep("disk", ["ENOSPC", "EIO", "short"], "plan", arguments, self.plans_are_whole)

    def test_the_memory_of_plan(self):
        self.sweep("memory", ["ENOMEM"], "plan", ["--config", self.root / "config.json"], lambda *_: None)

    def test_the_places_of_plan(self):
        self.sweep("places", ["ENOMEM"], "plan", ["--config", self.root / "config.json"], lambda *_: None)


if __name__ == "__main__":
    unittest.main()
