"""`config.json`, read and written: which family a checkpoint is of, and what its model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError
from .assembled import ASSEMBLED, assembled_from_hf, assembled_to_hf
from .checks import expect, nearest
from .hf_mllama import mllama_from_hf, mllama_to_hf
from .hf_splice import idefics3_from_hf, idefics3_to_hf, llava_from_hf, llava_to_hf
from .hf_text import llama_text_from_hf, text_to_hf
from .model import AnyModelConfig, LanguageModelConfig, ModelConfig

Reader = Callable[[Mapping[str, Any], Mapping[str, Any]], AnyModelConfig]
Writer = Callable[[ModelConfig], dict[str, Any]]


def config_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> AnyModelConfig:
    """`config.json` (and `generation_config.json`, whose stop tokens win) of any supported model.

    Raises:
        ConfigError: another `model_type`, an unknown key, a missing key, or a value this project does not implement.
    """
    kind = raw.get("model_type")
    if kind not in _READERS:
        hint = nearest(str(kind), _READERS)
        raise ConfigError(f'config.json has model_type "{kind}"; supported: {", ".join(_READERS)}{hint}')
    expect(raw, "quantization_config", None, "config.json")
    return _READERS[kind](raw, generation or {})


def config_to_hf(config: AnyModelConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads for this model; for one that transformers lacks, our own."""
    if isinstance(config, LanguageModelConfig):
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **text_to_hf(config.text)}
    return _WRITERS[config.model_type](config)


def _llama_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> LanguageModelConfig:
    return LanguageModelConfig(llama_text_from_hf(raw, generation, "config.json"))


_READERS: dict[str, Reader] = {
    "mllama": mllama_from_hf,
    "llama": _llama_from_hf,
    "llava": llava_from_hf,
    "llava_next": llava_from_hf,
    "idefics3": idefics3_from_hf,
    "smolvlm": idefics3_from_hf,
    ASSEMBLED: assembled_from_hf,
}
_WRITERS: dict[str, Writer] = {
    "mllama": mllama_to_hf,
    "llava": llava_to_hf,
    "llava_next": llava_to_hf,
    "idefics3": idefics3_to_hf,
    "smolvlm": idefics3_to_hf,
    ASSEMBLED: assembled_to_hf,
}
