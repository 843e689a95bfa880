"""A report in a real browser: pictures at desktop and phone widths, light and dark, and no harm.

    python tests/evaluation/report/in_browser.py report.html pictures/

Not among the tests, since it needs Chromium. Ends with 1 where the page changed itself or holds
an element that could: with pairs, sources and names full of markup, nothing of them may run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from html import unescape
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--allow-file-access-from-files",
]
SCHEMES = {"light": "1", "dark": "0"}
WIDTHS = {"desktop": 1280, "phone": 375}
WINDOW = 500  # the narrowest that a browser opens; a narrower page is shown in a frame
HEIGHT = 6000


def main() -> int:
    page, pictures = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"error: no browser found; install one of {', '.join(BROWSERS)}")
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        base = [browser, *FLAGS, f"--user-data-dir={profile}"]
        dom = _run([*base, "--dump-dom", page.as_uri()])
        for scheme, value in SCHEMES.items():
            for name, width in WIDTHS.items():
                picture = pictures / f"{name}-{scheme}.png"
                frame = Path(profile) / "frame.html"
                frame.write_text(
                    f"<body style='margin:0'><iframe src='{page.as_uri()}' "
                    f"style='border:0;width:{width}px;height:{HEIGHT}px'></iframe>"
                )
                size = f"--window-size={max(width, WINDOW)},{HEIGHT}"
                color = f"--blink-settings=preferredColorScheme={value}"
                _run([*base, color, size, f"--screenshot={picture}", frame.as_uri()])
                print(picture)
    before, after = (_title(html) for html in (page.read_text(encoding="utf-8"), dom))
    harm = re.findall(r"<(?:script|img|iframe|object|embed)\b", dom)
    if before != after or harm:
        print(f"HARM: title {before!r} became {after!r}; elements {harm}", file=sys.stderr)
        return 1
    print("nothing in the page ran")
    return 0


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


def _title(html: str) -> str:
    match = re.search(r"<title>(.*?)</title>", html, re.DOTALL)
    return unescape(match[1]) if match else ""


if __name__ == "__main__":
    sys.exit(main())
