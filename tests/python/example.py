"""The example runs and shows what it is there for."""

import contextlib
import io
import re
import runpy
import unittest
from pathlib import Path

import support  # noqa: F401

SCRIPT = Path(__file__).parents[2] / "examples/python/replace_sdpa.py"


class Example(unittest.TestCase):
    def test_replace_sdpa(self):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            runpy.run_path(str(SCRIPT))
        scores, *measured = map(float, re.findall(r"([0-9.]+) MiB", output.getvalue()))
        plain_largest, largest, plain_peak, peak = measured
        self.assertGreaterEqual(plain_largest, scores)
        self.assertGreater(plain_peak, 3 * scores)
        self.assertLess(largest, scores / 10)
        self.assertLess(peak, scores / 2)


if __name__ == "__main__":
    unittest.main()
