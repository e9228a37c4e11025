"""nvcc takes every kernel, without a warning, and none needs more registers than there are."""

from __future__ import annotations

import pytest

from . import ptxas

# The oldest and the commonest; `python tests/backends/cuda/ptxas.py` tries all of them.
ARCHS = ("75", "90")


@pytest.mark.parametrize("file", sorted(ptxas.CSRC.glob("*.cu")), ids=lambda file: file.stem)
@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(file, arch: str) -> None:
    if why := ptxas.why_not():
        pytest.skip(why)
    usages = ptxas.compile_file(file, arch)
    assert usages
    assert [u for u in usages if u.spilled or u.stack] == []


def test_a_spill_is_seen() -> None:
    report = (
        "ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z6kernelv\n"
        "    64 bytes stack frame, 176 bytes spill stores, 120 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers, 64 bytes cumulative stack size, 256 bytes smem\n"
    )
    assert ptxas.parse(report, "90") == [ptxas.Usage("kernel", "90", 128, 256, 64, 296)]
