"""Type faces for rendered text, taken from installed Python packages."""

from __future__ import annotations

import random
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

from ...errors import MissingExtraError

_MATPLOTLIB = "mpl-data/fonts/ttf"
# family: (package, folder inside it, files). Regular and bold faces come first and are the most likely.
_FACES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "DejaVu Sans": ("matplotlib", _MATPLOTLIB, ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf")),
    "DejaVu Serif": ("matplotlib", _MATPLOTLIB, ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf")),
    "DejaVu Sans Mono": ("matplotlib", _MATPLOTLIB, ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf")),
    "STIX": ("matplotlib", _MATPLOTLIB, ("STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf")),
    "Computer Modern": ("matplotlib", _MATPLOTLIB, ("cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmtt10.ttf")),
    "Roboto": (
        "font_roboto", "files",
        ("Roboto-Regular.ttf", "Roboto-Bold.ttf", "Roboto-Medium.ttf", "Roboto-Black.ttf", "Roboto-Italic.ttf"),
    ),
    "Source Sans": (
        "font_source_sans_pro", "files",
        ("SourceSansPro-Regular.ttf", "SourceSansPro-Bold.ttf", "SourceSansPro-It.ttf"),
    ),
    "Source Serif": ("font_source_serif_pro", "files", ("SourceSerifPro-Regular.ttf", "SourceSerifPro-Bold.ttf")),
    "Manrope": ("font_manrope", "files", ("Manrope-Regular.ttf", "Manrope-Bold.ttf", "Manrope-ExtraBold.ttf")),
    "Caladea": ("font_caladea", "files", ("Caladea-Regular.ttf", "Caladea-Bold.ttf", "Caladea-Italic.ttf")),
    "Hanken Grotesk": ("font_hanken_grotesk", "files", ("HankenGrotesk-Regular.otf", "HankenGrotesk-Bold.otf")),
}  # fmt: skip


@lru_cache(maxsize=1)
def faces() -> tuple[tuple[str, ...], ...]:
    """The font files, one group for each family, in a fixed order.

    Every file must be there: with a face fewer, the same seed would give another picture.

    Raises:
        MissingExtraError: a font package is not installed, or lacks one of the faces.
    """
    found = []
    for package, folder, names in _FACES.values():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise MissingExtraError(extra="train", needed_for="rendering text (fonts)")
        root = Path(spec.origin).parent / folder
        files = tuple(str(root / name) for name in names)
        if not all(Path(file).is_file() for file in files):
            raise MissingExtraError(extra="train", needed_for="rendering text (fonts)")
        found.append(files)
    return tuple(found)


def pick_face(rng: random.Random) -> str:
    """A font file: families are equally likely, then the faces of the family."""
    return rng.choice(rng.choice(faces()))


@lru_cache(maxsize=256)
def load(path: str, size: int) -> ImageFont.FreeTypeFont:
    """One face at one size in pixels."""
    # The basic layout keeps pictures the same whether or not Pillow was built with Raqm.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
