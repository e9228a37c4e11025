"""One matrix product of llama.cpp, as a peer: ggml's own library, from llama-cpp-python, through ctypes, in a
process of its own.

As llama.cpp does it: weights in the repacked layout where ggml has one for them, activations in fp32.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from peer_process import call, settle

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {"bf16": 30, "int8": 8, "int4": 2}
"""GGML_TYPE_BF16, Q8_0 and Q4_0; the latter two have a scale for 32 values."""
_F32 = 0
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)(lambda level, text, data: None)


class _Memory(ctypes.Structure):
    """ggml_init_params: tensors' heads only, their data lies in buffers of a backend."""

    _fields_ = [("size", _SIZE), ("buffer", _POINTER), ("no_alloc", ctypes.c_bool)]


def installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def quantize(weight: Tensor, format: str) -> Tensor:
    """Rows as they lie in a GGUF file: [N, K] → uint8 [N, bytes of a row]."""
    import torch

    if format == "bf16":
        return weight.bfloat16().contiguous().view(torch.uint8)
    (outputs, inputs), kind, ggml = weight.shape, TYPES[format], _ggml(1)
    source = weight.float().contiguous()
    stored = torch.empty(outputs, ggml.call("ggml_row_size", kind, inputs), dtype=torch.uint8)
    ggml.call("ggml_quantize_chunk", kind, source.data_ptr(), stored.data_ptr(), 0, outputs, inputs, None)
    return stored


def product(x: Tensor, weight: Tensor, format: str, threads: int) -> Callable[[], float]:
    """x: [T, K], weight: [N, K], both fp32 → a function that runs ggml's mul_mat of the rounded weight, and returns the
    seconds that it took there."""
    stored = quantize(weight, format).numpy()
    number = call("ggml", "_prepare", x.float().contiguous().numpy(), stored, weight.shape[0], format, threads)

    def run() -> float:
        settle()
        seconds: float = call("ggml", "_run", number)
        settle()
        return seconds

    return run


# --- in the process of its own ---------------------------------------------------------------------------------------

_products: list[Callable[[], None]] = []


def _prepare(x: NDArray[np.float32], stored: NDArray[np.uint8], outputs: int, format: str, threads: int) -> int:
    _products.append(_ggml(threads).product(x, stored, outputs, format))
    return len(_products) - 1


def _run(number: int) -> float:
    _products[number - 1]()  # other weights: what is timed finds the threads awake and its own weight in memory
    started = time.perf_counter()
    _products[number]()
    return time.perf_counter() - started


@functools.cache
def _ggml(threads: int) -> _Ggml:
    return _Ggml(threads)


class _Ggml:
    """The CPU backend with a number of threads."""

    def __init__(self, threads: int) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent / "lib"
        self._libraries = [
            ctypes.CDLL(str(folder / f"libggml{part}.so"), mode=ctypes.RTLD_GLOBAL) for part in ("-base", "-cpu", "")
        ]
        self.call("ggml_log_set", _SILENT, None)
        self._backend = self.call("ggml_backend_cpu_init")
        self.call("ggml_backend_cpu_set_n_threads", self._backend, threads)

    def call(self, name: str, *arguments: Any) -> Any:
        """Whole numbers are passed as pointers are; every result is one."""
        function = next(getattr(lib, name) for lib in self._libraries if hasattr(lib, name))
        function.restype = _POINTER
        return function(*(_POINTER(a) if isinstance(a, int) else a for a in arguments))

    def _context(self, tensors: int, graph: bool = False) -> int:
        size = tensors * self.call("ggml_tensor_overhead") + (self.call("ggml_graph_overhead") if graph else 0)
        return self.call("ggml_init", _Memory(size, None, True))

    def _repacked(self, format: str) -> int | None:
        """The first buffer type that lays out tensors of a format anew when they are set."""
        if format == "bf16":
            return None
        named = (b"AMX", b"CPU_REPACK") if format == "int4" else (b"AMX",)  # ggml repacks only Q4_0 without AMX
        device = self.call("ggml_backend_dev_by_type", 0)
        registry = self.call("ggml_backend_dev_backend_reg", device)
        address = self.call("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        types = ctypes.cast(ctypes.CFUNCTYPE(_POINTER, _POINTER)(address)(device), ctypes.POINTER(_POINTER))
        index = 0
        while types[index]:
            if ctypes.string_at(self.call("ggml_backend_buft_name", types[index])) in named:
                return types[index]
            index += 1
        return None

    def product(
        self, x: NDArray[np.float32], stored: NDArray[np.uint8], outputs: int, format: str
    ) -> Callable[[], None]:
        """x: [T, K], stored: the weight's rows as `quantize` returns them → a function that runs mul_mat."""
        (rows, inputs), kind = x.shape, TYPES[format]
        holder = self._context(1)
        packed = self.call("ggml_new_tensor_2d", holder, kind, inputs, outputs)
        if repacked := self._repacked(format):
            self.call("ggml_backend_alloc_ctx_tensors_from_buft", holder, repacked)
        else:
            self.call("ggml_backend_alloc_ctx_tensors", holder, self._backend)
        self.call("ggml_backend_tensor_set", packed, stored.ctypes.data, 0, self.call("ggml_nbytes", packed))

        steps = self._context(8, graph=True)
        given = self.call("ggml_new_tensor_2d", steps, _F32, inputs, rows)
        result = self.call("ggml_mul_mat", steps, packed, given)
        graph = self.call("ggml_new_graph", steps)
        self.call("ggml_build_forward_expand", graph, result)
        self.call("ggml_backend_alloc_ctx_tensors", steps, self._backend)
        self.call("ggml_backend_tensor_set", given, x.ctypes.data, 0, x.nbytes)
        out = np.empty((rows, outputs), np.float32)

        def run() -> None:
            self.call("ggml_backend_graph_compute", self._backend, graph)
            self.call("ggml_backend_tensor_get", result, out.ctypes.data, 0, out.nbytes)

        return run
