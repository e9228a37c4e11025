"""Type faces for rendered text, taken from installed Python packages."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import ImageFont

from llama_multimodal.errors import MissingExtraError

# family: (package, folder inside it, files). All of these map plain ASCII and draw letters and digits distinctly.
_FACES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "DejaVu Sans": ("matplotlib", "mpl-data/fonts/ttf", ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")),
    "DejaVu Serif": ("matplotlib", "mpl-data/fonts/ttf", ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf")),
    "DejaVu Sans Mono": ("matplotlib", "mpl-data/fonts/ttf", ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf")),
    "STIX": ("matplotlib", "mpl-data/fonts/ttf", ("STIXGeneral.ttf", "STIXGeneralBol.ttf")),
    "Computer Modern": ("matplotlib", "mpl-data/fonts/ttf", ("cmr10.ttf", "cmb10.ttf", "cmss10.ttf")),
    "Roboto": ("font_roboto", "files", ("Roboto-Regular.ttf", "Roboto-Bold.ttf", "Roboto-Medium.ttf")),
    "Source Sans": ("font_source_sans_pro", "files", ("SourceSansPro-Regular.ttf", "SourceSansPro-Bold.ttf")),
    "Source Serif": ("font_source_serif_pro", "files", ("SourceSerifPro-Regular.ttf", "SourceSerifPro-Bold.ttf")),
    "Manrope": ("font_manrope", "files", ("Manrope-Regular.ttf", "Manrope-Bold.ttf")),
    "Caladea": ("font_caladea", "files", ("Caladea-Regular.ttf", "Caladea-Bold.ttf")),
    "Hanken Grotesk": ("font_hanken_grotesk", "files", ("HankenGrotesk-Regular.otf", "HankenGrotesk-Bold.otf")),
}
_MIN_FAMILIES = 6


@lru_cache(maxsize=1)
def faces() -> tuple[tuple[str, ...], ...]:
    """The font files at hand, one group for each family, in a fixed order."""
    found = []
    for package, folder, names in _FACES.values():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent / folder
        files = tuple(str(root / name) for name in names if (root / name).is_file())
        if files:
            found.append(files)
    if len(found) < _MIN_FAMILIES:
        raise MissingExtraError("train", "rendering text")
    return tuple(found)


@lru_cache(maxsize=512)
def _load(path: str, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout keeps pictures the same whether or not Pillow was built with Raqm.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def pick_face(rng: np.random.Generator) -> str:
    """A font file: families are equally likely, then the faces of the family."""
    families = faces()
    files = families[int(rng.integers(len(families)))]
    return files[int(rng.integers(len(files)))]


def load(path: str, size: int) -> ImageFont.FreeTypeFont:
    """One face at one size in pixels."""
    return _load(path, max(6, int(size)))


def font(rng: np.random.Generator, size: int) -> ImageFont.FreeTypeFont:
    """A random face at the given size in pixels."""
    return load(pick_face(rng), size)
