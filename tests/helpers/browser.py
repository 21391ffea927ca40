"""A page as a real browser lays it out."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed; on Debian: apt-get install chromium"
)
#: Widths of a phone and of a desktop screen in CSS pixels.
WIDTHS = (390, 1280)


def pictures_shown(page: Path, width: int, folder: Path) -> int:
    """Lay out a page with everything unfolded, and count the pictures that are shown.
    Fails if the page scrolls sideways.

    Args:
        folder: for temporary files.
    """
    frame = folder / "frame.html"
    frame.write_text(
        f"<iframe id=f width={width} height=800 style='border:0' src='{page.as_uri()}'></iframe>"
        "<pre id=result></pre><script>onload = () => {"
        " const d = f.contentDocument, e = d.documentElement;"
        " d.querySelectorAll('details').forEach(one => one.open = true);"
        " const pictures = [...d.images].filter(i => i.naturalWidth > 0).length;"
        " result.textContent = `SEEN ${e.clientWidth} ${e.scrollWidth} ${pictures}` }</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    options += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", frame.as_uri()]
    done = subprocess.run(
        [str(CHROMIUM), *options], capture_output=True, text=True, timeout=600, check=True
    )
    seen = re.search(r"SEEN (\d+) (\d+) (\d+)", done.stdout)
    assert seen, done.stdout + done.stderr
    client, scroll, pictures = map(int, seen.groups())
    assert client >= width - 20  # minus a scroll bar
    assert scroll <= client
    return pictures
