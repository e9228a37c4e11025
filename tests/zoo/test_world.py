"""The small world: samples are repeatable, and answers follow from the marks."""

import re
from collections import defaultdict

import pytest

from llama_multimodal.zoo.world import CHARS, COLORS, KINDS, SHAPES, corpus, sample
from llama_multimodal.zoo.world.scene_questions import plural
from llama_multimodal.zoo.world.types import OUTSIDE_ANSWER
from llama_multimodal.zoo.world.words import WORDS

N = 100
NOUNS = {name: i for i, shape in enumerate(SHAPES) for name in (shape, plural(shape))}


@pytest.fixture(scope="module")
def drawn():
    return {family: [sample(i, family=family) for i in range(N)] for family in ("scene", "text", "chart", "none")}


def test_equal_seeds_give_equal_samples():
    for seed in range(20):
        a, b = sample(seed), sample(seed)
        assert (a.turns, a.marks, a.family) == (b.turns, b.marks, b.family)
        assert (a.image is None) == (b.image is None)
        if a.image is not None:
            assert a.image.size == b.image.size and a.image.tobytes() == b.image.tobytes()


def test_splits_are_disjoint():
    seen = {}
    for split in ("train", "val", "test"):
        for seed in range(30):
            image = sample(seed, split=split, family="scene").image
            assert seen.setdefault((image.size, image.tobytes()), split) == split


def test_unknown_split_and_family_are_refused():
    with pytest.raises(ValueError, match="split"):
        sample(0, split="dev")
    with pytest.raises(ValueError, match="family"):
        sample(0, family="video")


def test_family_shares():
    families = [sample(seed, turns=1).family for seed in range(300)]
    assert families.count("scene") > families.count("text") > families.count("none")
    assert families.count("chart") > families.count("none") > 0


def test_marks_are_inside_the_image(drawn):
    for family in ("scene", "text", "chart"):
        for s in drawn[family]:
            assert s.image.mode == "RGB" and s.marks
            assert min(s.image.size) >= 120 and max(s.image.size) <= 1200
            for m in s.marks:
                assert 0 <= m.x < s.image.width and 0 <= m.y < s.image.height


def test_text_is_what_the_marks_spell(drawn):
    for s in drawn["text"]:
        assert [m.index for m in s.marks] == list(range(len(s.marks)))
        assert all(a.x < b.x for a, b in zip(s.marks, s.marks[1:]))
        text = "".join(CHARS[m.char] for m in s.marks)
        assert 1 <= len(text) <= (5 if s.image.width < s.image.height / 1.6 else 8)
        assert {t.answer for t in s.turns if t.kind == "text"} <= {text}


def test_charts_agree_with_their_marks(drawn):
    for s in drawn["chart"]:
        bars = [m for m in s.marks if m.kind == "bar"]
        letters = {m.index: CHARS[m.char] for m in s.marks if m.kind == "char"}
        names = [letters[m.index] if letters else COLORS[m.color] for m in bars]
        values = [m.value for m in bars]
        assert 3 <= len(bars) <= 6 and len(set(names)) == len(names)
        assert all(1 <= v <= 10 for v in values)
        assert values.count(max(values)) == values.count(min(values)) == 1
        by_value = sorted(bars, key=lambda m: m.value)
        assert by_value[0].y > by_value[-1].y
        for t in s.turns:
            if t.kind == "chart_highest":
                assert t.answer == names[values.index(max(values))]
            elif t.kind == "chart_lowest":
                assert t.answer == names[values.index(min(values))]
            elif t.kind == "chart_value":
                pattern = r"\bbar ([A-H])\b" if letters else r"\bthe (\w+) bar"
                assert t.answer == str(values[names.index(re.search(pattern, t.question).group(1))])


def test_scene_counts_and_existence_follow_from_the_marks(drawn):
    checked = 0
    for s in drawn["scene"]:
        for t in s.turns:
            if not t.kind.startswith("count") and t.kind != "existence":
                continue
            words = re.findall(r"[a-z]+", t.question.lower())
            color = next((COLORS.index(w) for w in words if w in COLORS), None)
            shape = next((NOUNS[w] for w in words if w in NOUNS), None)
            n = sum((color is None or m.color == color) and (shape is None or m.shape == shape) for m in s.marks)
            assert t.answer == (("yes" if n else "no") if t.kind == "existence" else str(n)), t
            checked += 1
    assert checked > N


def test_every_kind_has_phrasings(drawn):
    names = re.compile(r"\b(" + "|".join((*COLORS, *NOUNS, "small", "big", "bar [a-h]")) + r")\b")
    forms = defaultdict(set)
    for samples in drawn.values():
        for s in samples:
            for t in s.turns:
                assert t.kind in KINDS and t.question and t.answer
                forms[t.kind].add(names.sub("_", t.question.lower().rstrip("?.!")))
    assert {kind: len(forms[kind]) for kind in KINDS if len(forms[kind]) < 6} == {}


def test_outside_turns_have_the_fixed_answer(drawn):
    for family, samples in drawn.items():
        for t in (t for s in samples for t in s.turns if t.kind == "outside"):
            assert t.answer == ("There is no picture. Please give me one." if family == "none" else OUTSIDE_ANSWER)


def test_turn_limit():
    assert all(1 <= len(sample(seed, turns=2).turns) <= 2 for seed in range(40))


def test_corpus_is_repeatable_and_needs_no_pictures():
    lines = list(corpus(200, 3))
    assert lines == list(corpus(200, 3)) != list(corpus(200, 4))
    assert OUTSIDE_ANSWER in lines and len(lines) > 400


def test_words():
    assert len(WORDS) >= 400
    assert all(re.fullmatch(r"[a-z]{2,8}", word) for word in WORDS)
