"""What every configuration is checked for, and how one is built from a file's table.

Every key of a file is either understood, or on the list of keys that do not change the numbers, or an error that
names the nearest known key. Nothing is dropped silently.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ..errors import ConfigError

# Keys that say nothing about the arithmetic, or that only restate it.
HF_IGNORED = {
    "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures", "attention_dropout",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dropout", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "model_type",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type", "pruned_heads",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache",
}  # fmt: skip


def require(condition: bool, message: str, config: Any) -> None:
    if not condition:
        raise ConfigError(f"{type(config).__name__}: {message}")


def section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = raw.get(key)
    if not isinstance(section, Mapping):
        raise ConfigError(f"config.json: {key} is missing or not a table")
    return section


def check_keys(raw: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = set(known)
    for key in raw:
        if key not in known:
            raise ConfigError(f'{where}: unknown key "{key}"{nearest(key, known)}')


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean "…"?` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(str(word), sorted(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def path_matches(path: str, pattern: str) -> bool:
    """Whether a glob means a module's path: all of it or its end, or a module that it lies in."""
    return any(fnmatchcase(path, glob) for glob in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*"))


def from_dict(cls: type[Any], raw: Mapping[str, Any], where: str) -> Any:
    """A config dataclass from a table of its own field names; lists become tuples.

    Raises:
        ConfigError: an unknown key or a value of the wrong type.
    """
    check_keys(raw, {field.name for field in dataclasses.fields(cls)}, where)
    return build(cls, {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}, where)


def expect(raw: Mapping[str, Any], key: str, value: Any, where: str) -> None:
    if key in raw and raw[key] is not None and raw[key] != value:
        raise ConfigError(f"{where}: {key} is {raw[key]!r}; this model needs {value!r}")


def build(cls: type[Any], given: Mapping[str, Any], where: str) -> Any:
    """Construct a config after checking that numbers are numbers; `field.type` is the annotation as written."""
    for field in dataclasses.fields(cls):
        if field.name not in given or field.type not in ("int", "float"):
            continue
        value = given[field.name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{where}: {field.name} must be a number, not {value!r}")
        if field.type == "int" and (not isinstance(value, int) or value < 0):
            raise ConfigError(f"{where}: {field.name} must be a whole number of at least 0, not {value!r}")
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
