"""Steps: the same whoever reads them and from wherever; rows that are skipped, and when there are too many."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_for_tests import answers, asked, data_of, meta, picture, steps_of, tokenizer, write_lines
from torch.utils.data import DataLoader

from llama_multimodal.errors import ConfigError, DataError
from llama_multimodal.processing.template import ChatTemplate
from llama_multimodal.train.chat.skips import Skip, SkipLog
from llama_multimodal.train.chat.steps import ChatSteps, StepExamples


def numbered(path: Path, name: str, count: int, bad: tuple[int, ...] = ()) -> str:
    """Rows whose answers are their names; bad: those that say nothing."""
    rows = [asked(answer=" " if i in bad else f"{name} {i}") for i in range(count)]
    return write_lines(path / f"{name}.jsonl", rows)


@pytest.fixture
def mixed(tmp_path: Path) -> list[dict[str, Any]]:
    numbered(tmp_path, "a", 10)
    numbered(tmp_path, "b", 3, bad=(1,))
    return [{"file": str(tmp_path / "a.jsonl"), "weight": 3}, {"file": str(tmp_path / "b.jsonl"), "weight": 1}]


def epoch(steps: ChatSteps, first: int, end: int) -> list[list[str]]:
    return [answers(steps, step) for step in range(first, end)]


def test_a_resumed_run_sees_what_an_unbroken_one_does(mixed: list[dict[str, Any]]) -> None:
    whole = epoch(steps_of(*mixed, seed=3), 0, 12)
    assert epoch(steps_of(*mixed, seed=3), 7, 12) == whole[7:]
    assert epoch(steps_of(*mixed, seed=4), 0, 12) != whole


def test_shares_of_the_mixture(mixed: list[dict[str, Any]]) -> None:
    """3 of 4 rows are the first source's; each source comes whole before any row comes again."""
    steps = steps_of(*mixed, rows=4)
    said = [text for step in epoch(steps, 0, 10) for text in step]
    assert abs(sum(text.startswith("a") for text in said) - 30) <= 1
    a = [text for text in said if text.startswith("a")]
    assert sorted(a[:10]) == sorted(a[10:20]) == [f"a {i}" for i in range(10)] and a[:10] != a[10:20]
    skipped = sum(len(steps[step].skipped) for step in range(10))
    assert len(said) + skipped == 40 and abs(skipped - 10 / 3) <= 1


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_a_step(mixed: list[dict[str, Any]], world: int) -> None:
    alone = steps_of(*mixed, rows=7)
    ranks = [steps_of(*mixed, rows=7, rank=rank, world=world) for rank in range(world)]
    for step in range(5):
        parts = [answers(one, step) for one in ranks]
        assert sorted(text for part in parts for text in part) == sorted(answers(alone, step))
        assert [one[step].read for one in ranks] == [len(range(rank, 7, world)) for rank in range(world)]


def test_workers_read_the_same(tmp_path: Path) -> None:
    """By pickling too, as workers that are not forked are fed; a special token's name in a text stays text there."""
    picture().save(tmp_path / "p.png")
    rows = [{"image": "p.png", **asked(answer=f"<|eot_id|> {i}")} for i in range(6)]
    steps = steps_of(write_lines(tmp_path / "a.jsonl", rows), rows=2)
    expected = [steps[step] for step in range(3)]
    loader: DataLoader[StepExamples] = DataLoader(steps, batch_size=None, sampler=range(3), num_workers=2)
    copy: ChatSteps = pickle.loads(pickle.dumps(steps))
    for found in (list(loader), [copy[step] for step in range(3)]):
        for ours, theirs in zip(found, expected, strict=True):
            assert [e.tokens for e in ours.examples] == [e.tokens for e in theirs.examples]
            assert all(torch.equal(a.tiles, b.tiles) for a, b in zip(ours.examples, theirs.examples, strict=True))


def test_templates_and_tokenizers_can_be_pickled() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}", {"bos_token": "<s>"}
    )
    copy, words = pickle.loads(pickle.dumps((template, tokenizer())))
    messages = [{"role": "user", "content": "</s> cat"}]
    ids = template.encode(tokenizer(), messages)
    assert copy.encode(words, messages) == ids and words.special("</s>") not in ids


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_a_share_held_out(tmp_path: Path) -> None:
    data = data_of(numbered(tmp_path, "a", 20), holdout=0.2)
    training, held = ChatSteps(data, meta(), 4), ChatSteps(data, meta(), 3, evaluation=True)
    learnt = {text for step in epoch(training, 0, 12) for text in step}
    asked_about = [text for step in epoch(held, 0, held.num_steps or 0) for text in step]
    assert held.rows_per_epoch == 4 and held.num_steps == 2 and training.rows_per_epoch == 16
    assert len(asked_about) == len(set(asked_about)) == 4 and not learnt & set(asked_about)
    assert len(learnt) == 16
    assert answers(held, 1) == asked_about[3:]  # the last step has what is left


def test_rows_of_their_own(tmp_path: Path) -> None:
    data = data_of(numbered(tmp_path, "a", 5), evaluation=[numbered(tmp_path, "b", 3)])
    held = ChatSteps(data, meta(), 2, evaluation=True)
    assert epoch(held, 0, 2) == [["b 0", "b 1"], ["b 2"]]


def test_nothing_to_evaluate_on(tmp_path: Path) -> None:
    path = numbered(tmp_path, "a", 1)
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        ChatSteps(data_of(path), meta(), 1, evaluation=True)
    with pytest.raises(ConfigError, match="holdout keeps no row back"):
        ChatSteps(data_of(path, holdout=0.5), meta(), 1, evaluation=True)
    with pytest.raises(ConfigError, match="1 samples for 2 processes"):
        ChatSteps(data_of(path), meta(), 1, world=2)


# --- skipped rows ----------------------------------------------------------------------------------------------------


def run(steps: ChatSteps, log: SkipLog, first: int, end: int) -> None:
    for step in range(first, end):
        log.add(step, steps[step])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_skipped_rows_are_listed(tmp_path: Path) -> None:
    steps = steps_of(numbered(tmp_path, "a", 40, bad=(3, 17)), rows=8)
    file = tmp_path / "run" / "skipped.jsonl"
    run(steps, SkipLog(file, 0.1, steps.rows_per_epoch), 0, 5)
    listed = sorted(lines(file), key=lambda line: int(line["where"].rpartition(":")[2]))
    assert [line["where"] for line in listed] == [f"{tmp_path / 'a.jsonl'}:{line}" for line in (4, 18)]
    assert all(line["source"] == str(tmp_path / "a.jsonl") for line in listed)
    assert all("message 2 of the assistant's says nothing" in line["reason"] and not line["kept"] for line in listed)


def test_a_resumed_run_goes_on_with_the_list(tmp_path: Path) -> None:
    steps = steps_of(numbered(tmp_path, "a", 40, bad=(3, 17)), rows=8)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run(steps, SkipLog(one, 0.1, steps.rows_per_epoch), 0, 15)
    run(steps, SkipLog(two, 0.1, steps.rows_per_epoch), 0, 9)  # of which the last 3 are lost
    log = SkipLog(two, 0.1, steps.rows_per_epoch, step=6, read=48)
    run(steps, log, 6, 15)
    assert lines(one) == lines(two) and log.read == 120
    SkipLog(two, 0.1, 40)  # a new run begins a new list
    assert lines(two) == []
    odd = Skip("a", "a:1", "empty", "JSON allows\u2028such a separator in a text")
    SkipLog(two, 0.1, 40).add(0, StepExamples([], [odd], []))
    assert [skip for _, skip in SkipLog(two, 0.1, 40, step=1).skips] == [odd]
    two.write_text("3\n")
    with pytest.raises(DataError, match="not a list of skipped rows"):
        SkipLog(two, 0.1, 40, step=1)


@pytest.mark.parametrize(
    ("count", "bad", "most", "stops"),
    [
        (300, (1, 2, 3, 4), 0.01, 100),  # as soon as there are 100
        (300, (150, 250), 0.01, None),
        (20, (1,), 0.01, 20),  # a whole epoch
        (20, (1,), 0.05, None),  # in every epoch, however early it comes
        (300, tuple(range(300)), 1.0, None),
    ],
)
def test_too_many_skipped_rows_stop_a_run(
    tmp_path: Path, count: int, bad: tuple[int, ...], most: float, stops: int | None
) -> None:
    source = f"{tmp_path / 'a.jsonl'}"
    log = SkipLog(tmp_path / "skipped.jsonl", most, count)
    for row in range(400):
        wrong = row % count in bad
        found = StepExamples([] if wrong else [None], [Skip(source, f"{source}:{row}", "empty", "why")] * wrong, [])  # type: ignore[list-item]
        if row + 1 == stops:
            with pytest.raises(DataError, match=rf"^{len(bad)} of {stops} rows cannot be used \({len(bad)} × empty\)"):
                log.add(row, found)
            return
        log.add(row, found)
    assert stops is None


def test_shortened_rows_are_listed_and_kept(tmp_path: Path) -> None:
    rows = [asked(answer="a cat " * 20), asked()]
    steps = steps_of(write_lines(tmp_path / "a.jsonl", rows), rows=2, max_length=40, too_long="truncate")
    assert sorted(e.cut > 0 for e in steps[0].examples) == [False, True] and not steps[0].skipped
    log = SkipLog(tmp_path / "skipped.jsonl", 0.01, steps.rows_per_epoch)
    log.add(0, steps[0])
    (line,) = lines(tmp_path / "skipped.jsonl")
    assert line["kept"] and line["kind"] == "cut" and line["where"].endswith(":1")


def test_a_data_set_with_no_usable_row(tmp_path: Path) -> None:
    steps = steps_of(numbered(tmp_path, "a", 3, bad=(0, 1, 2)))
    with pytest.raises(
        DataError, match=r"^3 of 3 rows cannot be used \(3 × empty answer\); for example .*a.jsonl:\d: "
    ):
        steps.require_usable()
    masked = [{"messages": [{"role": "user", "content": "what"}]}] * 2
    with pytest.raises(DataError, match=r"2 of 2 rows cannot be used .* no message of the assistant's to learn"):
        steps_of(write_lines(tmp_path / "b.jsonl", masked)).require_usable()
    steps_of(numbered(tmp_path, "c", 3, bad=(0, 1))).require_usable()
