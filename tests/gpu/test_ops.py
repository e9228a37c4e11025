"""Every op on every GPU backend against the reference in fp64 on the same device: values and gradients."""

from __future__ import annotations

import pytest
import torch
from backends.cases import CASES, Case, check
from backends.references import FLOATS, name_of, randn

from llama_multimodal import ops
from llama_multimodal.ops import _dispatch


def skip_where_refused(case: Case, backend: str, dtype: torch.dtype) -> None:
    if why := objection(case, backend, dtype):
        pytest.skip(why)


def objection(case: Case, backend: str, dtype: torch.dtype) -> str | None:
    """Why a backend leaves a case to another one."""
    kernel = _dispatch._kernels.get((case.op, backend))
    if kernel is None:
        return f"{case.op} is left to torch on {backend}"
    args, kwargs = case.arguments(dtype, "cuda")
    if kernel.leaves(*args, **kwargs):
        return f"{case} is left to another backend by {backend}"
    return _dispatch._objection(kernel, args, kwargs)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    skip_where_refused(case, backend, dtype)
    check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_every_kernel_takes_a_case(dtype: torch.dtype, backend: str) -> None:
    held = {op for op, other in _dispatch._kernels if other == backend} - {"prepare_weight"}
    assert held == {case.op for case in CASES if objection(case, backend, dtype) is None}


def test_left_to_itself_the_dispatch_takes_the_first_backend(backend: str) -> None:
    """cuda before triton before the reference: the same bits as the forced backend's."""
    first = next(name for name in ("cuda", "triton") if ("rms_norm", name) in _dispatch._kernels)
    x, weight = randn(7, 4096, dtype=torch.bfloat16, device="cuda"), randn(4096, dtype=torch.bfloat16, device="cuda")
    forced = ops.rms_norm(x, weight, 1e-5)
    token = _dispatch._forced.set(None)
    by_itself = ops.rms_norm(x, weight, 1e-5)
    _dispatch._forced.reset(token)
    if backend == first:
        assert torch.equal(by_itself, forced)
    torch.testing.assert_close(by_itself, forced)


def test_rows_past_two_to_the_31(backend: str) -> None:
    """Rows two thousand million values apart: 4 GB, of which two rows are ever touched."""
    far = torch.empty(2**31 + 2 * 32, dtype=torch.float16, device="cuda").as_strided((2, 64), (2**31, 1))
    far.copy_(randn(2, 64))
    near, weight = far.clone(), randn(64, dtype=torch.float16, device="cuda")
    assert torch.equal(ops.rms_norm(far, weight, 1e-5), ops.rms_norm(near, weight, 1e-5))
    assert torch.equal(ops.swiglu(far), ops.swiglu(near))
