"""Every file in examples/ runs on the embedded model, and says what it should."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llama_multimodal
import llama_multimodal as lmm

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))
TESTED = {
    "batch", "captioning", "compat_quick_start", "custom_dataset", "lora", "profiling", "quick_start", "training_loop",
    "visual_question_answering",
}  # fmt: skip


def run(name: str, *arguments: str) -> str:
    """What an example prints; it is the package under test that it imports, whichever is installed."""
    source = Path(llama_multimodal.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == TESTED | {"draw_images", "new_task"}


@pytest.mark.parametrize("name", sorted(TESTED))
def test_it_says_how_it_is_run(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert f"\npython examples/{name}.py\n" in text.split('"""')[1]


def test_quick_start() -> None:
    whole, streamed = run("quick_start").splitlines()
    assert whole == "How many red circles are there? 3 (2 tokens, stop)" and streamed == "3"


def test_visual_question_answering() -> None:
    questions = ["What color is the star?", "How many red circles are there?", "Is there a purple triangle?"]
    lines = run("visual_question_answering", str(EXAMPLES / "images" / "shelf.png"), *questions).splitlines()
    assert [re.sub(r"[?] (\w+) [(].*", r"? \1", line) for line in lines] == [
        f"{question} {answer}" for question, answer in zip(questions, ("blue", "3", "yes"))
    ]


def test_captioning() -> None:
    lines = run("captioning", "--captions", "2", "--seed", "5").splitlines()
    assert [line.split(":")[0] for line in lines] == ["greedy", "seed 5", "seed 6"]
    assert all("circle" in line and "hexagon" in line for line in lines)


def test_batch() -> None:
    first, *answers, last = run("batch").splitlines()
    assert first.startswith("3 rows of ") and last.startswith("9 tokens in ")
    assert [line.split("? ")[1] for line in answers] == ["3", "D", "left"]


def test_custom_dataset(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "images" / "shelf.png", tmp_path / "a.png")
    entries = [{"image": "a.png", "question": "How many red circles are there?", "answer": str(n)} for n in (3, 5, 3)]
    (tmp_path / "mine.json").write_text(json.dumps(entries))
    first, second = run("custom_dataset", "--data", str(tmp_path / "mine.json")).splitlines()
    assert "learnt ['3', '5']" in first and "learnt ['3']" in second
    right, wrong = (float(line.split("loss ")[1]) for line in (second, first))
    assert right < 0.5 < 1 < wrong


def test_training_loop(tmp_path: Path) -> None:
    lines = run("training_loop", "--output", str(tmp_path / "trained")).splitlines()
    losses = [float(line.split("loss ")[1]) for line in lines if line.startswith("step ")]
    assert len(losses) == 10 and losses[-1] < 0.3 * losses[0]
    assert "after: ['3', 'hexagon', 'D', 'Harbour']" in lines
    model, processor = lmm.load(tmp_path / "trained")
    content = [
        {"type": "image", "image": EXAMPLES / "images" / "word.png"},
        {"type": "text", "text": "What does it say?"},
    ]
    assert lmm.generate(model, processor([{"role": "user", "content": content}])).texts == ["Harbour"]


def test_profiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_MM_BACKEND", "torch")  # whose products have the same name on every CPU
    out = run("profiling", "--rows", "12", "--trace", str(tmp_path / "trace.json"), "--max-new-tokens", "4")
    assert "Self CPU" in out and "aten::mm" in out
    for name in ("read the picture", "read the prompt", "write the answer"):
        assert float(re.search(rf"^{name}: ([\d.]+) ms$", out, re.MULTILINE)[1]) > 0
    assert "4 tokens: " in out
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "read the prompt" in names


def test_compat_quick_start() -> None:
    out = run("compat_quick_start", "--max-new-tokens", "3")
    assert "'pixel_values': [1, 3, 32, 32]" in out and "3 new tokens: " in out
    # A model that knows nothing gives every token about the same chance.
    vocabulary, loss = re.search(r"logits \[1, 11, (\d+)\], loss ([\d.]+)", out).groups()
    assert abs(float(loss) - math.log(int(vocabulary))) < 2


def test_lora(tmp_path: Path) -> None:
    lines = run("lora", "--targets", "self", "*.down_proj", "--output", str(tmp_path / "adapter")).splitlines()
    trainable, whole = (
        int(n.replace(",", "")) for n in re.match(r"([\d,]+) of ([\d,]+) parameters", lines[0]).groups()
    )
    assert 0 < trainable < 0.05 * whole
    losses = [float(line.split("loss ")[1]) for line in lines if line.startswith("step ")]
    trained, without = map(float, re.match(r"with the adapter: loss ([\d.]+), without: ([\d.]+)", lines[-3]).groups())
    assert len(losses) == 10 and trained < 0.5 * losses[0] and without == losses[0]
    loaded, merged = (float(line.split("loss ")[1]) for line in lines[-2:])
    assert loaded == trained and merged == pytest.approx(trained, abs=2e-4)
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip


def test_new_task() -> None:
    """Every picture has questions with bottles or white in them; held-out ones are of every kind; seeds repeat."""
    task = importlib.import_module("new_task")
    pictures = [task.example(seed) for seed in range(12)]
    assert all(task.is_new(turns[0]) for _, turns in pictures)
    assert {"bottle", "white"} < {turn.answer for _, turns in pictures for turn in turns}
    again, turns = task.example(7)
    assert turns == pictures[7][1] and again.tobytes() == pictures[7][0].tobytes()
    asked = [turns for _, turns in task.heldout(1000, 6)]
    assert [turn.kind.split("_")[0] for (turn,) in asked] == ["color", "shape", "count"] * 2
    assert all(task.is_new(turn) for (turn,) in asked)
    assert not any(task.is_new(turn) for turn in task.known(3)[1])


def test_new_words() -> None:
    renamed = importlib.import_module("new_task").renamed
    assert renamed("Crosses: how many?", "cross", "bottle") == "Bottles: how many?"
    assert renamed("is there an orange square across from it", "orange", "white").startswith("is there a white square")
    assert renamed("a big red circle, 2 circles", "circle", "bottle") == "a big red bottle, 2 bottles"
