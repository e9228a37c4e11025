"""setup.py: what it builds, for what, and that nothing it lacks makes an installation fail."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
from pathlib import Path
from types import ModuleType

import pytest

from llama_multimodal.ops.backends import native

from .cuda.ptxas import project_setup

ROOT = Path(__file__).parents[2]
KERNEL = 'extern "C" int llama_mm_answer() { return 42; }\n'


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, over a project of its own."""
    module = project_setup()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "OBJECTS", tmp_path / "objects")
    for variable in ("NO_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    for backend in ("cpu", "cuda"):
        (tmp_path / "src" / module.BACKENDS / backend / "csrc").mkdir(parents=True)
    return module


def sources(build: ModuleType, backend: str) -> Path:
    return build.ROOT / "src" / build.BACKENDS / backend / "csrc"


def library(build: ModuleType, backend: str) -> Path:
    return build.ROOT / "src" / build.BACKENDS / backend / f"libllama_mm_{backend}.so"


def report(build: ModuleType, backend: str) -> dict:
    return json.loads(library(build, backend).with_suffix(".json").read_text())


@pytest.fixture
def fake_cuda(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit whose nvcc is a shell script that notes how it was called; the file with the notes."""
    nvcc, calls = tmp_path / "cuda" / "bin" / "nvcc", tmp_path / "calls"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "--version) echo 'Cuda compilation tools, release 12.4, V12.4.99' ;;\n"
        "--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_86\\ncompute_89\\ncompute_90\\n' ;;\n"
        f'*) echo "$@" >> {calls}\n'
        "   case \"$*\" in */bad.cu*) echo 'bad.cu(1): error: no such luck' >&2; exit 2 ;; esac\n"
        '   while [ "$1" != -o ]; do shift; done; echo built > "$2" ;;\n'
        "esac\n"
    )
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    (sources(build, "cuda") / "kernel.cu").write_text(KERNEL)
    return calls


@pytest.mark.parametrize(
    "text, archs",
    [
        ("8.6", ["sm_86"]),
        ("8.6;9.0+PTX", ["sm_86", "sm_90", "compute_90"]),
        (" 7.5, 8.0  9.0a ", ["sm_75", "sm_80", "sm_90a"]),
        ("Ampere;8.6", ["sm_80", "sm_86", "compute_86"]),
        ("10.0+PTX;12.0", ["sm_100", "compute_100", "sm_120"]),
    ],
)
def test_the_list_of_architectures_is_read_as_torch_reads_it(build: ModuleType, text: str, archs: list[str]) -> None:
    assert [f"{kind}_{number}" for kind, number in build.parse_archs(text)] == archs


@pytest.mark.parametrize("text", ["86", "sm_86", "8.6+PTX+PTX", "Fermi", "8.6;;x"])
def test_what_is_no_architecture_is_named(build: ModuleType, fake_cuda: Path, text: str, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    build.build_all(build.ROOT / "src")
    assert "TORCH_CUDA_ARCH_LIST holds" in report(build, "cuda")["why"] and not fake_cuda.exists()


def test_cuda_is_built_for_what_nvcc_knows_and_what_is_asked(build: ModuleType, fake_cuda: Path, monkeypatch) -> None:
    build.build_all(build.ROOT / "src")
    found = report(build, "cuda")
    assert found["built"] and found["compiler"] == "nvcc 12.4.99" and library(build, "cuda").exists()
    assert found["archs"] == ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "compute_90"]  # 10.0 is too new for it
    compiled, linked = fake_cuda.read_text().splitlines()
    assert "-gencode=arch=compute_75,code=sm_75" in compiled and "-gencode=arch=compute_90,code=compute_90" in compiled
    assert "-cudart static" in linked and "-shared" in linked
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6+PTX")
    build.build_all(build.ROOT / "src")
    assert report(build, "cuda")["archs"] == ["sm_86", "compute_86"]


def test_only_what_changed_is_built_again(build: ModuleType, fake_cuda: Path) -> None:
    folder = sources(build, "cuda")
    (folder / "other.cu").write_text(KERNEL)
    (folder / "common.cuh").write_text("")

    def calls() -> list[str]:
        lines = fake_cuda.read_text().splitlines() if fake_cuda.exists() else []
        fake_cuda.unlink(missing_ok=True)
        files = [line.split(" -c ")[1].split()[0] for line in lines if "-shared" not in line]
        return sorted(Path(file).name for file in files) + ["link"] * (len(lines) - len(files))

    for change, compiled in (
        (lambda: None, ["kernel.cu", "other.cu", "link"]),
        (lambda: None, []),
        (lambda: (folder / "other.cu").write_text(KERNEL + "//"), ["other.cu", "link"]),
        (lambda: (folder / "common.cuh").write_text("//"), ["kernel.cu", "other.cu", "link"]),
        (lambda: library(build, "cuda").unlink(), ["link"]),
        (lambda: (folder / "other.cu").unlink(), ["link"]),
    ):
        change()
        build.build_all(build.ROOT / "src")
        assert calls() == compiled
    left = sorted(file.suffix for file in build.OBJECTS.glob("*cuda*"))
    assert left == [".log", ".o"]  # objects that no longer count are gone


def test_a_compile_error_is_a_reason_and_leaves_no_old_library(build: ModuleType, fake_cuda: Path, capsys) -> None:
    build.build_all(build.ROOT / "src")
    assert library(build, "cuda").exists()
    (sources(build, "cuda") / "bad.cu").write_text("nonsense")
    build.build_all(build.ROOT / "src")
    assert report(build, "cuda") == {"built": False, "why": "nvcc failed on bad.cu: bad.cu(1): error: no such luck"}
    assert not library(build, "cuda").exists()
    assert "warning: the cuda kernels are not built: nvcc failed on bad.cu" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["1", "ON"])
def test_no_cuda(build: ModuleType, fake_cuda: Path, value: str, monkeypatch) -> None:
    monkeypatch.setenv("NO_CUDA", value)
    build.build_all(build.ROOT / "src")
    assert report(build, "cuda")["why"] == "NO_CUDA is set" and not fake_cuda.exists()
    monkeypatch.setenv("NO_CUDA", "0")
    build.build_all(build.ROOT / "src")
    assert report(build, "cuda")["built"]


def test_a_machine_without_compilers(build: ModuleType, monkeypatch, capsys) -> None:
    which = shutil.which
    monkeypatch.setattr(build.shutil, "which", lambda name, path=None: which(name, path="/nowhere"))
    (sources(build, "cpu") / "kernel.cpp").write_text(KERNEL)
    build.build_all(build.ROOT / "src")
    assert report(build, "cuda")["why"].startswith("there is no nvcc; install the CUDA toolkit, or set CUDA_HOME")
    assert report(build, "cpu")["why"] == "there is no C++ compiler (g++, c++, clang++)"
    monkeypatch.setenv("CUDA_HOME", "/opt/nothing")
    build.build_all(build.ROOT / "src")
    assert report(build, "cuda")["why"] == "there is no /opt/nothing/bin/nvcc, where CUDA_HOME points"
    assert capsys.readouterr().err.count("warning: ") == 4


def test_where_nothing_can_be_written(build: ModuleType, monkeypatch, capsys) -> None:
    (build.ROOT / "file").touch()
    build.build_all(build.ROOT / "file")
    assert "no build report" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_what_a_compiler_warns_of_is_reported(build: ModuleType) -> None:
    (sources(build, "cpu") / "kernel.cpp").write_text(f"#warning as ever\n{KERNEL}")
    for _ in range(2):  # from the compiler, and from what was kept of it
        build.build_all(build.ROOT / "src")
        first, *_ = report(build, "cpu")["warnings"]
        assert "as ever" in first
        library(build, "cpu").unlink()


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_cpu_library_is_built_by_instruction_set(build: ModuleType, monkeypatch) -> None:
    folder = sources(build, "cpu")
    (folder / "plain.cpp").write_text(KERNEL + "#ifdef __AVX2__\n#error too much\n#endif\n")
    check = "#ifndef {}\n#error too little\n#endif\n"
    (folder / "kernels_avx2.cpp").write_text(check.format("__F16C__"))
    (folder / "kernels_avx512.cpp").write_text(check.format("__AVX512BF16__") + check.format("__AVX512VNNI__"))
    (folder / "kernels_neon.cpp").write_text(check.format("__ARM_NEON"))
    build.build_all(build.ROOT / "src")
    found = report(build, "cpu")
    assert found["built"], found
    assert ctypes.CDLL(str(library(build, "cpu"))).llama_mm_answer() == 42
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build.cpu_flags("kernels_avx2", "aarch64") is None and build.cpu_flags("kernels_neon", "x86_64") is None
    assert build.cpu_flags("kernels_neon", "aarch64") is not None and build.cpu_flags("plain", "riscv64") is not None


def test_no_sources_is_no_library(build: ModuleType) -> None:
    build.build_all(build.ROOT / "src")
    assert report(build, "cpu")["why"] in ("there are no sources", "there is no C++ compiler (g++, c++, clang++)")


def test_the_package_says_why_there_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    (tmp_path / "cuda").mkdir()
    path = native.library_path("cuda")
    assert native.why_not_built("cuda") == "its library is not built; pip install -e . in the source tree builds it"
    path.with_suffix(".json").write_text('{"built": false, "why": "NO_CUDA is set"}')
    assert native.why_not_built("cuda") == "its library is not built: NO_CUDA is set"
    path.with_suffix(".json").write_text("no report")
    assert native.build_report("cuda") is None
    path.touch()
    assert native.why_not_built("cuda") is None


def test_sources_are_in_the_package_and_built_files_are_not(build: ModuleType) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "ops/backends/*/csrc/*" in project["tool"]["setuptools"]["package-data"]["llama_multimodal"]
    assert "libllama_mm_*" in (ROOT / ".gitignore").read_text().splitlines()
    assert os.access(ROOT / "setup.py", os.R_OK)
