"""Uses the demo of a model in headless Chromium, and keeps its two pictures; prints what was seen as JSON.

    python docs/demo_pictures.py m6rec-ml100k --modules FOLDER

FOLDER is one in which `npm install --ignore-scripts @sparticuz/chromium puppeteer-core` was run. Chinese letters need a
font (Debian: `apt install fonts-wqy-zenhei`). The pictures are docs/demo_desktop.png and docs/demo_phone.png.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parent
SCRIPT = DOCS.parent / "tests" / "train" / "demo" / "page.mjs"
WORDS = ["Star Wars", "The Empire Strikes Back", "Alien"]
PRODUCT = "The Alien Empire Strikes, 2031, Action, Horror, Sci-Fi, Thriller"
PHONE = (780, 1900)
"""Size of the phone's picture, cut from the top of the page."""


def main() -> None:
    """Start the demo, use it, and keep the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--modules", type=Path, required=True)
    parser.add_argument("--port", default="7862")
    given = parser.parse_args()
    code = "import sys; from m6rec.train.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "demo", given.model, "--port", given.port]
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        try:
            awake = demo.stdout.readline().strip() if demo.stdout else ""
            address = f"http://127.0.0.1:{given.port}/"
            words = ["node", str(SCRIPT), address, str(given.modules / "node_modules"), folder, PRODUCT, *WORDS]
            seen = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        finally:
            demo.terminate()
        keep(Image.open(f"{folder}/desktop.png"), DOCS / "demo_desktop.png")
        keep(Image.open(f"{folder}/phone-chinese.png").crop((0, 0, *PHONE)), DOCS / "demo_phone.png")
    print(json.dumps({"awake": awake, **seen}, ensure_ascii=False, indent=1))  # noqa: T201


def keep(picture: Image.Image, path: Path) -> None:
    """Save a picture with few colours, which is enough for a page of text."""
    picture.convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    main()
