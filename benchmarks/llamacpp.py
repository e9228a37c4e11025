"""llama.cpp as a peer: greedy generation from a GGUF file, through llama-cpp-python's C interface, in a process of its
own.

Its own defaults but for the number of threads: memory-mapped files, weights repacked where llama.cpp has a layout for
them, an fp16 cache. Logits go to Python once a token, as little as its interface allows.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peer_process import call


def missing() -> list[str]:
    """The packages that this peer needs and that are not installed, by their names on PyPI."""
    needed = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
    return [package for module, package in needed.items() if importlib.util.find_spec(module) is None]


class LlamaCpp:
    """A model and its cache, from here."""

    def __init__(self, file: Path, threads: int, context: int) -> None:
        self._number: int = call("llamacpp", "_load", str(file), threads, context)

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Of what follows `tokens`, with an empty cache before them: [vocab]."""
        return call("llamacpp", "_logits", self._number, tokens)

    def generate(self, prompt: list[int], count: int) -> list[int]:
        return call("llamacpp", "_generate", self._number, prompt, count)


# --- in the process of its own ---------------------------------------------------------------------------------------

_models: list[_Model] = []


def _load(file: str, threads: int, context: int) -> int:
    _models.append(_Model(file, threads, context))
    return len(_models) - 1


def _logits(number: int, tokens: list[int]) -> NDArray[np.float32]:
    _models[number].forget()
    return _models[number].logits(tokens).copy()


def _generate(number: int, prompt: list[int], count: int) -> list[int]:
    model = _models[number]
    model.forget()
    chosen = [int(model.logits(prompt).argmax())]
    while len(chosen) < count:
        chosen.append(int(model.logits(chosen[-1:]).argmax()))
    return chosen


@functools.cache
def _silent_library() -> Any:
    import llama_cpp

    llama_cpp.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C holds no reference
    llama_cpp.llama_log_set(llama_cpp.silent, None)
    return llama_cpp


class _Model:
    def __init__(self, file: str, threads: int, context: int) -> None:
        self.library = llama_cpp = _silent_library()
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp has no memory for its context")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Of what follows `tokens`, which follow what the cache holds: [vocab], valid until the next call."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if failed := self.library.llama_decode(self.context, self.library.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError(f"llama_decode returns {failed}")
        return np.ctypeslib.as_array(self.library.llama_get_logits_ith(self.context, -1), (self.vocabulary,))

    def forget(self) -> None:
        """Empty the cache."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), False)
