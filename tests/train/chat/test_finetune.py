"""Fine-tuning the embedded model: against a loop written by hand, frozen parts, precisions, results, mistakes."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finetune_rows import finetune, write_rows
from safetensors.torch import load_file

from llama_multimodal import loading
from llama_multimodal.adapters.peft_format import load_adapter
from llama_multimodal.errors import ConfigError, TrainingError, UserError
from llama_multimodal.loading import load
from llama_multimodal.models import LanguageModel, VisionLanguageModel
from llama_multimodal.models.mllama_vision import TiledVisionEncoder
from llama_multimodal.train import checkpoint, loop, watch
from llama_multimodal.train.chat.encode import microbatch
from llama_multimodal.train.chat.evaluation import split_answer
from llama_multimodal.train.chat.parts import PARTS, part_of
from llama_multimodal.train.chat.recipe import ChatRecipe
from llama_multimodal.train.chat.steps import ChatSteps
from llama_multimodal.train.chat.task import ChatTask
from llama_multimodal.train.loader import IGNORED
from llama_multimodal.train.parallel import Group
from llama_multimodal.train.plots import plot_run
from llama_multimodal.train.recipes import read_recipe
from llama_multimodal.train.task import trained
from llama_multimodal.train.tile_tables import share_between_ratios
from llama_multimodal.weights.checkpoint import Checkpoint, read_model


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), 20)


def run(recipe: ChatRecipe) -> list[float]:
    loop.train(recipe, lambda progress: None)
    return [progress.values["loss"] for progress in watch.lines(Path(recipe.output))]


def test_three_steps_equal_a_loop_written_by_hand(rows: Path, tmp_path: Path) -> None:
    recipe = finetune(rows, tmp_path, batch={"rows_at_once": 2}, optim={"weight_decay": 0.1, "learning_rate": 1e-5})
    found = run(recipe)
    model, processor = load("tiny", dtype=torch.float32)
    assert isinstance(model, VisionLanguageModel) and isinstance(model.vision, TiledVisionEncoder)
    share_between_ratios(model.vision)  # what keeps tile tables as Meta's layout has them
    steps = ChatSteps(recipe.data, processor, 6)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    kept = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}], lr=1e-5
    )
    for step in range(3):
        batch = microbatch(steps[step].examples, model.config)
        logits = model(batch.inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
        assert found[step] == pytest.approx(loss.item(), rel=1e-6)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_how_a_step_is_cut_changes_nothing(rows: Path, tmp_path: Path) -> None:
    cuts = ({"rows_at_once": 8}, {"rows_at_once": 4}, {"rows_at_once": 1}, {"packing": True, "tokens": 256})
    found = [
        run(finetune(rows, tmp_path / str(i), steps=2, batch={"rows": 8, **one}, recompute=i % 2 == 1, method="lora"))
        for i, one in enumerate(cuts)
    ]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4, abs=1e-6)


def test_an_adapter_is_trained_saved_and_loaded(rows: Path, tmp_path: Path) -> None:
    recipe = finetune(
        rows, tmp_path, method="lora", lora={"rank": 4, "targets": ["self", "cross"], "dropout": 0.1},
        data={"holdout": 0.2}, evaluate={"every": 2, "rows": 4, "answers": 2, "max_new_tokens": 4},
        optim={"ema_decay": 0.5},
    )  # fmt: skip
    run(recipe)
    values = {progress.step: progress.values for progress in watch.lines(tmp_path)}
    assert values[2].keys() >= {"eval_loss", "eval_exact_match", "eval_anls", "mfu", "tokens_per_second"}
    assert "eval_loss" in values[3] and "eval_loss" not in values[1]
    written = [json.loads(line) for line in (tmp_path / "samples/step-00000003.jsonl").read_text().splitlines()]
    assert len(written) == 2 and written[0].keys() == {"where", "answer", "truth"}
    result = loop.export(recipe)
    assert result == tmp_path / "adapter" and (result / "adapter_config.json").exists()
    assert read_recipe(result / "recipe.yaml") == recipe
    assert json.loads((result / "versions.json").read_text())["versions"]["torch"] == torch.__version__
    model, _ = load("tiny", dtype=torch.float32)
    plain = ChatTask(recipe, Group())
    (batch, *_) = plain.dataset[0].micro
    before = model(batch.inputs).logits
    load_adapter(model, result)
    saved = checkpoint.load(checkpoint.last_path(recipe.checkpoints))
    assert saved is not None and saved.average is not None
    for name, value in trained(plain.model).items():
        assert torch.equal(dict(model.named_parameters())[name], saved.average[name]), name
        value.data = saved.average[name]
    with torch.no_grad():
        torch.testing.assert_close(model(batch.inputs).logits, plain.model.eval()(batch.inputs).logits)
        assert (model(batch.inputs).logits - before).abs().max() > 1e-3
    assert plot_run(tmp_path).stat().st_size > 0


def test_a_whole_model_is_trained_saved_and_loaded(rows: Path, tmp_path: Path) -> None:
    recipe = finetune(
        rows, tmp_path, steps=1, freeze=["vision", "projector"], dtype="bfloat16", data={"holdout": 0.2},
        evaluate={"every": 1, "rows": 2, "answers": 1, "max_new_tokens": 3}, batch={"rows": 2},
    )  # fmt: skip
    run(recipe)
    (values,) = (progress.values for progress in watch.lines(tmp_path))
    assert values["eval_loss"] > 0
    result = loop.export(recipe)
    base, _ = load("tiny")
    model, processor = load(result)
    assert model.dtype == base.dtype and processor.tokenizer is not None
    old, new = dict(base.named_parameters()), dict(model.named_parameters())
    changed = {part_of(name, base.config.text) for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"self", "cross", "embedding", "lm_head"}


def test_a_model_all_of_which_was_trained_is_written_without_its_base(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = finetune(rows, tmp_path, steps=1, batch={"rows": 2})
    run(recipe)
    places = []

    def read(checkpoint: Checkpoint, dtype: torch.dtype, place: torch.device, *more: Any) -> LanguageModel:
        places.append(place.type)
        return read_model(checkpoint, dtype, place, *more)

    monkeypatch.setattr(loading, "read_model", read)
    result = loop.export(recipe)
    assert places == ["meta"]
    monkeypatch.undo()
    model, _ = load(result)
    saved = checkpoint.load(checkpoint.last_path(recipe.checkpoints)).weights
    assert model.dtype == load("tiny", device="meta")[0].dtype
    assert {name for name, _ in model.named_parameters()} == saved.keys()
    for name, value in model.named_parameters():
        assert torch.equal(value, saved[name].to(value.dtype)), name


def test_an_adapter_over_4_bit_weights(rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = finetune(rows, tmp_path / "qlora", steps=2, method="qlora", optim={"optimizer": "adamw8bit"})
    near = run(recipe)
    plain = run(finetune(rows, tmp_path / "lora", steps=2, method="lora"))
    assert near == pytest.approx(plain, rel=0.1) and near != plain
    model, _ = load("tiny")
    load_adapter(model, loop.export(recipe))


@pytest.mark.parametrize("part", PARTS)
def test_frozen_parts_do_not_learn(rows: Path, tmp_path: Path, part: str) -> None:
    others = [name for name in PARTS if name != part]
    task = ChatTask(finetune(rows, tmp_path, freeze=others), Group())
    assert {part_of(name, task.model.config.text) for name in trained(task.model)} == {part}
    (batch, *_) = task.dataset[0].micro
    loss, _ = task.loss(batch, task.totals([batch]).tolist(), 0)
    assert loss is not None
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in task.model.parameters())


def test_what_was_learnt_is_exported_without_the_data(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", 8)
    data = {"sources": [str(rows)], "evaluation": [str(rows)]}
    recipe = finetune(rows, tmp_path / "run", method="lora", data=data, evaluate={"every": 3}, result="best")
    loop.train(recipe, lambda progress: None)
    kept = load_file(loop.export(recipe) / "adapter_model.safetensors")
    rows.unlink()
    again = load_file(loop.export(recipe) / "adapter_model.safetensors")
    assert again.keys() == kept.keys() and all(torch.equal(again[name], kept[name]) for name in kept)
    with pytest.raises(UserError, match=r"rows\.jsonl"):
        loop.train(recipe, lambda progress: None)


def test_parts_have_rates_of_their_own(rows: Path, tmp_path: Path) -> None:
    optim = {"learning_rate": 1e-3, "learning_rates": {"vision": 1e-5, "cross": 2e-3}, "weight_decay": 0.1}
    task = ChatTask(finetune(rows, tmp_path, optim=optim), Group())
    (optimizer,) = task.optimizers()
    names = {parameter: name for name, parameter in task.model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            part = part_of(names[parameter], task.model.config.text)
            assert group["share"] == pytest.approx({"vision": 0.01, "cross": 2.0}.get(part, 1.0))
            assert group["weight_decay"] == (0.1 if parameter.ndim == 2 else 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_b_has_a_rate_of_its_own(rows: Path, tmp_path: Path) -> None:
    optim = {"learning_rate": 1e-3, "learning_rates": {"vision": 1e-4}, "lora_plus_ratio": 4.0}
    task = ChatTask(finetune(rows, tmp_path, method="lora", optim=optim, lora={"targets": ["self", "vision"]}), Group())
    (optimizer,) = task.optimizers()
    names = {parameter: name for name, parameter in task.model.named_parameters()}
    shares: dict[tuple[str, str], set[float]] = defaultdict(set)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            part = part_of(names[parameter], task.model.config.text)
            shares[part, names[parameter][-1]].add(round(group["share"], 6))
    assert shares == {("self", "A"): {1.0}, ("self", "B"): {4.0}, ("vision", "A"): {0.1}, ("vision", "B"): {0.4}}


@pytest.mark.parametrize(
    ("dtype", "method", "freeze"),
    [
        ("bfloat16", "lora", []), ("float16", "lora", []), ("bfloat16", "full", []), ("float16", "full", ["vision"]),
        ("bfloat16", "full", ["vision", "self", "cross", "embedding", "lm_head"]),
    ],
)  # fmt: skip
def test_half_precision_stays_near(rows: Path, tmp_path: Path, dtype: str, method: str, freeze: list[str]) -> None:
    """What learns is held in float32, whatever multiplies."""
    changes = {"steps": 2, "method": method, "freeze": freeze, "batch": {"rows": 4}}
    recipe = finetune(rows, tmp_path / dtype, dtype=dtype, **changes)
    near = run(recipe)
    full = run(finetune(rows, tmp_path / "float32", **changes))
    assert near == pytest.approx(full, rel=0.1, abs=0.02)
    saved = checkpoint.load(checkpoint.last_path(recipe.checkpoints))
    assert saved is not None and {value.dtype for value in saved.weights.values()} == {torch.float32}


def test_rows_that_make_a_loss_infinite_are_named(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = finetune(rows, tmp_path, method="lora")
    task = ChatTask(recipe, Group())
    name = task.dataset[1].micro[0].rows[2]
    plain = ChatSteps._example

    def poisoned(self: ChatSteps, source: int, index: int):  # type: ignore[no-untyped-def]
        found = plain(self, source, index)
        tiles = found.tiles * float("nan") if found.where == name else found.tiles
        return dataclasses.replace(found, tiles=tiles)

    monkeypatch.setattr(ChatSteps, "_example", poisoned)
    with pytest.raises(TrainingError) as caught:
        loop.train(recipe, lambda progress: None)
    message = str(caught.value)
    assert "the loss is not finite; the first was the output of vision.patch_embedding" in message and name in message


def test_a_step_without_a_token_to_learn(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ChatSteps._example

    def masked(self: ChatSteps, source: int, index: int):  # type: ignore[no-untyped-def]
        found = plain(self, source, index)
        return dataclasses.replace(found, labels=[IGNORED] * len(found.labels))

    monkeypatch.setattr(ChatSteps, "_example", masked)
    with pytest.raises(TrainingError, match=r"step 1 has no token to learn: every label .* is masked \(.*rows.jsonl"):
        loop.train(finetune(rows, tmp_path, method="lora"), lambda progress: None)


def test_the_last_answer_is_asked_for(rows: Path, tmp_path: Path) -> None:
    task = ChatTask(finetune(rows, tmp_path, method="lora"), Group())
    example = task.dataset.steps[0].examples[0]
    prompt, answer = split_answer(example)
    assert prompt.tokens + answer == example.tokens[: len(prompt.tokens) + len(answer)]
    eot = task.processor.tokenizer.special("<|eot_id|>")  # type: ignore[union-attr]
    assert answer[-1] == eot and eot not in answer[:-1]
    twice = dataclasses.replace(
        example,
        tokens=example.tokens + example.tokens[1:],
        labels=[*example.labels[:-1], IGNORED, *example.labels[1:]],
    )
    assert split_answer(twice)[1] == answer and len(split_answer(twice)[0].tokens) > len(example.tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modl": "tiny"}, 'unknown key "modl"; did you mean "model"?'),
        ({"method": "lorra"}, 'method "lorra" is not implemented; supported: lora, qlora, full; did you mean "lora"?'),
        ({"dtype": "bf16"}, 'dtype "bf16" is not implemented; supported: float32, bfloat16, float16'),
        ({"task": "chatt"}, 'there is no task "chatt"; known: chat, world; did you mean "chat"?'),
        ({"freeze": ["visoin"]}, 'there is no part "visoin"'),
        ({"method": "lora", "freeze": ["vision"]}, "freeze is for the method full"),
        ({"optim": {"learning_rates": {"gates": 1.0}}}, 'there is no part "gates"'),
        ({"optim": {"learning_rates": {"vision": "slow"}}}, "every part's rate must be a number"),
        ({"optim": {"schedule": "cosin"}}, 'did you mean "cosine"?'),
        ({"lora": {"rnk": 4}}, 'unknown key "rnk"; did you mean "rank"?'),
        ({"batch": {"rows": 0}}, "rows, tokens and rows_at_once must be at least 1"),
        ({"batch": {"packing": "yes"}}, "packing must be true or false"),
        ({"result": "best"}, "result: best needs evaluate.every"),
        ({"evaluate": {"every": 5}}, "evaluate.every needs rows to evaluate on"),
        ({"optim": {"optimizer": "muon", "learning_rates": {"vision": 1e-5}}}, "muon has one rate for all"),
        ({"method": "lora", "optim": {"optimizer": "muon", "lora_plus_ratio": 4}}, "muon has one rate for all"),
        ({"optim": {"lora_plus_ratio": 0}}, "lora_plus_ratio must be above 0"),
        ({"optim": {"lora_plus_ratio": 4}}, "lora_plus_ratio is for the methods lora and qlora"),
        ({"method": "lora", "dtype": "float16", "lora": {"dtype": "model"}}, "need lora.dtype float32"),
    ],
)
def test_mistakes_are_named(rows: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        finetune(rows, tmp_path, **change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_mistakes_that_only_the_model_shows(rows: Path, tmp_path: Path) -> None:
    for change, message in (
        ({"freeze": list(PARTS)}, "every part of this model is frozen"),
        ({"method": "lora", "lora": {"targets": "q_porj"}}, "q_porj"),
    ):
        with pytest.raises(ConfigError, match=message):
            loop.train(finetune(rows, tmp_path, **change), lambda progress: None)
