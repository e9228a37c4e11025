"""`llama-mm data check`: what it prints and draws, on the embedded model's tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from chat_for_tests import asked, llava, meta, picture, said, smolvlm, steps_of, write_lines
from PIL import Image
from test_encode import encoded

from llama_multimodal.cli import main
from llama_multimodal.errors import DataError
from llama_multimodal.processing import Processor
from llama_multimodal.processing.pictures import pixels_of, prepare_pictures
from llama_multimodal.train.chat.check import check, pieces
from llama_multimodal.train.chat.picture import MARK, draw


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["data", "check", *arguments])
    return int(caught.value.code or 0)


def test_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(200, 90).save(tmp_path / "p.png")
    rows = [{"image": "p.png", **asked()}, {"image": "none.png", **asked()}, asked("and?", "two\ndogs")]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert command(path, "--output", str(tmp_path / "check.png")) == 0
    out = capsys.readouterr().out
    assert "<|start_header_id|>user<|end_header_id|>\n\n<image>what is this?<|eot_id|>" in out.replace(
        "\n", " "
    ).replace("  ", "\n\n")
    assert "⟦a cat<|eot_id|>⟧" in out and "⟦two\ndogs<|eot_id|>⟧" in out
    for line in ("rows read", "2 (66.7%)", "skipped, picture", "question+answer (2)", "a run stops above 1.0%"):
        assert line in out, line
    with Image.open(tmp_path / "check.png") as drawn:
        assert (
            drawn.width == 1296 and (np.asarray(drawn) == Image.new("RGB", (1, 1), MARK).getpixel((0, 0))).all(-1).any()
        )


def test_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", [asked()] * 3)
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"model: tiny\ndata:\n  max_length: 4\n  sources:\n  - file: {path}\n")
    assert command(str(recipe)) == 2
    assert "3 of 3 rows cannot be used (3 × too long)" in capsys.readouterr().err
    assert command(str(recipe), "--max-length", "100", "--rows", "0") == 0
    assert "⟦" not in capsys.readouterr().out


def test_the_example() -> None:
    """The file that the documentation shows: a shape a line, and nothing in it that cannot be used."""
    report = check(steps_of(str(Path(__file__).parents[3] / "examples" / "chats.jsonl")), rows=4, limit=0)
    assert list(report.shapes) == ["messages", "conversations", "question+answer", "texts"] and not report.skipped


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(tmp_path / "none.jsonl")) == 2
    assert "there is no file" in capsys.readouterr().err
    assert command(str(tmp_path / "none.yaml")) == 2
    assert "cannot read the recipe" in capsys.readouterr().err


def test_rows_are_spread_over_all_sources(tmp_path: Path) -> None:
    sources = [write_lines(tmp_path / f"{name}.jsonl", [asked()] * count) for name, count in (("a", 50), ("b", 4))]
    report = check(steps_of(*sources), rows=4, limit=10)
    where = [example.where.rpartition("/")[2] for example in report.shown]
    assert where == ["a.jsonl:1", "b.jsonl:1", "a.jsonl:11", "b.jsonl:2"] and report.read == 9
    assert check(steps_of(*sources), rows=0, limit=0).read == 54
    report.lengths = [3, 1, 2, 4]
    assert [report.quantile(share) for share in (0.25, 0.5, 0.51, 0.99, 1.0)] == [1, 2, 3, 4, 4]
    with pytest.raises(DataError, match="2 of 2 rows cannot be used"):
        check(steps_of(write_lines(tmp_path / "c.jsonl", [{}] * 2)), rows=1, limit=10)


@pytest.mark.parametrize("processor", [meta(), llava(), smolvlm()], ids=["meta", "llava", "smolvlm"])
def test_pieces_and_pixels(processor: Processor) -> None:
    example = encoded(processor, said("user", picture(60, 40), "what"), said("assistant", "a 🦙 cat"), longest=1000)
    text = pieces(example, processor)
    assert "".join(piece for piece, learns in text if learns).strip().startswith("a 🦙 cat")
    assert "<image" in "".join(piece for piece, learns in text if not learns)
    assert draw([example], processor).width == 1296
    assert processor.preprocess is not None
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)).resize((64, 64))
    tiles, _ = prepare_pictures([(0, grey)], processor.config, processor.preprocess)  # type: ignore[arg-type]
    shown = torch.from_numpy(pixels_of(tiles, processor.config, processor.preprocess))  # type: ignore[arg-type]
    table = {}
    for value, byte in zip(tiles.permute(0, 2, 3, 1)[..., 0].flatten().tolist(), shown[..., 0].flatten().tolist()):
        assert table.setdefault(value, byte) == byte  # every value is one byte, and every byte one value
    assert len(set(table.values())) == len(table) > 100
    assert sorted(table.values()) == [table[value] for value in sorted(table)]
