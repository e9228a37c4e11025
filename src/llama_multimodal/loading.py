"""`load`: from a name or a folder to a model that is ready and the processor that feeds it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from .config import AnyModelConfig, ModelConfig, TiledVisionConfig
from .errors import CheckpointError, DeviceError
from .models import LanguageModel
from .ops import Format
from .processing.gguf_tokenizer import tokenizer_from_gguf
from .processing.preprocess import load_preprocess
from .processing.processor import Processor
from .processing.template import ChatTemplate
from .processing.tokenizer import Tokenizer
from .quant.pack import Packing, recommended, use_int8_activations
from .weights.checkpoint import Checkpoint, Progress, open_checkpoint, read_model
from .weights.gguf import GGUFFile
from .weights.save import save_checkpoint
from .zoo.registry import EMBEDDED_FOLDER, EMBEDDED_MEND, EMBEDDED_MISSING, checkpoints, nearest_name

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip

_EMBEDDED = "tiny"
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


def load(
    path_or_repo_id: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    pack: Packing | str | None = None,
    int8_activations: bool = False,
    progress: Progress | None = None,
) -> tuple[LanguageModel, Processor]:
    """Load a checkpoint in Hugging Face's, Meta's or GGUF's layout, found by itself; weights stream to the device.

    path_or_repo_id: a folder, a `.gguf` file, a hub id, or `tiny` for the embedded model
    dtype: float32, bfloat16 or float16 (or its name); None takes the checkpoint's
    device: "meta" gives the model without its weights
    pack: "bf16", "int8" or "int4" packs the decoder's linear layers as they come, so that the plain weights are never
        all in memory; int4 spares what `quant.pack.recommended` says, and a `quant.pack.Packing` chooses otherwise. A
        checkpoint that was saved packed needs nothing.
        "auto" takes bf16 where that loses nothing and decodes faster, for a bf16 model on a CPU
    int8_activations: round the activations to 8 bits as well, see `quant.pack.use_int8_activations`
    progress: called with bytes done and bytes in all

    Returns:
        The model in eval mode, and a processor (without a tokenizer if the checkpoint has none).

    Raises:
        CheckpointError: not there, damaged, or not fitting its configuration.
        ConfigError: a configuration that is damaged or asks for something unknown.
        DeviceError: the dtype or the device is not there, or has too little memory.
    """
    place, kind = pick_device(device), pick_dtype(dtype)
    checkpoint, processor = open_model(path_or_repo_id)
    if kind is None:
        kind = stored_dtype(checkpoint)
    if pack == "auto":
        loses_nothing = kind == torch.bfloat16 and place.type == "cpu" and not checkpoint.packed
        pack = "bf16" if loses_nothing else None
    if isinstance(pack, str):
        pack = recommended(cast(Format, pack), checkpoint.config.text)  # other names are refused there
    model = read_model(checkpoint, kind, place, progress, pack)
    if int8_activations:
        use_int8_activations(model)
    return model.eval(), processor


def open_model(path_or_repo_id: str | Path) -> tuple[Checkpoint, Processor]:
    """A checkpoint whose names and shapes are checked and whose weights are not read yet, and its processor.

    Raises:
        CheckpointError, ConfigError: as `load`.
    """
    checkpoint = open_checkpoint(locate(path_or_repo_id))
    tokenizer, template = read_text(checkpoint)
    preprocess = load_preprocess(checkpoint.folder) if _reads_preprocess(checkpoint.config) else None
    checkpoint = replace(checkpoint, config=with_end_tokens(checkpoint.config, tokenizer))
    return checkpoint, Processor(checkpoint.config, tokenizer, template, preprocess)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that a checkpoint's model runs in, if nothing else is asked for."""
    return checkpoint.dtype if checkpoint.dtype in DTYPES.values() else torch.float32


def save(model: LanguageModel, processor: Processor | None, folder: str | Path) -> None:
    """Write a model, and its processor's files, into a folder that `load` reads; all of it or nothing.

    A checkpoint of Hugging Face's layout that lies in the folder is replaced.

    Raises:
        CheckpointError: the model has no weights, or the folder cannot be written.
    """
    save_checkpoint(model, folder, beside=None if processor is None else processor.save)


def read_text(checkpoint: Checkpoint) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """What a checkpoint has for text."""
    if not isinstance(checkpoint.store, GGUFFile):
        folder, config = checkpoint.folder, checkpoint.config
        # Llama 3.2 Vision writes conversations as Meta does, whatever its template says.
        metas = isinstance(config, ModelConfig) and config.model_type == "mllama"
        return Tokenizer.load(folder), None if metas else ChatTemplate.load(folder)
    found = tokenizer_from_gguf(checkpoint.store.metadata)
    if found is None:
        return None, None
    template = None if found.chat_template is None else ChatTemplate(found.chat_template, found.named)
    return Tokenizer(found.backend, found.special_tokens), template


def _reads_preprocess(config: AnyModelConfig) -> bool:
    """Whether pictures are cut as a file says; Meta's tiles follow from the model's configuration."""
    return isinstance(config, ModelConfig) and not isinstance(config.vision, TiledVisionConfig)


def with_end_tokens(config: AnyModelConfig, tokenizer: Tokenizer | None) -> AnyModelConfig:
    """Where a checkpoint names no end tokens (Meta's files do not), its tokenizer does."""
    names = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    if config.text.eos_token_ids or tokenizer is None or not tokenizer.special_tokens.keys() & set(names):
        return config
    special = tokenizer.special_tokens
    bos = special.get("<|begin_of_text|>", config.text.bos_token_id)
    pad = special.get("<|finetune_right_pad_id|>", config.text.pad_token_id)
    eos = tuple(special[name] for name in names if name in special)
    if max(bos, pad, *eos) >= config.text.vocab_size:  # another model's tokenizer
        return config
    return replace(config, text=replace(config.text, bos_token_id=bos, eos_token_ids=eos, pad_token_id=pad))


def pick_device(device: torch.device | str) -> torch.device:
    """A device that is there.

    Raises:
        DeviceError: it is not.
    """
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except Exception as error:  # torch raises AssertionError, RuntimeError, NotImplementedError and others
        count = torch.cuda.device_count()
        there = ["cpu", *(f"cuda:{i}" for i in range(count)), *(["mps"] if torch.backends.mps.is_available() else [])]
        raise DeviceError(f'the device "{device}" is not there; this machine has {", ".join(there)}') from error
    return place


def pick_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype that models run in.

    Raises:
        DeviceError: another dtype or an unknown name.
    """
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise DeviceError(f'models run in float32, bfloat16 or float16, not in "{dtype}"')
    return found


# --- finding a checkpoint ---------------------------------------------------------------------------------------------


def locate(source: str | Path) -> Path:
    """The folder of a checkpoint, or a GGUF file; what lies on the hub is downloaded into its cache.

    source: a folder, a `.gguf` file, `tiny` (the embedded model), or a hub id such as
        `meta-llama/Llama-3.2-11B-Vision-Instruct`

    Raises:
        CheckpointError: it is not there, may not be downloaded, or does not fit on the disk.
    """
    if source == _EMBEDDED:
        if not EMBEDDED_FOLDER.is_dir():
            raise CheckpointError(f"{EMBEDDED_MISSING}; {EMBEDDED_MEND}")
        return EMBEDDED_FOLDER
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        if path.suffix == ".gguf" and path.is_file():
            return path
        if path.exists():
            raise CheckpointError(f"{path} is a file; give the folder that it lies in")
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero byte, ~nobody
        raise CheckpointError(f"{str(source)[:80]!r} is not a folder: {str(error)[:80]}") from error
    if isinstance(source, str) and re.fullmatch(r"\w[\w.-]{0,95}/[\w.-]{1,96}", source):
        return _download(source)
    first = ", ".join(known.name for known in checkpoints()[:2])
    hint = _hint(str(source)) or f"; known: {first} and others, which `llama-mm zoo` lists"
    raise CheckpointError(f"there is no folder and no model {str(source)[:200]!r}{hint}")


def _hint(name: str) -> str:
    near = nearest_name(name)
    return f'; did you mean "{near}"?' if near not in (None, name) else ""


def _download(repo_id: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    page = f"https://huggingface.co/{repo_id}"
    try:
        return Path(snapshot_download(repo_id, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id} is gated: accept its licence on {page}, then run `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        hint = _hint(repo_id)
        raise CheckpointError(
            f"there is neither a folder {repo_id} nor a public repository of that name on the Hugging Face hub{hint};"
            " for a private or gated one run `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f'"{repo_id}" is neither a folder nor a valid hub id{_hint(repo_id)}') from error
    except Exception as error:  # the hub's client lets every transport's own errors through
        raise CheckpointError(_why(repo_id, error)) from error


def _why(repo_id: str, error: BaseException) -> str:
    for cause in _chain(error):
        if getattr(cause, "errno", None) == errno.ENOSPC or "No space left" in str(cause):
            return f"the disk is full while downloading {repo_id}; free some space, or set HF_HOME to a larger disk"
        if isinstance(cause, PermissionError):
            return f"the download cache cannot be written ({cause}); set HF_HOME to a folder that can"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"access to {repo_id} was refused ({status}); run `hf auth login` or set HF_TOKEN to a valid token"
    if status is not None:
        return f"the Hugging Face hub answered {status} for {repo_id}; try again later, or give a local folder"
    return (
        f"{repo_id} is neither a folder nor in the download cache, and the Hugging Face hub cannot be reached"
        f'{_hint(repo_id)}; check the network, give a local folder, or use the embedded model "{_EMBEDDED}"'
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
