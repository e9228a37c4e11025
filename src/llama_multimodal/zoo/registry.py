"""The table of known checkpoints. Any other of their families loads as well; these have figures."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path

EMBEDDED_FOLDER = Path(__file__).parent / "tiny"
"""Where the embedded model's files lie."""
EMBEDDED_MISSING = "the embedded model is not in this copy"
EMBEDDED_MEND = "install the package again, or train the model: llama-mm train recipes/tiny.yaml"

_LLAMA_LICENSE = "Llama 3.2 Community License"
_LLAMA_LICENSE_URL = "https://huggingface.co/meta-llama/Llama-3.2-11B-Vision-Instruct/blob/main/LICENSE.txt"


@dataclass(frozen=True)
class Checkpoint:
    """What one knows of a checkpoint before having it."""

    name: str  # what `load` and `--model` take
    parameters: int  # of the model as it is built here; 0 where an embedded model has not been built in
    tile_size: int | None  # side of one tile, pixels; None for a model that reads text only
    max_tiles: int | None
    context: int  # tokens
    license: str
    license_url: str | None
    summary: str
    gated: bool = False  # the hub asks for an account that has accepted the licence
    embedded: bool = False

    def num_bytes(self, bytes_per_parameter: int = 2) -> int:
        """Size of the weights, on disk and in memory; 2 bytes each in bf16 and fp16, 4 in fp32."""
        return self.parameters * bytes_per_parameter

    @property
    def available(self) -> bool:
        """Whether it is there without a download: an embedded model whose files are in this copy."""
        return self.embedded and self.parameters > 0


_EMBEDDED = "Colours, shapes, counts, positions, short printed words and bar charts, in drawings"
_INSTRUCT, _BASE = "Answers questions and follows instructions", "Continues text; not tuned for conversations"
_GATED_MODELS = (
    ("meta-llama/Llama-3.2-11B-Vision-Instruct", 10_670_220_835, _INSTRUCT),
    ("meta-llama/Llama-3.2-11B-Vision", 10_670_220_835, _BASE),
    ("meta-llama/Llama-3.2-90B-Vision-Instruct", 88_593_355_323, _INSTRUCT),
    ("meta-llama/Llama-3.2-90B-Vision", 88_593_355_323, _BASE),
)


_TEXT = "Follows instructions; text only"
_APACHE, _LLAMA_2 = "Apache 2.0", "Llama 2 Community License"
_TEXT_MODELS = (
    ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, 131072, _LLAMA_LICENSE, _TEXT),
    ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, 131072, _LLAMA_LICENSE, _TEXT),
    ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, 131072, "Llama 3.1 Community License", _TEXT),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, 8192, _APACHE, _TEXT),
    ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, 8192, _APACHE, _TEXT),
    ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, 8192, _APACHE, _TEXT),
    ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384, 2048, _APACHE, _TEXT),
    ("lmsys/vicuna-7b-v1.5", 6_738_415_616, 4096, _LLAMA_2, _TEXT),
)

_VISION = "Answers questions about pictures"
_VISION_MODELS = (  # name, parameters, side of a tile, tiles at most, context, licence
    ("llava-hf/llava-1.5-7b-hf", 7_063_427_072, 336, 1, 4096, _LLAMA_2),
    ("llava-hf/llava-v1.6-vicuna-7b-hf", 7_063_431_168, 336, 5, 4096, _LLAMA_2),
    ("llava-hf/llava-v1.6-mistral-7b-hf", 7_566_747_648, 336, 5, 32768, _APACHE),
    ("HuggingFaceM4/Idefics3-8B-Llama3", 8_462_086_384, 364, 17, 131072, _APACHE),
    ("HuggingFaceTB/SmolVLM-256M-Instruct", 256_484_928, 512, 17, 8192, _APACHE),
    ("HuggingFaceTB/SmolVLM-500M-Instruct", 507_482_304, 512, 17, 8192, _APACHE),
    ("HuggingFaceTB/SmolVLM-Instruct", 2_246_272_880, 384, 17, 16384, _APACHE),
)


def checkpoints() -> list[Checkpoint]:
    """Every known checkpoint, the embedded model first."""
    return [
        _tiny(),
        *(
            Checkpoint(name, parameters, 560, 4, 131072, _LLAMA_LICENSE, _LLAMA_LICENSE_URL, summary, gated=True)
            for name, parameters, summary in _GATED_MODELS
        ),
        *(
            Checkpoint(name, parameters, None, None, context, licence, None, summary, "meta-llama/" in name)
            for name, parameters, context, licence, summary in _TEXT_MODELS
        ),
        *(
            Checkpoint(name, parameters, tile_size, max_tiles, context, licence, None, _VISION)
            for name, parameters, tile_size, max_tiles, context, licence in _VISION_MODELS
        ),
    ]


def find(name: str) -> Checkpoint | None:
    """A checkpoint by its exact name."""
    return next((checkpoint for checkpoint in checkpoints() if checkpoint.name == name), None)


def nearest_name(name: str) -> str | None:
    """The known name that someone who wrote `name` most likely meant."""
    names = {known.lower(): known for checkpoint in checkpoints() for known in _spellings(checkpoint.name)}
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    if not close:
        return None
    return next(c.name for c in checkpoints() if names[close[0]] in _spellings(c.name))


def _spellings(name: str) -> tuple[str, ...]:
    return (name, name.rpartition("/")[2])


def _tiny() -> Checkpoint:
    """Its figures come from its own files, so that they are never out of date."""
    vision, text = {}, {}
    try:
        config = json.loads((EMBEDDED_FOLDER / "config.json").read_text(encoding="utf-8"))
        vision, text = config["vision_config"], config["text_config"]
        parameters = sum(_parameters(file) for file in EMBEDDED_FOLDER.glob("*.safetensors"))
    except (OSError, ValueError, KeyError):
        parameters = 0
    return Checkpoint(
        name="tiny",
        parameters=parameters,
        tile_size=vision.get("image_size", 128),
        max_tiles=vision.get("max_num_tiles", 4),
        context=text.get("max_position_embeddings", 2048),
        license="MIT",
        license_url=None,
        summary=_EMBEDDED,
        embedded=True,
    )


def _parameters(file: Path) -> int:
    """Elements of every tensor in a safetensors file, by its header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
