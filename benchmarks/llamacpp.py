"""llama.cpp as a peer: greedy generation from a GGUF file, through llama-cpp-python's C interface.

Its own defaults but for the number of threads: memory-mapped files, weights repacked where llama.cpp has a layout for
them, an fp16 cache. Logits go to Python once a token, as little as its interface allows.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
from own_thread import in_own_thread
from torch import Tensor


def missing() -> list[str]:
    """The packages that this peer needs and that are not installed, by their names on PyPI."""
    needed = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
    return [package for module, package in needed.items() if importlib.util.find_spec(module) is None]


@functools.cache
def silent_library() -> Any:
    import llama_cpp

    llama_cpp.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C holds no reference
    llama_cpp.llama_log_set(llama_cpp.silent, None)
    return llama_cpp


class LlamaCpp:
    """A model and its cache; torch is loaded before it, and lends it its OpenMP."""

    @in_own_thread
    def __init__(self, file: Path, threads: int, context: int) -> None:
        self.library = llama_cpp = silent_library()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp has no memory for its context")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    @in_own_thread
    def logits(self, tokens: list[int]) -> Tensor:
        """Of what follows `tokens`, which follow what the cache holds: [vocab] fp32, valid until the next call."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if failed := self.library.llama_decode(self.context, self.library.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError(f"llama_decode returns {failed}")
        values = self.library.llama_get_logits_ith(self.context, -1)
        return torch.frombuffer(
            (ctypes.c_float * self.vocabulary).from_address(ctypes.addressof(values.contents)), dtype=torch.float32
        )

    def forget(self) -> None:
        """Empty the cache."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), False)

    def generate(self, prompt: list[int], count: int) -> list[int]:
        self.forget()
        chosen = [int(self.logits(prompt).argmax())]
        while len(chosen) < count:
            chosen.append(int(self.logits(chosen[-1:]).argmax()))
        return chosen
