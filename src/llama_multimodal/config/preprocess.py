"""How a picture becomes the pixels of a vision encoder, and the reader of `preprocessor_config.json`.

A key of the file is understood, or does not change the pixels, or is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError
from .checks import check_keys, nearest, require

WHERE = "preprocessor_config.json"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Layout = Literal["single", "anyres", "split", "naflex"]
"""One picture; anyres.py; splitting.py; naflex.py."""


@dataclass(frozen=True)
class Preprocess:
    """What is done to a picture, in this order. At most one of `size`, `shortest_edge` and `longest_edge` is set."""

    layout: Layout = "single"
    pad_to_square: bool = False  # with the mean's colour, before anything else (LLaVA 1.5)
    size: tuple[int, int] | None = None  # (height, width), whatever the picture's ratio
    shortest_edge: int | None = None  # its ratio kept
    longest_edge: int | None = None  # its ratio kept; layout "split" only
    resample: int = 3  # PIL's number: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming
    crop: tuple[int, int] | None = None  # (height, width) from the middle, black where the picture is smaller
    rescale_factor: float | None = 1 / 255  # None: the values stay 0…255
    mean: tuple[float, ...] | None = None  # per channel; None: not normalised
    std: tuple[float, ...] | None = None
    tile_size: int | None = None  # side of a crop of layouts "anyres" and "split"
    grid_pinpoints: tuple[tuple[int, int], ...] = ()  # (height, width) of the canvases of layout "anyres"
    split: bool = True  # layout "split": False makes one square of the picture
    patch_size: int | None = None  # side of a patch of layout "naflex"
    max_num_patches: int | None = None  # that a picture of layout "naflex" is resized to; None: it keeps its size

    def __post_init__(self) -> None:
        resizes = [edge for edge in (self.size, self.shortest_edge, self.longest_edge) if edge is not None]
        lengths = [*(self.size or ()), *(self.crop or ()), *(edge for edge in resizes if isinstance(edge, int))]
        require(len(resizes) <= 1, "only one of size, shortest_edge and longest_edge can be set", self)
        require(min(lengths, default=1) > 0, "sizes must be positive", self)
        require(self.resample in range(6), f"resample is {self.resample}; PIL's filters are 0 to 5", self)
        require((self.mean is None) == (self.std is None), "mean and std go together", self)
        if self.mean is not None and self.std is not None:
            require(len(self.mean) == len(self.std) == 3, "mean and std need a number for each of 3 channels", self)
            require(min(self.std) > 0, "std must be positive", self)
        require(not self.pad_to_square or self.mean is not None, "pad_to_square needs the mean for its colour", self)
        require(self.longest_edge is None or self.layout == "split", "longest_edge needs layout split", self)
        if self.layout == "naflex":
            require((self.patch_size or 0) > 0, "layout naflex needs a patch_size", self)
            require(self.max_num_patches is None or self.max_num_patches > 0, "max_num_patches must be positive", self)
            plain = not resizes and self.crop is None and not self.pad_to_square
            require(plain, "layout naflex takes a max_num_patches only", self)
            return
        require(self.patch_size is None and self.max_num_patches is None, "patches need layout naflex", self)
        if self.layout == "single":
            return
        require((self.tile_size or 0) > 0, f"layout {self.layout} needs a tile_size", self)
        if self.layout == "split":
            require(self.crop is None and self.size is None, "layout split takes a longest_edge only", self)
            require(self.shortest_edge is None, "layout split takes a longest_edge only", self)
            return
        tile = self.tile_size or 1
        same = {self.size or (tile, tile), self.crop or (tile, tile), (self.shortest_edge or tile,) * 2}
        require(same == {(tile, tile)}, "the crops must be squares that size and crop leave as they are", self)
        whole = all(h > 0 and w > 0 and h % tile == w % tile == 0 for h, w in self.grid_pinpoints)
        require(len(self.grid_pinpoints) > 0 and whole, f"grid_pinpoints must be multiples of {tile}", self)


# --- from the file ---------------------------------------------------------------------------------------------------

_COMMON = {
    "do_resize": True, "do_center_crop": False, "crop_size": None, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "default_to_square": False,
}  # fmt: skip
_CLIP = _COMMON | {
    "size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
    "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD),
}  # fmt: skip
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_IDEFICS3 = _COMMON | {
    "size": {"longest_edge": 1456}, "resample": 1, "max_image_size": {"longest_edge": 364}, "do_image_splitting": True,
    "default_to_square": True,
}  # fmt: skip
_NAFLEX = {"size": None, "resample": 2, "patch_size": 16, "max_num_patches": 256}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "SiglipImageProcessor": _COMMON | {"size": {"height": 224, "width": 224}, "resample": 3},
    "Siglip2ImageProcessor": _COMMON | _NAFLEX,
    "CLIPImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,  # DINOv2
    "LlavaImageProcessor": _CLIP,
    "LlavaNextImageProcessor": _CLIP | {"image_grid_pinpoints": _PINPOINTS, "aspect_ratio_setting": "anyres"},
    "Idefics3ImageProcessor": _IDEFICS3,
    "SmolVLMImageProcessor": _IDEFICS3,
}
"""What a missing or null key means depends on the kind of processor that the file names; these are the keys it has."""

_HARMLESS = {
    "image_processor_type", "feature_extractor_type", "processor_class",  # read before, or names of Python classes
    "do_convert_rgb",  # every picture is RGB by then
    "do_pad",  # fills up a batch; only LlavaImageProcessor pads the picture itself
    "data_format", "input_data_format", "device", "return_tensors", "disable_grouping", "return_row_col_info",
    "_valid_processor_keys",  # how Python hands the pixels on
    "image_seq_length",  # the prompt's, not the pixels'
    "video_sampling",  # pictures are not videos
}  # fmt: skip
_NOT_DONE = {"pad_size", "size_divisor", "use_square_size"}
_SIZE_KEYS = ({"height", "width"}, {"shortest_edge"}, {"longest_edge"})
_SIZES_NOT_DONE = {"max_height", "max_width", "min_pixels", "max_pixels"}


def preprocess_from_hf(raw: Mapping[str, Any]) -> Preprocess:
    """Read the table of a `preprocessor_config.json` (or the `image_processor` table of a `processor_config.json`).

    Raises:
        ConfigError: an unknown key, a kind of processor or a setting that is not implemented, or a malformed value.
    """
    kind = _kind(raw)
    known = _DEFAULTS[kind]
    check_keys(raw, {*known, *_HARMLESS, *_NOT_DONE}, f"{WHERE} ({kind})")
    for key in sorted(_NOT_DONE & raw.keys()):
        if raw[key] not in (None, False):
            raise ConfigError(f"{WHERE}: {key} is {raw[key]!r}, which is not implemented")
    given = known | {key: value for key, value in raw.items() if value is not None}
    if given.get("aspect_ratio_setting", "anyres") != "anyres":
        setting = given["aspect_ratio_setting"]
        raise ConfigError(f"{WHERE}: aspect_ratio_setting is {setting!r}, which is not implemented; anyres is")
    layout = _layout(given)
    settings: dict[str, Any] = {}
    resize = _switch(given, "do_resize") or layout == "anyres"  # whose whole picture is always resized
    if resize and given["size"] is not None:
        settings |= _size(given, "size", square=_switch(given, "default_to_square"))
    if _switch(given, "do_center_crop"):
        settings["crop"] = _crop(given)
    settings["rescale_factor"] = _number(given, "rescale_factor") if _switch(given, "do_rescale") else None
    if _switch(given, "do_normalize"):
        settings |= {"mean": _channels(given, "image_mean"), "std": _channels(given, "image_std")}
    if layout == "anyres":
        height, width = _crop(given)
        if height != width:
            raise ConfigError(f"{WHERE}: crop_size is {height} x {width}; the crops of a grid must be square")
        settings |= {"tile_size": height, "grid_pinpoints": _pinpoints(given["image_grid_pinpoints"])}
    if layout == "split":
        side = _size(given, "max_image_size", square=True).get("longest_edge")
        if side is None:
            raise ConfigError(f"{WHERE}: max_image_size is {given['max_image_size']!r}; it needs a longest_edge")
        settings |= {"tile_size": side, "split": _switch(given, "do_image_splitting")}
    if layout == "naflex":
        settings["patch_size"] = _whole(given["patch_size"], "patch_size")
        settings["max_num_patches"] = _whole(given["max_num_patches"], "max_num_patches") if resize else None
    settings["pad_to_square"] = kind == "LlavaImageProcessor" and _switch(given, "do_pad")
    settings["resample"] = _whole(given["resample"], "resample")
    return Preprocess(layout=layout, **settings)


def preprocess_to_hf(preprocess: Preprocess) -> dict[str, Any]:
    """The table of a `preprocessor_config.json` that says the same; every key stands in it."""
    kind = {
        "anyres": "LlavaNextImageProcessor", "split": "Idefics3ImageProcessor", "naflex": "Siglip2ImageProcessor",
    }.get(preprocess.layout)  # fmt: skip
    if kind is None:
        kind = "LlavaImageProcessor" if preprocess.pad_to_square else "CLIPImageProcessor"
    size: dict[str, int] | None = None
    if preprocess.size is not None:
        size = {"height": preprocess.size[0], "width": preprocess.size[1]}
    for name in ("shortest_edge", "longest_edge"):
        if getattr(preprocess, name) is not None:
            size = {name: getattr(preprocess, name)}
    table = {
        "image_processor_type": kind,
        "do_resize": size is not None,
        "size": size,
        "resample": preprocess.resample,
        "do_rescale": preprocess.rescale_factor is not None,
        "rescale_factor": preprocess.rescale_factor,
        "do_normalize": preprocess.mean is not None,
        "image_mean": None if preprocess.mean is None else list(preprocess.mean),
        "image_std": None if preprocess.std is None else list(preprocess.std),
    }
    if preprocess.layout == "naflex":
        del table["size"]
        resized = preprocess.max_num_patches is not None
        table |= {"patch_size": preprocess.patch_size, "do_resize": resized}
        return table | ({"max_num_patches": preprocess.max_num_patches} if resized else {})
    if preprocess.layout == "split":
        return table | {
            "max_image_size": {"longest_edge": preprocess.tile_size},
            "do_image_splitting": preprocess.split,
        }
    crop = preprocess.crop
    if preprocess.layout == "anyres":
        crop = (preprocess.tile_size or 1, preprocess.tile_size or 1)
        table["image_grid_pinpoints"] = [list(pair) for pair in preprocess.grid_pinpoints]
    if preprocess.pad_to_square:
        table["do_pad"] = True
    return table | {
        "do_center_crop": crop is not None,
        "crop_size": None if crop is None else {"height": crop[0], "width": crop[1]},
    }


def _kind(raw: Mapping[str, Any]) -> str:
    """The name of the processor, the same for its several implementations and for files of before 2023."""
    written = raw.get("image_processor_type") or raw.get("feature_extractor_type")
    if not isinstance(written, str):
        raise ConfigError(f"{WHERE}: there is no image_processor_type; known are {', '.join(_DEFAULTS)}")
    name = written.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in _DEFAULTS:
        raise ConfigError(f"{WHERE}: image_processor_type {written} is not implemented{nearest(name, _DEFAULTS)}")
    return name


def _layout(given: Mapping[str, Any]) -> Layout:
    """By the keys that the kind of processor has."""
    if "max_num_patches" in given:
        return "naflex"
    if "image_grid_pinpoints" in given:
        return "anyres"
    return "split" if "max_image_size" in given else "single"


def _switch(given: Mapping[str, Any], key: str) -> bool:
    value = given.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{WHERE}: {key} must be true or false, not {value!r}")
    return value


def _number(given: Mapping[str, Any], key: str) -> float:
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{WHERE}: {key} must be a number, not {value!r}")
    return float(value)


def _whole(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{WHERE}: {key} must be a whole number of at least 0, not {value!r}")
    return value


def _channels(given: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values = given[key]
    if not isinstance(values, list | tuple):
        return (_number(given, key),) * 3
    return tuple(_number({key: value}, key) for value in values)


def _size(given: Mapping[str, Any], key: str, *, square: bool) -> dict[str, Any]:
    """`size`, `shortest_edge` or `longest_edge` for `Preprocess`. One number is a square or the shortest edge."""
    value = given[key]
    if isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    elif not isinstance(value, Mapping):
        edge = _whole(value, key)
        value = {"height": edge, "width": edge} if square else {"shortest_edge": edge}
    known = set().union(*_SIZE_KEYS)
    check_keys(value, known | _SIZES_NOT_DONE, f"{WHERE}: {key}")
    edges = {name: _whole(edge, f"{key}.{name}") for name, edge in value.items() if edge is not None}
    if edges.keys() not in _SIZE_KEYS:
        raise ConfigError(f"{WHERE}: {key} by {' and '.join(sorted(edges)) or 'nothing'} is not implemented")
    return {"size": (edges["height"], edges["width"])} if "height" in edges else edges


def _crop(given: Mapping[str, Any]) -> tuple[int, int]:
    if given["crop_size"] is None:
        raise ConfigError(f"{WHERE}: do_center_crop is true and crop_size is missing")
    size = _size(given, "crop_size", square=True).get("size")
    if size is None:
        raise ConfigError(f"{WHERE}: crop_size is {given['crop_size']!r}; it needs height and width")
    return size


def _pinpoints(value: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in value
    ):
        raise ConfigError(f"{WHERE}: image_grid_pinpoints must be a list of pairs [height, width], not {value!r}")
    return tuple((_whole(h, "image_grid_pinpoints"), _whole(w, "image_grid_pinpoints")) for h, w in value)
