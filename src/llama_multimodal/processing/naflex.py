"""SigLIP 2 NaFlex: a picture that keeps its ratio, as large as a number of patches allows, its sides whole patches.

Bit for bit what transformers 5.23 makes of it (`Siglip2ImageProcessorPil`), but as a picture: it is neither cut into
patches nor filled up to that number of them.

Shapes: H, W of the picture that is made, multiples of `patch_size`
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..config import Preprocess
from ..config.checks import require
from ..errors import ImageError
from .images import MAX_PIXELS
from .preprocess import check_picture, normalise, resized

_MAX_SCALE = 100.0  # however small a picture is
_PRECISION = 1e-5  # of the scale


def target_size(width: int, height: int, patch_size: int, max_num_patches: int) -> tuple[int, int]:
    """(height, width) at the largest scale whose patches, each side rounded up to whole ones, are not too many.

    A side of millions of patches may get more than `max_num_patches`: no scale below a millionth is tried.
    """

    def patches(side: int, scale: float) -> int:
        return max(1, math.ceil(side * scale / patch_size))

    # Searched as the reference does: the exact scale would round some sides to another patch.
    low, high = _PRECISION / 10, _MAX_SCALE
    while high - low >= _PRECISION:
        scale = (low + high) / 2
        if patches(height, scale) * patches(width, scale) <= max_num_patches:
            low = scale
        else:
            high = scale
    return patches(height, low) * patch_size, patches(width, low) * patch_size


def naflex_pixels(image: Image.Image, preprocess: Preprocess) -> npt.NDArray[np.float32]:
    """An RGB picture as normalised pixels [3, H, W] float32, for layout "naflex".

    Raises:
        ConfigError: the layout is another, or its patches are more pixels than any picture may have.
        ImageError: the picture has no pixels, or is so narrow that it would become too large or too many patches; or
            it must keep its size, and that is not whole patches.
    """
    require(preprocess.layout == "naflex", "layout must be naflex", preprocess)
    check_picture(image)
    patch, most = preprocess.patch_size or 1, preprocess.max_num_patches
    if most is not None:
        fits = most * patch**2 <= MAX_PIXELS
        require(fits, f"{most} patches of {patch} x {patch} are more pixels than a picture may have", preprocess)
        height, width = target_size(*image.size, patch, most)
        if height * width > most * patch**2:
            raise ImageError(
                f"an image of {image.width} x {image.height} pixels is too narrow to become at most {most} patches;"
                " crop it to a less extreme shape"
            )
        image = resized(image, height, width, preprocess.resample)
    elif image.width % patch or image.height % patch:
        raise ImageError(
            f"an image of {image.width} x {image.height} pixels does not divide into patches of {patch}; resize it to"
            f" multiples of {patch}"
        )
    return normalise(np.asarray(image)[None], preprocess)[0]
