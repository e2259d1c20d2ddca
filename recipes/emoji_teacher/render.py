"""Emoji renders: the only data that the bundled teacher and its judge ever see.

One render is a Noto Color Emoji glyph, randomly scaled, shifted and rotated, on a plain background of random colour.
The same prompt therefore has many pictures, which is what makes the noise of the diffusion model matter.

`python recipes/emoji_teacher/render.py FOLDER` writes some as an image folder, for methods that need images.
"""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from multiprocessing import Pool
from pathlib import Path

import emoji
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64
FONT = Path(os.environ.get("NOTO_COLOR_EMOJI", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
GLYPH_POINTS = 109  # the one size of the bitmap font

COLOURS = {
    "white": (245, 245, 245), "black": (20, 20, 22), "gray": (135, 138, 142), "red": (200, 45, 45),
    "orange": (240, 140, 40), "yellow": (245, 220, 80), "green": (70, 165, 80), "blue": (55, 95, 205),
    "purple": (130, 70, 175), "pink": (245, 165, 195), "brown": (120, 78, 48), "teal": (40, 155, 160),
}  # fmt: skip
COLOUR_JITTER = 14  # standard deviation, in levels of 0..255

NAMES = (Path(__file__).parent / "names.txt").read_text().splitlines()

PLAIN = ("{name}", "a picture of {name}")
COLOURED = (
    "{name} on {colour} background",
    "a {name} on a {colour} background",
    "{name}, {colour} background",
    "{colour} background with {name}",
)


@dataclass(frozen=True)
class Renders:
    """Renders with their labels.

    Attributes:
        images: uint8 [n, 64, 64, 3], 0..255.
        name: int16 [n], index into NAMES.
        colour: int8 [n], index into COLOURS.
    """

    images: np.ndarray
    name: np.ndarray
    colour: np.ndarray

    def save(self, path: Path) -> None:
        np.savez(path, images=self.images, name=self.name, colour=self.colour)

    @classmethod
    def load(cls, path: Path) -> "Renders":
        with np.load(path, allow_pickle=False) as data:
            return cls(data["images"], data["name"], data["colour"])


def prompt_for(name: str, colour: str, rng: np.random.Generator, p_colour: float = 0.75) -> str:
    """One phrasing of a render's content; it names the background colour with probability `p_colour`."""
    phrasings = COLOURED if rng.random() < p_colour else PLAIN
    return phrasings[rng.integers(len(phrasings))].format(name=name, colour=colour)


@cache
def glyphs() -> dict[str, Image.Image]:
    """The RGBA bitmap of every name, 136 x 136."""
    if not FONT.exists():
        raise FileNotFoundError(
            f"{FONT} is missing: apt-get install fonts-noto-color-emoji, or name it in NOTO_COLOR_EMOJI"
        )
    font = ImageFont.truetype(str(FONT), GLYPH_POINTS)
    characters = {}
    for character, data in emoji.EMOJI_DATA.items():
        if data["status"] == emoji.STATUS["fully_qualified"]:
            characters.setdefault(data["en"].strip(":").replace("_", " "), character)
    drawn = {}
    for name in NAMES:
        glyph = Image.new("RGBA", (136, 136), (0, 0, 0, 0))
        ImageDraw.Draw(glyph).text((0, 4), characters[name], font=font, embedded_color=True)
        drawn[name] = glyph
    return drawn


def render(glyph: Image.Image, colour: str, rng: np.random.Generator) -> np.ndarray:
    """Draws one picture: uint8 [64, 64, 3]."""
    background = np.clip(np.array(COLOURS[colour]) + rng.normal(0, COLOUR_JITTER, 3), 0, 255).astype(int)
    canvas = Image.new("RGBA", (SIZE, SIZE), (*background.tolist(), 255))
    scale = rng.uniform(0.68, 0.92)
    turned = glyph.rotate(rng.uniform(-18, 18), Image.Resampling.BICUBIC, expand=True)
    side = round(turned.width * SIZE / 136 * scale)
    small = turned.resize((side, side), Image.Resampling.LANCZOS)
    room = (1 - scale) * SIZE / 2 + 1
    dx, dy = rng.uniform(-room, room, 2)
    canvas.alpha_composite(
        small if side <= SIZE else small.crop(((side - SIZE) // 2,) * 2 + ((side + SIZE) // 2,) * 2),
        (
            int(np.clip(round((SIZE - side) / 2 + dx), 0, max(SIZE - side, 0))),
            int(np.clip(round((SIZE - side) / 2 + dy), 0, max(SIZE - side, 0))),
        ),
    )
    return np.asarray(canvas.convert("RGB"))


def _render_name(job: tuple[Image.Image, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    glyph, index, count, seed = job
    rng = np.random.default_rng((seed, index))
    colours = np.arange(count) % len(COLOURS)
    rng.shuffle(colours)
    keys = list(COLOURS)
    return np.stack([render(glyph, keys[c], rng) for c in colours]), colours


def render_all(per_name: int, seed: int, processes: int = 2, drawn: Mapping[str, Image.Image] | None = None) -> Renders:
    """Renders `per_name` pictures of every name; equal seeds give equal pictures on any number of processes.

    `drawn` has the bitmap of every name; Noto's where it is None.
    """
    drawn = drawn or glyphs()
    with Pool(processes) as pool:
        jobs = [(drawn[name], i, per_name, seed) for i, name in enumerate(NAMES)]
        parts = pool.map(_render_name, jobs, chunksize=8)
    return Renders(
        np.concatenate([images for images, _ in parts]),
        np.repeat(np.arange(len(NAMES), dtype=np.int16), per_name),
        np.concatenate([colours for _, colours in parts]).astype(np.int8),
    )


def save_folder(folder: Path, per_name: int, seed: int) -> int:
    """Writes PNGs, then metadata.jsonl (a folder that has one is whole); returns how many."""
    folder.mkdir(parents=True)
    made, rng, colours = render_all(per_name, seed), np.random.default_rng(seed), list(COLOURS)
    lines = []
    for i, (image, name, colour) in enumerate(zip(made.images, made.name, made.colour, strict=True)):
        Image.fromarray(image).save(folder / f"{i:06d}.png")
        caption = prompt_for(NAMES[name], colours[colour], rng, p_colour=0.85)
        lines.append(json.dumps({"file_name": f"{i:06d}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return len(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; must not exist")
    parser.add_argument("--per-name", type=int, default=48, help="pictures of each of the names")
    parser.add_argument("--seed", type=int, default=3, help="1 and 2 made the teacher's and the judge's data")
    args = parser.parse_args()
    print(f"{save_folder(args.folder, args.per_name, args.seed)} pictures in {args.folder}")
