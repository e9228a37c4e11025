"""The arrows of docs/architecture.md: which part of the package may import which, read from the source by `ast`."""

from __future__ import annotations

import ast
import builtins
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_multimodal

SOURCE = Path(llama_multimodal.__file__).parent

BASE = {"errors", "config", "inputs", "cache"}
MODEL = BASE | {"ops", "models"}
BUILT = MODEL | {"planning", "processing", "weights", "adapters", "quant", "distributed", "zoo"}
RUN = BUILT | {"loading", "assemble", "calibration", "quantize", "sampling", "generate"}
TOP = RUN | {"engine", "train", "eval", "server", "integrations"}

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "inputs": {"errors", "config"},
    "cache": {"errors", "config"},
    "planning": {"errors", "config"},
    "processing": {"errors", "config", "inputs"},
    "ops": BASE,
    "models": BASE | {"ops"},
    "sampling": {"errors"},
    "weights": MODEL | {"quant"},
    "adapters": MODEL | {"quant", "weights"},
    "quant": MODEL,
    "distributed": MODEL | {"weights", "adapters"},
    "loading": BUILT,
    "assemble": BUILT | {"loading"},
    "calibration": {"errors", "inputs", "processing", "zoo"},
    "quantize": BUILT | {"loading", "calibration"},
    "generate": BASE | {"models", "sampling"},
    "engine": RUN,
    "train": RUN | {"eval"},
    "zoo": {"errors", "config", "processing"},
    "eval": RUN | {"engine"},
    "server": RUN | {"engine"},
    "integrations": RUN | {"engine"},
    "compat": TOP,
    "cli": TOP | {"compat"},
    "__init__": TOP | {"compat"},
    "__main__": {"cli"},
}
"""Part of the package → the parts it may import, besides itself. A part that is not here yet wants a line here."""

PURE = ("ops", "models", "config", "inputs", "cache", "planning", "sampling", "generate")
"""Parts that compute: they open no files, decode no pictures and know of no processes."""
NOT_IN_PURE = {
    "PIL", "tokenizers", "tiktoken", "jinja2", "safetensors", "huggingface_hub", "typer", "rich", "yaml", "json",
    "pickle", "pathlib", "io", "shutil", "tempfile", "glob", "socket", "subprocess", "multiprocessing", "urllib",
    "requests", "torch.distributed", "torch.multiprocessing", "torch.hub",
}  # fmt: skip
IN_BACKENDS = {"pathlib", "json"}
"""What the backends of `ops` may read besides: a library of kernels is a file, and its build report another."""
NEVER = {"transformers", "peft", "llama_models", "llama", "fairscale", "torchvision"}
"""For tests and benchmarks only."""


UPWARD = {("models/vlm.py", "assemble")}
"""The one import that points up, made when it is called: `VisionLanguageModel.from_parts`, where people look for it."""


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Every module or name that a file of `package` imports, with its full name, functions' own imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def package_of(file: Path, source: Path = SOURCE) -> tuple[str, ...]:
    return ("llama_multimodal", *file.relative_to(source).parts[:-1])


def part_of(file: Path, source: Path = SOURCE) -> str:
    first = file.relative_to(source).parts[0]
    return first.removesuffix(".py")


def broken_arrows(source: Path) -> list[str]:
    problems = []
    for file in sorted(source.rglob("*.py")):
        part, where = part_of(file, source), file.relative_to(source)
        if part not in ALLOWED:
            problems.append(f"{where}: {part} has no line in ALLOWED")
            continue
        for name in imports(parse(file), package_of(file, source)):
            words = name.split(".")
            if words[0] in NEVER:
                problems.append(f"{where} imports {name}: tests and benchmarks only")
            allowed = IN_BACKENDS if where.parts[:2] == ("ops", "backends") else set()
            if part in PURE and words[0] not in allowed and any(".".join(words[:n]) in NOT_IN_PURE for n in (1, 2)):
                problems.append(f"{where} imports {name}: {part} only computes")
            if words[0] != "llama_multimodal" or len(words) == 1 or words[1] == "__version__":
                continue
            if words[1] != part and words[1] not in ALLOWED[part] and (where.as_posix(), words[1]) not in UPWARD:
                problems.append(f"{where} imports {name}: {part} may not read {words[1]}")
    return problems


def test_the_arrows_hold() -> None:
    assert broken_arrows(SOURCE) == []


def test_nothing_imports_the_command_line() -> None:
    readers = {part for part, allowed in ALLOWED.items() if "cli" in allowed}
    assert readers == {"__main__"}


def test_engine_and_train_do_not_know_each_other() -> None:
    assert "train" not in ALLOWED["engine"] and "engine" not in ALLOWED["train"]


def test_the_arrows_have_no_circle() -> None:
    """Part by part, so that a part can always be read without those above it."""
    left = {part: set(allowed) for part, allowed in ALLOWED.items()}
    while left:
        free = [part for part, allowed in left.items() if not allowed & left.keys()]
        assert free, f"these parts import each other: {sorted(left)}"
        for part in free:
            del left[part]


@pytest.mark.parametrize(
    "place, line",
    [
        ("models/new.py", "from ..processing import Processor"),
        ("models/new.py", "from PIL import Image"),
        ("ops/new.py", "from pathlib import Path"),
        ("ops/backends/cpu/new.py", "import subprocess"),
        ("models/deep/new.py", "from ...loading import load"),
        ("models/new.py", "import torch.distributed as dist"),
        ("models/new.py", "from torch import distributed"),
        ("ops/new.py", "from llama_multimodal.models import layers"),
        ("ops/new.py", "from .. import models"),
        ("config.py", "from .inputs import ModelInputs"),
        ("processing/new.py", "from ..models import VisionLanguageModel"),
        ("engine/new.py", "def f():\n    from ..train.loop import train"),
        ("train/new.py", "import llama_multimodal.engine"),
        ("eval/new.py", "from ..cli import main"),
        ("weights/new.py", "import transformers"),
        ("zoo/new.py", "from ..train import loop"),
        ("planning/new.py", "from ..models import build_model"),
        ("room/new.py", "import os"),
    ],
)
def test_a_broken_arrow_is_seen(place: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(line)
    assert len(broken_arrows(tmp_path)) == 1


def test_what_the_models_open() -> None:
    """No file is opened in `models`; `ops` reads what the processor can do, and how its libraries were built."""
    openers = []
    for part in ("models", "ops"):
        for file in sorted((SOURCE / part).rglob("*.py")):
            for node in ast.walk(parse(file)):
                name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
                if name in {"open", "read_text", "read_bytes", "write_text", "write_bytes", "save"}:
                    openers.append(str(file.relative_to(SOURCE)))
    assert sorted(openers) == ["ops/backends/native.py", "ops/linear.py"]


def test_nothing_of_others_is_replaced() -> None:
    """No assignment to an attribute of an imported module of somebody else: `torch.x = …`, `F.softmax = …`."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        tree = parse(file)
        foreign = {
            alias.asname or alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                root = target
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in foreign:
                    found.append(f"{file.relative_to(SOURCE)}:{node.lineno} {ast.unparse(target)}")
    # A limit that Pillow offers for setting; the pictures' reader puts its own check in its place.
    assert [line for line in found if "MAX_IMAGE_PIXELS" not in line] == []


def test_every_public_name_resolves() -> None:
    for name in llama_multimodal.__all__:
        assert callable(getattr(llama_multimodal, name)), name
    assert set(llama_multimodal.__all__) == set(llama_multimodal._HOMES)
    with pytest.raises(AttributeError, match="no_such_name"):
        llama_multimodal.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    "first", ["import llama_multimodal.generate", "from llama_multimodal.sampling import sample", ""]
)
def test_public_names_are_not_hidden_by_modules(first: str) -> None:
    """`lmm.generate` is the function, also after the module of the same name has been imported."""
    code = f"{first}\nimport llama_multimodal as lmm\nassert callable(lmm.generate), lmm.generate\n"
    code += "from llama_multimodal import generate\nassert callable(generate)\nassert callable(lmm.generate)\n"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_module_is_named_like_a_builtin_it_would_hide() -> None:
    names = {file.stem for file in SOURCE.rglob("*.py")} - {"__init__", "__main__"}
    assert not names & set(dir(builtins))
