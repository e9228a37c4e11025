"""`load` of GGUF files: a file, a folder with one, and what cannot be loaded or saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import llama_multimodal as lmm
from llama_multimodal import cli
from llama_multimodal.errors import CheckpointError
from llama_multimodal.models import LanguageModel
from llama_multimodal.planning import plan
from llama_multimodal.weights.convert import convert
from llama_multimodal.weights.save import save_checkpoint

pytest.importorskip("gguf")

from gguf_for_tests import METADATA, TEXT, gguf_tensors, random_language_model, write_gguf

from llama_multimodal.config import LanguageModelConfig

TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(40, 60)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
WORDS = {  # Llama 2's kind, with a template
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [*TOKENS, *(f"▁{char}" for char in "abcdefghijklmn")],
    "tokenizer.ggml.scores": [float(-i) for i in range(64)],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 20, *[1] * 41],
    "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
}


def test_a_file_and_its_folder(tmp_path: Path) -> None:
    expected = random_language_model(LanguageModelConfig(TEXT))
    path = write_gguf(tmp_path / "model.gguf", METADATA | WORDS, gguf_tensors(expected))
    rows = [[1, 5, 9, 60], [1, 7]]
    for source in (path, tmp_path, str(path)):
        model, processor = lmm.load(source)
        assert type(model) is LanguageModel and model.dtype == torch.float32
        inputs = processor.encode_tokens(rows)
        assert torch.equal(model(inputs).logits, expected(inputs).logits)
    asked = processor([{"role": "user", "content": "a b"}])
    assert asked.tokens[0, 0] == 1 and asked.tokens[0, -1] == 2
    assert processor.decode(asked.tokens[0].tolist()) == "a b"
    packed, _ = lmm.load(path, pack="int8")
    assert (packed(inputs).logits - expected(inputs).logits).abs().max() < 0.5


def test_saved_as_a_checkpoint_of_hugging_face(tmp_path: Path) -> None:
    expected = random_language_model(LanguageModelConfig(TEXT))
    model, _ = lmm.load(write_gguf(tmp_path / "model.gguf", METADATA, gguf_tensors(expected)))
    save_checkpoint(model, tmp_path / "saved")
    again, processor = lmm.load(tmp_path / "saved")
    inputs = processor.encode_tokens([[1, 2, 3]])
    assert again.config == model.config and torch.equal(again(inputs).logits, expected(inputs).logits)
    with pytest.raises(CheckpointError, match="GGUF files are read and not written"):
        save_checkpoint(model, tmp_path / "no", "gguf")
    with pytest.raises(CheckpointError, match='unknown layout "gguf"'):
        convert(tmp_path / "saved", tmp_path / "no", "gguf")


def test_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LanguageModelConfig(TEXT)
    path = write_gguf(tmp_path / "model.gguf", METADATA, gguf_tensors(random_language_model(config)))
    with pytest.raises(SystemExit):
        cli.main(["plan", str(path), "--json"])
    assert json.loads(capsys.readouterr().out)["total"] == plan(config).total


def test_several_files(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, METADATA, {})
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\); give the file"):
        lmm.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        lmm.load(tmp_path / "a.gguf")  # without tensors
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        lmm.load(tmp_path / "notes.txt")
