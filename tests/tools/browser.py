"""A page of the tools as a browser without a window lays it out."""

import json
import re
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


needed = unittest.skipIf(BROWSER is None, "no browser here; Debian's package is chromium")


def measured(page, script, *options):
    """What `script`, which sets document.title to JSON, makes of a page, and what the browser said of errors."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
        shown = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
             f"--user-data-dir={folder}/profile", "--window-size=1200,900", *options, "--dump-dom", copy.as_uri()],
            capture_output=True, text=True, timeout=120)
        title = re.search(r"<title>(\{.*?\})</title>", shown.stdout, re.DOTALL)
        assert title, shown.stderr
        unescaped = title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return json.loads(unescaped), [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
