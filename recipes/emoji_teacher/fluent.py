"""Microsoft's Fluent flat emoji as bitmaps: another style of the same names.

npm fetches them (`@iconify-json/fluent-emoji-flat`, MIT, SVG) and the program that draws them (`@resvg/resvg-js`).
"""

import base64
import io
import json
import shutil
import subprocess
from pathlib import Path

from PIL import Image

from render import NAMES

ICONS, DRAWER = "@iconify-json/fluent-emoji-flat", "@resvg/resvg-js"
VERSIONS = {ICONS: "1.2.6", DRAWER: "2.6.2"}


def fetch(folder: Path) -> Path:
    """Installs both packages into a folder, unless they are there; returns the icons' file."""
    icons = folder / "node_modules" / ICONS / "icons.json"
    if not icons.exists() or not (folder / "node_modules" / DRAWER).exists():
        if not (npm := shutil.which("npm")):
            raise FileNotFoundError("npm is missing, which fetches the Fluent emoji: apt-get install npm")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text(json.dumps({"private": True, "dependencies": VERSIONS}))
        subprocess.run([npm, "install", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=folder, check=True)
    return icons


def fluent_glyphs(folder: Path) -> dict[str, Image.Image]:
    """The RGBA bitmap of every name, 136 x 136."""
    found = json.loads(fetch(folder).read_text())
    size = f"{found['width']} {found['height']}"
    bodies = {name: found["icons"][name.lower().replace(" ", "-")]["body"] for name in NAMES}
    svgs = {
        name: f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">{b}</svg>' for name, b in bodies.items()
    }
    drawn = subprocess.run(
        ["node", str(Path(__file__).parent / "svg.mjs"), str(folder)],
        input=json.dumps(svgs), capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return {
        name: Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA") for name, png in json.loads(drawn).items()
    }
