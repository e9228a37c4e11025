"""Rows whose answers are not learnt: there the base's own predictions are to stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finetune_rows import finetune, write_rows

from llama_multimodal.adapters.lora import use_adapter
from llama_multimodal.errors import ConfigError
from llama_multimodal.loading import load
from llama_multimodal.train import checkpoint, loop, watch
from llama_multimodal.train.chat.check import check
from llama_multimodal.train.chat.encode import microbatch
from llama_multimodal.train.chat.model import summed_drift
from llama_multimodal.train.chat.picture import describe
from llama_multimodal.train.chat.recipe import ChatRecipe
from llama_multimodal.train.chat.steps import ChatSteps
from llama_multimodal.train.chat.task import ChatTask
from llama_multimodal.train.loader import IGNORED
from llama_multimodal.train.parallel import Group
from llama_multimodal.train.state import load_result
from llama_multimodal.train.task import trained


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two files: what is learnt, and what is to stay."""
    folder = tmp_path_factory.mktemp("rows")
    lines = write_rows(folder, 16).read_text().splitlines(keepends=True)
    files = {"learnt": folder / "learnt.jsonl", "kept": folder / "kept.jsonl"}
    for file, some in zip(files.values(), (lines[:8], lines[8:])):
        file.write_text("".join(some))
    return files


def distilling(rows: dict[str, Path], output: Path, distill: bool = True, **changes: Any) -> ChatRecipe:
    sources = [{"file": str(rows["learnt"]), "weight": 1}, {"file": str(rows["kept"]), "weight": 1, "distill": distill}]
    return finetune(rows["learnt"], output, **{"method": "lora", "data": {"sources": sources}, **changes})


def values(recipe: ChatRecipe, key: str) -> list[float]:
    loop.train(recipe, lambda progress: None)
    return [line.values[key] for line in watch.lines(Path(recipe.output))]


def test_a_step_equals_one_written_by_hand(rows: dict[str, Path], tmp_path: Path) -> None:
    recipe = distilling(rows, tmp_path, distillation={"weight": 0.75, "temperature": 3.0}, batch={"rows_at_once": 2})
    task = ChatTask(recipe, Group())
    model = task.model
    torch.manual_seed(0)
    learning = trained(model)
    for name, parameter in learning.items():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.02)
    micro = next(task.batches(0))
    totals = task.totals(micro)
    found = [task.loss(one, totals.tolist(), 0) for one in micro]
    assert any(one.learnt.any() and one.distilled.any() for one in micro)
    loss = torch.stack([part for part, _ in found if part is not None]).sum()
    ours = torch.autograd.grad(loss, list(learning.values()))

    examples = task.dataset.steps[0].examples
    learnt, kept = ([one for one in examples if one.distill == which] for which in (False, True))
    count, total, drift = 0, torch.zeros(()), torch.zeros(())
    for example in learnt + kept:
        batch = microbatch([example], model.config)
        place = batch.labels != IGNORED
        count += int(place.sum())
        logits = model(batch.inputs).logits[place]
        if not example.distill:
            total = total + F.cross_entropy(logits, batch.labels[place], reduction="sum")
            continue
        with torch.no_grad(), use_adapter(model, None):
            before = (model(batch.inputs).logits[place] / 3).softmax(-1)
        now = (logits / 3).softmax(-1)
        drift = drift + 9 * (before * (before / now).log()).sum()
    wanted = (total + 0.75 * drift) / count
    assert drift.item() > 0.01
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    for got, want in zip(ours, torch.autograd.grad(wanted, list(learning.values())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    sums = torch.stack([parts for _, parts in found]).sum(0).tolist()
    measured = task.measures(sums, totals.tolist(), 0)
    assert measured["loss"] == pytest.approx(wanted.item(), rel=1e-4)
    assert measured["drift"] == pytest.approx(drift.item() / float(totals[1]), rel=1e-4)


def test_it_begins_at_the_base_and_stays_nearer(rows: dict[str, Path], tmp_path: Path) -> None:
    """Nothing has drifted before the first step; and where old answers are wrong ones, learning them drifts further."""
    optim = {"learning_rate": 3e-3}
    drift = values(distilling(rows, tmp_path / "kept", steps=6, optim=optim), "drift")
    assert drift[0] == pytest.approx(0, abs=1e-6) and max(drift) > 1e-4
    task = ChatTask(distilling(rows, tmp_path / "kept", steps=6, optim=optim), Group())
    distilled = [one for one in next(task.batches(0)) if one.base is not None]
    other = ChatTask(distilling(rows, tmp_path / "learnt", distill=False, steps=6, optim=optim), Group())
    values(other.recipe, "loss")
    ends = []
    for one in (task, other):
        load_result(checkpoint.saved_steps(one.recipe.checkpoints)[6], one)
        ends.append(sum(one.summed(m)[1].item() for m in distilled))
    assert ends[0] < 0.5 * ends[1]


def test_how_a_step_is_cut_changes_nothing(rows: dict[str, Path], tmp_path: Path) -> None:
    cuts: list[dict[str, Any]] = [
        {}, {"batch": {"rows_at_once": 1}, "recompute": True}, {"batch": {"packing": True, "tokens": 256}}
    ]  # fmt: skip
    found = [values(distilling(rows, tmp_path / str(i), **one), "drift") for i, one in enumerate(cuts)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-3, abs=1e-6)


def test_held_out_rows_are_asked_for_their_answers(rows: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for distill in (True, False):
        sources = [{"file": str(rows["learnt"])}, {"file": str(rows["kept"]), "distill": distill}]
        changes = {"data": {"sources": sources, "holdout": 0.5}, "evaluate": {"every": 1, "answers": 0}, "steps": 1}
        found += values(distilling(rows, tmp_path / str(distill), optim={"learning_rate": 0}, **changes), "eval_loss")
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] > 0.5


def test_processes_share_what_is_distilled_too(rows: dict[str, Path], tmp_path: Path) -> None:
    """Distilled rows take longer: each process has its part of them, and together they have every row of the step."""
    recipe = distilling(rows, tmp_path)
    _, processor = load("tiny", device="meta")
    for count, samples in ((2, 8), (3, 8), (2, 5)):
        for step in range(6):
            whole = ChatSteps(recipe.data, processor, samples)[step].examples
            shares = [ChatSteps(recipe.data, processor, samples, rank, count)[step].examples for rank in range(count)]
            assert sorted(one.where for share in shares for one in share) == sorted(one.where for one in whole)
            assert [len(share) for share in shares] == [len(range(rank, samples, count)) for rank in range(count)]
            parts = [sum(one.distill for one in share) for share in shares]
            assert max(parts) - min(parts) <= 1


def test_a_look_at_the_data_tells_them_apart(rows: dict[str, Path], tmp_path: Path) -> None:
    _, processor = load("tiny", device="meta")
    report = check(ChatSteps(distilling(rows, tmp_path).data, processor, 1), rows=16, limit=0)
    assert report.distilled == sum(one.num_learnt for one in report.shown if one.distill) > 0
    assert report.learnt == sum(one.num_learnt for one in report.shown if not one.distill) > 0
    assert all(("distilled" in describe(one)) == one.distill for one in report.shown)


def test_drift_of_many_tokens_is_that_of_each(rows: dict[str, Path], tmp_path: Path) -> None:
    model = ChatTask(distilling(rows, tmp_path), Group()).model
    hidden, before = torch.randn(2, 600, model.config.text.hidden_size)
    hidden.requires_grad_()
    whole = summed_drift(model, hidden, before, 2.0)
    parts = [summed_drift(model, a[None], b[None], 2.0) for a, b in zip(hidden, before)]
    assert whole.item() == pytest.approx(torch.stack(parts).sum().item(), rel=1e-5)
    (grad,) = torch.autograd.grad(whole, hidden)
    assert grad.abs().sum(1).min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "full"}, "distill holds an adapter to what its base says"),
        ({"data": {"sources": [{"file": "a.jsonl", "distill": True}]}}, "nothing to learn; leave it out of one"),
        (
            {"data": {"sources": ["a.jsonl"], "evaluation": [{"file": "a.jsonl", "distill": True}]}},
            "evaluation asks for answers, so distill is for sources alone",
        ),
        ({"data": {"sources": ["a.jsonl"]}, "distillation": {"weight": 1}}, "and data has none"),
        ({"distillation": {"temperature": 0}}, "weight and temperature must be above 0"),
        ({"distillation": {"wieght": 1}}, 'unknown key "wieght"; did you mean "weight"?'),
    ],
)
def test_mistakes_are_named(rows: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        distilling(rows, tmp_path, **change)
    assert message in str(caught.value) and "\n" not in str(caught.value)
