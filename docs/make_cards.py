"""Writes the cards of the presets into docs/cards, and a picture of a model's card as docs/model_card.png.

python docs/make_cards.py                 # the presets' cards
python docs/make_cards.py m6rec-ml100k    # and the picture of the card in that folder

The picture needs `pip install markdown-it-py` and Chromium (Debian: `apt install chromium`).
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from m6rec.model_cards import MARK, render_cards
from m6rec.train.runs.facts import preset_facts

DOCS = Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 980, 12000
STYLE = """
body { font: 16px/1.5 "DejaVu Sans", sans-serif; color: #1f2328; width: 860px; margin: 32px auto; }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: .3em; } code { font-size: 85%; }
table { border-collapse: collapse; font-size: 85%; } td, th { border: 1px solid #d1d9e0; padding: 4px 10px; }
pre { background: #f6f8fa; padding: 14px; overflow: hidden; white-space: pre-wrap; } img { max-width: 100%; }
"""


def write_presets() -> None:
    """Write both cards of every preset."""
    (DOCS / "cards").mkdir(exist_ok=True)
    for preset in ("tiny", "edge", "base"):
        for file, card in render_cards(preset_facts(preset)).items():
            name = f"m6rec-{preset}{file.removeprefix('README')}"
            (DOCS / "cards" / name).write_text(card.replace("](README", f"](m6rec-{preset}"), encoding="utf-8")


def as_html(folder: Path) -> str:
    """Render the card of a folder as a page, its head as a block before it; pictures by their place."""
    from markdown_it import MarkdownIt

    card = ModelCard.load(folder / "README.md")
    head = yaml.safe_dump({**card.data.to_dict(), "model-index": "..."}, sort_keys=False, allow_unicode=True)
    body = MarkdownIt("commonmark").enable("table").render(card.text.replace(MARK, ""))
    base = f'<base href="{folder.resolve().as_uri()}/">'
    return f"<meta charset=utf-8>{base}<style>{STYLE}</style><pre>{head}</pre>{body}"


def write_picture(folder: Path) -> None:
    """Let a browser draw the card, and cut the picture where the page ends."""
    from matplotlib import image

    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed: a browser draws the picture")
    with tempfile.TemporaryDirectory() as scratch:
        page, raw = Path(scratch) / "card.html", Path(scratch) / "card.png"
        page.write_text(as_html(folder), encoding="utf-8")
        options = [
            "--headless",
            "--no-sandbox",
            "--hide-scrollbars",
            "--disable-gpu",
            f"--user-data-dir={scratch}/user",
        ]
        size = [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={raw}"]
        subprocess.run([browser, *options, *size, page.as_uri()], check=True, capture_output=True, timeout=300)
        pixels = image.imread(raw)
    written = (pixels[:, :, :3] < 1).any(axis=(1, 2)).nonzero()[0].max()
    image.imsave(DOCS / "model_card.png", pixels[: written + 32])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="the folder of a model with its card, for the picture")
    options = parser.parse_args()
    write_presets()
    if options.folder:
        write_picture(options.folder)
