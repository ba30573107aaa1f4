"""What `train` leaves for those who watch a run: metrics.jsonl, and report.html as a browser lays it out.

Usage: run_page.py <folder with the tools>
"""

import json
import math
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import browser
import sample_track
from sample_track import STEMS, write_noise_tracks

TOOLS = Path(sys.argv.pop(1))
CONVERTER = Path(__file__).parents[2] / "scripts/metrics_to_tensorboard.py"
CONFIG = sample_track.CONFIG | {"training": sample_track.CONFIG["training"] | {
    "batch_size": 2, "steps_per_epoch": 3, "epochs": 3, "validation": "tracks",
    "validation_metrics": ["nsdr", "si_sdr", "bleedless"]}}
MEASURE = """
const box = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
const inside = (a, b) => a[0] >= b[0] - 1 && a[1] >= b[1] - 1 && a[2] <= b[2] + 1 && a[3] <= b[3] + 1;
const luminance = c => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number); return .2126 * r + .7152 * g + .0722 * b; };
const style = getComputedStyle(document.body);
document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth > window.innerWidth,
  loaded: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
  state: document.getElementById("state").innerText,
  contrast: luminance(style.color) - luminance(style.backgroundColor),
  charts: [...document.querySelectorAll("figure")].map(f => ({
    title: f.querySelector("b").innerText,
    last: [...f.querySelectorAll("span")].map(s => s.innerText.trim()),
    marks: [...f.querySelectorAll(".size")].map(t => t.textContent),
    lines: f.querySelectorAll(".line").length,
    inside: [...f.querySelectorAll("svg *")].filter(e => e.getBBox)
      .every(e => inside(box(e), box(f.querySelector("svg")))),
    plotted: [...f.querySelectorAll(".line")].every(l => inside(box(l), box(f.querySelector("rect")))),
  })),
  phases: [...document.querySelectorAll("#phases tr")].map(r => r.innerText.split("\\t")),
  pictures: [...document.querySelectorAll("#pictures img")]
    .map(i => [i.alt, i.complete, i.naturalWidth, i.naturalHeight]),
  heads: [...document.querySelectorAll("#pictures tr:first-child th")].map(t => t.innerText),
});"""


def train(folder, *arguments):
    return subprocess.run([TOOLS / "train", "--config", folder / "config.json", "--data", folder / "data", "--out",
                           folder / "run", *map(str, arguments)], capture_output=True, text=True, timeout=300)


class Run(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.root = Path(cls.temporary.name)
        write_noise_tracks(cls.root / "data", ["train/A", "valid/B", "valid/C"])
        (cls.root / "config.json").write_text(json.dumps(CONFIG))
        cls.first = train(cls.root, "--steps", 5)
        cls.second = train(cls.root, "--resume", cls.root / "run/last.pt")
        cls.lines = [json.loads(line) for line in (cls.root / "run/metrics.jsonl").read_text().splitlines()]

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def lines_of(self, kind):
        return [line for line in self.lines if line["kind"] == kind]

    def test_metrics(self):
        self.assertEqual(self.first.returncode, 0, self.first.stderr)
        self.assertEqual(self.second.returncode, 0, self.second.stderr)
        steps = self.lines_of("step")
        self.assertEqual([line["step"] for line in steps], list(range(1, 10)))
        for line in steps:
            self.assertEqual(list(line["phases"]), ["data", "forward", "loss", "backward", "optimizer"])
            self.assertGreater(line["gradient_norm"], 0)
            self.assertEqual(line["examples"], 2)
            self.assertLessEqual(line["data_seconds"], line["seconds"])
            self.assertLessEqual(max(use["peak_bytes"] for use in line["phases"].values()), line["peak_bytes"])
            self.assertLessEqual(sum(use["seconds"] for use in line["phases"].values()), line["seconds"])
        validations = self.lines_of("validation")
        self.assertEqual([line["step"] for line in validations], [3, 5, 6, 9])  # 5: where the first run ended
        for line in validations:
            self.assertEqual(list(line["scores"]), ["bleedless", "nsdr", "si_sdr"])
            self.assertEqual(list(line["scores"]["nsdr"]), [*STEMS, "mean"])
        summary = json.loads((self.root / "run/summary.json").read_text())
        self.assertEqual(summary["best_score"], max(line["scores"]["nsdr"]["mean"] for line in validations))
        self.assertLessEqual(max(use["peak_bytes"] for use in summary["phases"].values()), summary["peak_bytes"])
        self.assertIn("validation", summary["phases"])
        for text in ["validation nSDR ", "validation SI-SDR ", " dB: vocals ", "memory:   highest in data "]:
            self.assertIn(text, self.second.stdout)

    @browser.needed
    def test_page(self):
        path = self.root / "run/report.html"
        self.assertNotIn("http://", path.read_text(), "a page of its own loads nothing")
        page, errors = browser.measured(path, MEASURE)
        self.assertEqual(errors, [])
        self.assertEqual(page["loaded"], 0)
        self.assertFalse(page["wide"], "it fits into a window 1200 pixels wide")
        self.assertTrue(page["state"].startswith("step 9: ended; written "), page["state"])
        charts = {chart["title"]: chart for chart in page["charts"]}
        self.assertEqual(list(charts), ["Loss of a step", "Validation: nSDR, dB", "Validation: SI-SDR, dB",
                                        "Validation: bleedless, of 100", "Learning rate", "Norm of the gradient",
                                        "Memory: highest in a phase, GiB", "Examples a second",
                                        "Waiting for data, ms a step"])
        for chart in page["charts"]:
            with self.subTest(chart["title"]):
                self.assertTrue(chart["inside"], "nothing is cut off")
                self.assertTrue(chart["plotted"], "lines lie in the plot")
                self.assertGreaterEqual(len(chart["marks"]), 2)
                self.assertEqual(chart["lines"], len(chart["last"]))
        last_step, last_validation = self.lines_of("step")[-1], self.lines_of("validation")[-1]
        number = lambda value: f"{value:.4g}"
        self.assertEqual(charts["Loss of a step"]["last"], ["loss " + number(last_step["loss"])])
        self.assertEqual(charts["Validation: nSDR, dB"]["last"],
                         [f"{stem} {number(score)}" for stem, score in last_validation["scores"]["nsdr"].items()])
        self.assertEqual(charts["Norm of the gradient"]["last"], ["norm " + number(last_step["gradient_norm"])])
        self.assertEqual([row[0] for row in page["phases"]], ["phase", *last_step["phases"]])
        self.assertAlmostEqual(sum(float(row[2].split()[0]) for row in page["phases"][1:]), 100, delta=0.1)

        self.assertEqual(page["heads"], ["", "true", "estimate at step 0", "estimate at step 9"])
        self.assertEqual(len(page["pictures"]), 1 + 3 * len(STEMS))
        for name, complete, width, height in page["pictures"]:
            self.assertEqual((complete, width, height), (True, 240, 96), name)

    @browser.needed
    def test_light_and_dark(self):
        path = self.root / "run/report.html"
        self.assertLess(browser.measured(path, MEASURE)[0]["contrast"], -150)
        dark = browser.measured(path, MEASURE, "--blink-settings=preferredColorScheme=0")[0]
        self.assertGreater(dark["contrast"], 150)

    def test_tensorboard(self):
        out = self.root / "tensorboard"
        result = subprocess.run([sys.executable, CONVERTER, self.root / "run", out], capture_output=True, text=True)
        try:
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        except ImportError:
            self.assertEqual(result.returncode, 1)
            self.assertIn("pip install tensorboard", result.stderr)
            self.skipTest("tensorboard is not installed: what the converter writes was not read")
        self.assertEqual(result.returncode, 0, result.stderr)
        events = EventAccumulator(str(out))
        events.Reload()
        losses = events.Scalars("train/loss")
        self.assertEqual([event.step for event in losses], list(range(1, 10)))
        for event, line in zip(losses, self.lines_of("step")):
            self.assertTrue(math.isclose(event.value, line["loss"], rel_tol=1e-6))
        scores = events.Scalars("validation/nsdr/mean")
        self.assertEqual([event.step for event in scores], [3, 5, 6, 9])


if __name__ == "__main__":
    unittest.main()
