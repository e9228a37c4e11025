"""Scores: the interval against published values, matching, and the harness on a model that knows the answers."""

from __future__ import annotations

import pytest

from llama_multimodal.eval.harness import TARGETS, Report, Score, _questions
from llama_multimodal.eval.metrics import anls, edit_distance, exact_match, wilson_interval
from llama_multimodal.zoo.world import KINDS


def test_wilson_interval() -> None:
    # Newcombe 1998, table I: method 3 (score) for 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for right, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson_interval(right, total, 1.959964) == pytest.approx((low, high), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(50, 50)[1] == 1.0


def test_exact_match() -> None:
    assert exact_match(" 3\n", "3") and not exact_match("3.", "3") and not exact_match("Red", "red")


def test_every_kind_gets_its_number_of_heldout_questions() -> None:
    questions = list(_questions(3, 0))
    counts = {kind: sum(q.kind == kind for q in questions) for kind in KINDS}
    assert set(counts.values()) == {3}
    assert max(sum(q.seed == seed for q in questions) for seed in {q.seed for q in questions}) <= 3


def test_pooled_scores_cover_their_kinds() -> None:
    report = Report({kind: Score(right=i, total=20) for i, kind in enumerate(KINDS)})
    pooled = report.pooled()
    assert pooled["count"][0].total == 80 and pooled["count"][0].right == 0 + 1 + 2 + 3 and pooled["count"][1] == 95
    without = {"description", "outside", "place"}
    assert {kind for _, kinds in TARGETS.values() for kind in kinds} == set(KINDS) - without


def test_anls() -> None:
    assert anls("Paris ", ["paris"]) == 1.0 and anls("", [""]) == 1.0 and anls("", ["x"]) == 0.0
    assert anls("colour", ["color", "nothing"]) == pytest.approx(5 / 6)
    assert anls("abcd", ["abxy"]) == 0.5 and anls("abcd", ["axyz"]) == 0.0  # below a half counts for nothing
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3
