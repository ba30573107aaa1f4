"""The page that `plan --html` writes, as a browser lays it out.

Usage: plan_page.py <folder with the tools>
"""

import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import browser
import sample_track

TOOLS = Path(sys.argv.pop(1))
CONFIG = sample_track.CONFIG | {"training": {"segment_length": 4096, "batch_size": 2}}
# What the browser made of the page, as JSON in its title
MEASURE = """
const box = e => { const b = e.getBBox(); return {left: b.x, top: b.y, right: b.x + b.width, bottom: b.y + b.height}; };
const svg = document.getElementById("timeline"), at = svg.getBoundingClientRect();
const budget = document.getElementById("budget");
document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth > window.innerWidth,
  loaded: performance.getEntriesByType("resource").length,
  verdict: document.getElementById("verdict").innerText,
  uses: Object.fromEntries([...svg.querySelectorAll("path")].map(p => [p.querySelector("title").textContent, box(p)])),
  budget: budget && box(budget).top,
  phases: [...svg.querySelectorAll(".phase")].map(t => [t.textContent, box(t)]),
  sizes: [...svg.querySelectorAll(".size")].map(t => [t.textContent, box(t)]),
  inside: [...svg.querySelectorAll("*")].filter(e => e.getBBox).every(e => {
    const b = e.getBoundingClientRect();
    return b.left >= at.left - 1 && b.right <= at.right + 1 && b.top >= at.top - 1 && b.bottom <= at.bottom + 1;
  }),
  rows: [...document.querySelectorAll("tr")].map(r => r.innerText.split("\\t").map(s => s.trim())),
  tensors: [...document.querySelectorAll("li")].map(l => l.innerText),
  reasons: [...document.querySelectorAll("pre")].map(p => p.innerText),
});"""


@browser.needed
class Page(unittest.TestCase):
    def open(self, *arguments):
        """The plan as JSON and what the browser shows of the page."""
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            config, page, plan = folder / "<tiny> & \"small\".json", folder / "page.html", folder / "plan.out.json"
            config.write_text(json.dumps(CONFIG))
            run = subprocess.run([TOOLS / "plan", "--config", config, "--html", page, "--json", plan, *arguments],
                                 capture_output=True, text=True, timeout=120)
            self.assertIn(run.returncode, (0, 3), run.stderr)
            shown, errors = browser.measured(page, MEASURE)
            self.assertEqual(errors, [])
            return json.loads(plan.read_text()), shown, page.read_text()

    def test_layout(self):
        plan, page, text = self.open()
        self.assertNotIn("http", text, "a page of its own loads nothing")
        self.assertEqual(page["loaded"], 0)
        self.assertFalse(page["wide"], "it fits into a window 1200 pixels wide")
        self.assertTrue(page["inside"], "nothing of the drawing is cut off")
        self.assertIn("fits, peak", page["verdict"])
        self.assertEqual(page["reasons"], [])

    def test_drawing(self):
        plan, page, _ = self.open()
        self.assertEqual(list(page["uses"]), list(plan["parts"]))
        drawn = page["uses"].values()
        bottom = max(box["bottom"] for box in drawn)
        height = bottom - min(box["top"] for box in drawn)
        self.assertAlmostEqual(height, 320 / 1.05, delta=0.5, msg="the highest point is the peak")
        self.assertTrue(all(abs(box["right"] - box["left"] - 999) < 0.5 for box in drawn), "each use from start to end")
        # Parameters lie at the bottom, as high as they are large
        parameters = page["uses"]["parameters"]
        self.assertAlmostEqual((parameters["bottom"] - parameters["top"]) / height,
                               plan["parts"]["parameters"] / plan["peak_bytes"], delta=0.01)
        units = {"B": 1, "KiB": 2**10, "MiB": 2**20}
        self.assertTrue(page["sizes"])
        for label, box in page["sizes"]:
            number, unit = label.split()
            middle = (box["top"] + box["bottom"]) / 2
            share = float(number) * units[unit] / plan["peak_bytes"]
            self.assertAlmostEqual((bottom - middle) / height, share, delta=0.02)
        phases = [name for name, _ in page["phases"]]
        self.assertEqual(phases.count("backward"), 2, "two steps are replayed")
        self.assertTrue(all(a["right"] < b["left"] for (_, a), (_, b) in zip(page["phases"], page["phases"][1:])))
        self.assertIsNone(page["budget"], "the budget is far above")

    def test_blame(self):
        plan, page, _ = self.open()
        rows = {row[0]: row[1] for row in page["rows"] if len(row) == 2}
        for name in plan["parts"]:
            self.assertIn(name, rows)
        held = max(plan["by_module"], key=plan["by_module"].get)
        self.assertIn(held or "(outside of modules)", rows)
        largest = plan["largest_at_peak"][0]
        self.assertIn(str(largest["shape"]), page["tensors"][0])

    def test_too_small_a_budget(self):
        peak = self.open()[0]["peak_bytes"]
        plan, page, _ = self.open("--budget", str(peak - 1))
        self.assertIn("does not fit", page["verdict"])
        self.assertEqual(len(page["reasons"]), 1)
        self.assertIn("out of memory", page["reasons"][0])
        top = min(box["top"] for box in page["uses"].values())
        self.assertAlmostEqual(page["budget"], top, delta=0.1, msg="the line of the budget touches the peak")


if __name__ == "__main__":
    unittest.main()
