"""What is imported before it is needed, by `sys.modules` of a fresh process; `benchmarks/startup.py` takes the time."""

from __future__ import annotations

import os
import subprocess
import sys

from llama_multimodal import cli

HEAVY = {"torch", "numpy", "PIL", "tokenizers", "safetensors", "jinja2", "huggingface_hub", "transformers", "yaml"}
COMMANDS = [command.name or "" for command in cli.app.registered_commands]

RUN = """
import sys
from llama_multimodal import cli
for arguments in {arguments}:
    try:
        cli.main(arguments)
    except SystemExit as exit:
        assert not exit.code, exit.code
print("imported:", *({{name.partition(".")[0] for name in sys.modules}} & {heavy}))
"""


def python(code: str) -> str:
    wide = {**os.environ, "COLUMNS": "200"}  # no name in a table is cut
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=wide)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(*runs: list[str], heavy: set[str] = HEAVY) -> tuple[str, set[str]]:
    """What the command line prints, and which of `heavy` it has imported after all of `runs`."""
    out, _, imported = python(RUN.format(arguments=runs, heavy=heavy)).rpartition("imported:")
    return out, set(imported.split())


def test_importing_the_package_imports_no_dependency():
    code = (
        "import sys\nbefore = set(sys.modules)\nimport llama_multimodal\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*(new - sys.stdlib_module_names))\n"
    )
    assert python(code).split() == ["llama_multimodal"]


def test_importing_the_command_line_imports_typer_alone():
    # rich comes with the first table or help page, `config` with the first model.
    assert imported_by(heavy={*HEAVY, "rich"}) == ("", set())
    assert "llama_multimodal.config" not in python("import sys, llama_multimodal.cli; print(*sys.modules)").split()


def test_help_does_not_wait_for_torch():
    out, imported = imported_by(["--help"], *([command, "--help"] for command in COMMANDS), ["data", "check", "--help"])
    assert not imported
    assert len(COMMANDS) == 9  # data has commands of its own
    for command in COMMANDS:
        assert f"llama-mm {command} [OPTIONS]" in out, command
    for option in (
        "--max-new-tokens",
        "--temperature",
        "--pack",
        "--adapter",
        "--per-kind",
        "--export-only",
        "--layout",
        "--max-length",
        "--calibration",
    ):
        assert option in out, option


def test_zoo_does_not_wait_for_torch():
    out, imported = imported_by(["zoo"])
    assert "meta-llama/Llama-3.2-11B-Vision-Instruct" in out
    # The hub's library knows where its cache is, and reads its own files in YAML.
    assert imported <= {"huggingface_hub", "yaml"}


def test_a_plan_does_not_wait_for_torch():
    for model in ("11B", "tiny"):  # known, and read from its folder
        out, imported = imported_by(["plan", model, "--context", "2048"])
        assert "self-attention cache" in out and not imported


def test_an_answer_does_not_wait_for_the_compiler():
    code = (
        "import sys\nimport llama_multimodal as lmm\nmodel, processor = lmm.load('tiny', device='cpu')\n"
        "inputs = processor([{'role': 'user', 'content': 'How many?'}])\n"
        "lmm.generate(model, inputs, lmm.SamplingParams(max_new_tokens=2))\nprint('torch._dynamo' in sys.modules)\n"
    )
    assert python(code).strip() == "False"
