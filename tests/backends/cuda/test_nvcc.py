"""nvcc takes every kernel, without a warning, and none needs more registers than there are, on any architecture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from . import ptxas


@pytest.fixture(autouse=True, scope="module")
def compiler() -> None:
    if why := ptxas.why_not():
        pytest.skip(why)


@pytest.mark.timeout(900)  # minutes, unless the package was installed from these very sources
def test_no_warnings() -> None:
    report = ptxas.build()
    assert report["warnings"] == []
    assert {f"sm_{arch}" for arch in ptxas.known_archs()} <= set(report["archs"])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", sorted(ptxas.CSRC.glob("*.cu")), ids=lambda file: file.stem)
def test_no_kernel_spills(file: Path) -> None:
    usages = ptxas.usages(file)
    assert {usage.arch for usage in usages} == set(ptxas.ARCHS)
    kernels = re.findall(
        r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", file.read_text(encoding="utf-8")
    )
    for arch in ptxas.ARCHS:
        assert {usage.kernel.split("<")[0] for usage in usages if usage.arch == arch} == set(kernels)
    assert [usage for usage in usages if usage.stack] == []


def test_a_spill_is_seen() -> None:
    report = (
        "\nFatbin elf code:\n================\narch = sm_90\ncode version = [1,8]\n\nResource usage:\n Common:\n"
        "  GLOBAL:0\n Function _Z6kernelv:\n  REG:128 STACK:64 SHARED:256 LOCAL:0 CONSTANT[0]:552 TEXTURE:0\n"
    )
    assert ptxas.parse(report) == [ptxas.Usage("kernel", "90", 128, 256, 64)]
