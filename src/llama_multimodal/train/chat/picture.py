"""Examples as one picture: each with its tiles as the encoder gets them, and its text with what is learnt marked."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ...config import ModelConfig
from ...inputs import ImageLayout
from ...processing.pictures import pixels_of
from ...processing.processor import Processor
from .check import Piece, pieces
from .encode import Example

WIDTH, EDGE, GAP = 1240, 28, 4  # of the sheet, around things, between tiles
PICTURES, HEIGHT = 470, 330  # the most that the pictures of a row take: all beside each other; each
LINE, MOST_LINES = 25, 24
BACK, PANEL, INK, FAINT, MARK, RULE = "#f4f4f1", "#ffffff", "#22242a", "#85888f", "#cdeccb", "#d9d9d3"


def draw(examples: Sequence[Example], processor: Processor) -> Image.Image:
    """One panel an example, one below the other."""
    panels = [_panel(example, processor) for example in examples]
    height = sum(panel.height + EDGE for panel in panels) + EDGE + LINE
    sheet = Image.new("RGB", (WIDTH + 2 * EDGE, height), BACK)
    top = EDGE
    for panel in panels:
        sheet.paste(panel, (EDGE, top))
        top += panel.height + EDGE
    brush = ImageDraw.Draw(sheet)
    brush.rectangle((EDGE, top, EDGE + 18, top + 16), fill=MARK)
    brush.text((EDGE + 28, top - 2), "learnt; all other tokens are masked", font=_font(15), fill=FAINT)
    return sheet


def _panel(example: Example, processor: Processor) -> Image.Image:
    shown = list(_pictures(example, processor))
    block = _beside(shown)
    left = EDGE + (block.width + EDGE if block else 0)
    lines = list(_lines(pieces(example, processor), WIDTH - left - EDGE))
    height = 2 * EDGE + 34 + max(block.height if block else 0, len(lines) * LINE)
    panel = Image.new("RGB", (WIDTH, height), PANEL)
    brush = ImageDraw.Draw(panel)
    brush.rectangle((0, 0, WIDTH - 1, height - 1), outline=RULE)
    name = example.where if len(example.where) < 60 else f"…{example.where[-59:]}"
    brush.text((EDGE, 18), name, font=_font(18, bold=True), fill=INK)
    facts = describe(example)
    brush.text((WIDTH - EDGE - brush.textlength(facts, font=_font(15)), 20), facts, font=_font(15), fill=FAINT)
    top = 34 + EDGE
    if block:
        panel.paste(block, (EDGE, top))
    for number, line in enumerate(lines):
        x, y = float(left), top + number * LINE
        for text, learnt in line:
            width = brush.textlength(text, font=_font(17))
            if learnt:
                brush.rectangle((x, y, x + width, y + LINE - 3), fill=MARK)
            brush.text((x, y + 1), text, font=_font(17), fill=INK if learnt else FAINT)
            x += width
    return panel


def describe(example: Example) -> str:
    """An example in numbers."""
    how = "distilled" if example.distill else "learnt"
    parts = [example.shape, f"{len(example.tokens)} tokens", f"{example.num_learnt} {how}"]
    if example.images:
        height, width = example.tiles.shape[2:]
        parts.append(f"{_count(len(example.images), 'picture')} in {_count(len(example.tiles), 'tile')}")
        parts.append(f"{width} × {height} pixels each")
    if example.cut:
        parts.append(f"{example.cut} tokens cut off")
    return " · ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _pictures(example: Example, processor: Processor) -> Iterator[Image.Image]:
    """Every picture as its tiles, set apart."""
    if not example.images:
        return
    assert isinstance(processor.config, ModelConfig) and processor.preprocess is not None
    tiles = pixels_of(example.tiles, processor.config, processor.preprocess)
    whole_first = processor.preprocess.layout == "anyres"
    first, side = 0, (PICTURES - GAP * 2 * (len(example.images) - 1)) / min(len(example.images), 3)
    for layout in example.images:
        yield _tiles(tiles[first : first + layout.num_tiles], layout, whole_first, side)
        first += layout.num_tiles


def _tiles(tiles: npt.NDArray[np.uint8], layout: ImageLayout, whole_first: bool, most: float) -> Image.Image:
    """The grid, and beside it the tile of the whole picture where there is one."""
    whole = [tiles[0 if whole_first else -1]] if layout.whole else []
    grid = tiles[1:] if layout.whole and whole_first else tiles[: layout.rows * layout.columns]
    height, width = tiles.shape[1:3]
    across, down = layout.columns + len(whole), max(layout.rows, 1)
    scale = min((most - GAP * (across + 1)) / (across * width), (HEIGHT - GAP * (down + 1)) / (down * height), 2.0)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = Image.new("RGB", (across * (w + GAP) + GAP, down * (h + GAP) + GAP), RULE)
    for number, tile in enumerate(grid):
        row, column = divmod(number, layout.columns)
        canvas.paste(_scaled(tile, w, h), (GAP + column * (w + GAP), GAP + row * (h + GAP)))
    for tile in whole:
        canvas.paste(_scaled(tile, w, h), (GAP + layout.columns * (w + GAP), GAP))
    return canvas


def _scaled(tile: npt.NDArray[np.uint8], width: int, height: int) -> Image.Image:
    return Image.fromarray(tile).resize((width, height), Image.Resampling.LANCZOS)


def _beside(pictures: Sequence[Image.Image]) -> Image.Image | None:
    """Pictures in rows of three."""
    if not pictures:
        return None
    rows = [pictures[i : i + 3] for i in range(0, len(pictures), 3)]
    space = 3 * GAP
    width = max(sum(one.width + space for one in row) - space for row in rows)
    canvas = Image.new("RGB", (width, sum(max(one.height for one in row) + space for row in rows) - space), PANEL)
    top = 0
    for row in rows:
        left = 0
        for one in row:
            canvas.paste(one, (left, top))
            left += one.width + space
        top += max(one.height for one in row) + space
    return canvas


def _lines(text: Sequence[Piece], width: int) -> Iterator[list[Piece]]:
    """The text broken into lines of this width; what is too much for a panel is left out."""
    line: list[Piece] = []
    used, count = 0.0, 0
    for piece, learnt in text:
        for word in _words(piece, width):
            size = _font(17).getlength(word.rstrip())
            if (used + size > width and used) or word == "\n":
                yield line
                line, used, count = [], 0.0, count + 1
                if count == MOST_LINES:
                    yield [("…", False)]
                    return
            if word != "\n":
                line.append((word, learnt))
                used += _font(17).getlength(word)
    if line:
        yield line


def _words(text: str, width: int) -> Iterator[str]:
    """Words with a space behind them, line ends by themselves, and what is wider than a line in parts."""
    for word in re.findall(r"\n|[^ \n]+ ?| ", text.replace("\t", "    ")):
        part = word if word == "\n" else "".join(c if c.isprintable() else "\ufffd" for c in word)
        while _font(17).getlength(part.rstrip()) > width:
            fits = next(n for n in range(len(part), 0, -1) if n == 1 or _font(17).getlength(part[:n]) <= width)
            yield part[:fits]
            part = part[fits:]
        yield part


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Matplotlib's, which has most alphabets, where it is installed; else the one that Pillow brings."""
    found = find_spec("matplotlib")
    if found is not None and found.origin is not None:
        file = Path(found.origin).parent / "mpl-data/fonts/ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
        if file.is_file():
            return ImageFont.truetype(file, size)
    return ImageFont.load_default(size)
