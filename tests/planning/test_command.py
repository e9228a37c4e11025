"""`llama-mm plan`: where a model's configuration comes from, and what is printed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_multimodal import cli
from llama_multimodal.config import LanguageModelConfig, TextConfig, config_to_hf
from llama_multimodal.models import build_model
from llama_multimodal.planning import GPUS, PlanOptions, plan
from llama_multimodal.quant.pack import Packing, pack, recommended
from llama_multimodal.weights.save import save_checkpoint
from llama_multimodal.zoo.configs import PRESETS, find_config
from llama_multimodal.zoo.registry import EMBEDDED_FOLDER

Run = Callable[..., tuple[int, str, str]]

CONFIG = LanguageModelConfig(
    TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, cross_attention_layers=(), max_position_embeddings=256, rope_scaling=None,
        num_extra_embeddings=0, bos_token_id=0, eos_token_ids=(1,), pad_token_id=0,
    )
)  # fmt: skip


@pytest.fixture
def llama_mm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Exit code, stdout, stderr of a plan; the hub's cache is `tmp_path / "hub"`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(["plan", *arguments])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


def as_json(run: Run, *arguments: str) -> dict[str, Any]:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plan") / "model"
    save_checkpoint(build_model(CONFIG), place)
    return place


def test_a_table(llama_mm: Run) -> None:
    code, out, _ = llama_mm("11B", "--dtype", "bf16", "--context", "8192", "--batch", "4")
    assert code == 0
    for words in ("10,670,220,835 parameters", "4 × 8192 tokens", "4 pictures of 4 tiles", "self-attention cache"):
        assert words in out
    assert all(gpu.name in out for gpu in GPUS) and "tight" in out and "yes" in out and "no" in out
    assert "each of 8 GPUs, with tensor parallelism" in llama_mm("90B", "--gpus", "8")[1]
    assert "each of 8 GPUs, sharded" in llama_mm("11B", "--gpus", "8", "--train", "full")[1]


@pytest.mark.parametrize("size", PRESETS)
def test_sizes(size: str, llama_mm: Run) -> None:
    found = as_json(llama_mm, size, "--context", "1024")
    assert found["total"] == plan(find_config(size), PlanOptions(context=1024)).total
    assert sum(part["at_peak"] for part in found["parts"]) == found["total"]
    assert found["parts"] == as_json(llama_mm, PRESETS[size], "--context", "1024")["parts"]


def test_options_reach_the_plan(llama_mm: Run) -> None:
    found = as_json(
        llama_mm, "11B", "--train", "full", "--optimizer", "adamw8bit", "--freeze", "vision", "--freeze", "projector",
        "--gradient-checkpointing", "--accumulate", "--images", "2", "--tiles", "1", "--context", "512", "--gpus", "2",
    )  # fmt: skip
    options = PlanOptions(
        train="full", optimizer="adamw8bit", freeze=("vision", "projector"), gradient_checkpointing=True,
        accumulate=True, images=2, tiles=1, context=512, gpus=2,
    )  # fmt: skip
    assert found["total"] == plan(find_config("11B"), options).total
    lora = as_json(llama_mm, "3B", "--train", "lora", "--rank", "8", "--targets", "self", "--context", "64")
    assert lora["trained_parameters"] == 28 * 8 * (2 * 6144 + 2 * 4096)


@pytest.mark.parametrize(
    ("model", "picture", "tiles"),
    [
        ("11B", "560x560", 1),
        ("11B", "1120x560", 2),
        ("11B", "3000x3000", 4),
        ("llava-hf/llava-1.5-7b-hf", "3000x100", 1),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", "672x672", 5),
        ("HuggingFaceTB/SmolVLM-Instruct", "1024x768", 13),
    ],
)
def test_pictures(model: str, picture: str, tiles: int, llama_mm: Run) -> None:
    assert as_json(llama_mm, model, "--image-size", picture)["tiles"] == tiles


def test_a_folder_is_read_without_its_weights(folder: Path, tmp_path: Path, llama_mm: Run) -> None:
    expected = plan(CONFIG, PlanOptions(context=100)).total
    assert as_json(llama_mm, str(folder), "--context", "100")["total"] == expected
    shutil.copy(folder / "config.json", tmp_path)
    assert as_json(llama_mm, str(tmp_path), "--context", "100")["total"] == expected
    assert as_json(llama_mm, str(tmp_path))["context"] == 256  # all there are


@pytest.mark.parametrize(
    "packing", [Packing("int8"), Packing("int4", group=16, lm_head="int8"), recommended("int4", CONFIG.text)]
)
def test_a_packed_folder(packing: Packing, tmp_path: Path, llama_mm: Run) -> None:
    model = pack(build_model(CONFIG), packing)
    save_checkpoint(model, tmp_path / "packed")
    found = as_json(llama_mm, str(tmp_path / "packed"), "--dtype", "fp32")
    weights = next(part["bytes"] for part in found["parts"] if part["name"] == "weights")
    assert weights == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert found["options"]["pack"]["format"] == packing.format
    assert as_json(llama_mm, str(tmp_path / "packed"), "--pack", "bf16")["options"]["pack"]["format"] == "bf16"


def test_the_cache_of_the_hub(tmp_path: Path, llama_mm: Run) -> None:
    place = tmp_path / "hub" / "models--somebody--small"
    snapshot = place / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text(json.dumps(config_to_hf(CONFIG)))
    assert as_json(llama_mm, "somebody/small")["parameters"] > 0


@pytest.mark.skipif(not (EMBEDDED_FOLDER / "config.json").exists(), reason="the embedded model is not in this copy")
def test_the_embedded_model(llama_mm: Run) -> None:
    assert as_json(llama_mm, "tiny")["parameters"] > 10**6


BAD = [
    (["Llama-3.2-11B-Vision-Instuct"], 'did you mean "meta-llama/Llama-3.2-11B-Vision-Instruct"?'),
    (["12B"], "neither known, nor a folder or a file"),
    ([""], "neither known"),
    (["somebody/nothing"], "nor in the hub's cache"),
    (["{file}"], "is not a GGUF file"),
    (["{empty}"], "holds no checkpoint"),
    (["{broken}"], "cannot be read"),
    (["{quantized}"], "quantization_config is of a kind that is not read; give --pack"),
    (["11B", "--context", "200000"], "the model's context is 131072 tokens"),
    (["11B", "--batch", "0"], "batch must be at least 1, not 0"),
    (["11B", "--gpus", "3"], "3 GPUs do not divide the model's 32 query heads"),
    (["11B", "--dtype", "bf61"], 'did you mean "bf16"'),
    (["11B", "--pack", "int5"], "pack is one of bf16, int8, int4"),
    (["11B", "--train", "some"], "train is one of lora, full"),
    (["11B", "--device", "tpu"], "device is one of cuda, cpu"),
    (["11B", "--image-size", "large"], '--image-size is width x height, such as 1024x768, not "large"'),
    (["11B", "--image-size", "9x9", "--tiles", "1"], "give one of them"),
    (["meta-llama/Llama-3.2-1B-Instruct", "--image-size", "9x9"], "reads text only"),
    (["meta-llama/Llama-3.2-1B-Instruct", "--images", "1"], "reads text only"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_is_refused(arguments: list[str], message: str, tmp_path: Path, llama_mm: Run) -> None:
    places = {name: tmp_path / name for name in ("file", "empty", "broken", "quantized")}
    places["file"].write_text("nothing of the sort")
    for name in ("empty", "broken", "quantized"):
        places[name].mkdir()
    (places["broken"] / "config.json").write_text("{")
    table = config_to_hf(CONFIG) | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (places["quantized"] / "config.json").write_text(json.dumps(table))
    code, out, err = llama_mm(*(argument.format(**places) for argument in arguments))
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1 and err.startswith("error: ")
