"""The small world: samples are repeatable, and every answer follows from the marks."""

import hashlib
import importlib.util
import re
from collections import Counter, defaultdict

import pytest

from llama_multimodal.errors import MissingExtraError
from llama_multimodal.processing.tiles import choose_canvas
from llama_multimodal.zoo.world import (
    CHARS,
    COLORS,
    FAMILIES,
    KINDS,
    NO_PICTURE_ANSWER,
    OUTSIDE_ANSWER,
    SHAPES,
    SIZES,
    corpus,
    fonts,
    palette,
    sample,
)
from llama_multimodal.zoo.world.phrases import PHRASES, SIDES
from llama_multimodal.zoo.world.words import WORDS

PLURALS = {("crosses" if name == "cross" else name + "s"): i for i, name in enumerate(SHAPES)}
NOUNS = {name: i for i, name in enumerate(SHAPES)} | PLURALS
SIZE_WORDS = {"small": 0, "little": 0, "big": 1, "large": 1}
THING = r"(?:(?:small|little|big|large) )?(?:\w+ )?(?:object|thing|shape|item|" + "|".join(SHAPES) + ")"


@pytest.fixture(scope="module")
def drawn():
    wanted = {"scene": 200, "text": 80, "chart": 80, "none": 80}
    return {family: [sample(i, family=family) for i in range(n)] for family, n in wanted.items()}


def named(words, marks):
    """The objects that a phrase names by shape, colour and size."""
    words = re.findall(r"[a-z]+", words.lower())
    wanted = [
        next((table[w] for w in words if w in table), None)
        for table in (NOUNS, {name: i for i, name in enumerate(COLORS)}, SIZE_WORDS)
    ]
    return [m for m in marks if all(w in (None, v) for w, v in zip(wanted, (m.shape, m.color, m.size)))]


def fingerprint(item):
    pixels = b"" if item.image is None else item.image.tobytes()
    return hashlib.sha256(repr((item.turns, item.marks, item.family)).encode() + pixels).hexdigest()


def test_equal_arguments_give_equal_bytes():
    for seed in range(16):
        family = FAMILIES[seed % 4]
        assert fingerprint(sample(seed, family=family)) == fingerprint(sample(seed, family=family))


def test_splits_and_seeds_are_disjoint():
    prints = [fingerprint(sample(i, split=s, family="scene")) for s in ("train", "heldout") for i in range(25)]
    assert len(set(prints)) == len(prints)


def test_unknown_split_and_family_are_refused():
    with pytest.raises(ValueError, match="split"):
        sample(0, split="dev")
    with pytest.raises(ValueError, match="split"):
        sample(0, split="corpus")
    with pytest.raises(ValueError, match="family"):
        sample(0, family="video")


def test_missing_fonts_name_the_extra(monkeypatch):
    fonts.faces.cache_clear()
    found = importlib.util.find_spec
    monkeypatch.setattr(fonts, "find_spec", lambda name: None if name == "font_roboto" else found(name))
    with pytest.raises(MissingExtraError, match=re.escape('pip install -e ".[train]"')):
        sample(0, family="text")
    fonts.faces.cache_clear()


def test_ten_faces_of_six_families():
    assert len(fonts.faces()) >= 6 and sum(map(len, fonts.faces())) >= 10


def test_family_shares():
    shares = Counter(sample(seed, turns=1).family for seed in range(300))
    assert 150 < shares["scene"] < 210 and 40 < shares["text"] < 80 and 33 < shares["chart"] < 70
    assert 0 < shares["none"] < 25


def test_turns_are_limited():
    for seed in range(40):
        assert 1 <= len(sample(seed, turns=2).turns) <= 2


def test_marks_are_inside_the_picture(drawn):
    for family in ("scene", "text", "chart"):
        for s in drawn[family]:
            assert s.image.mode == "RGB" and s.marks
            assert min(s.image.size) >= (200 if family == "chart" else 120) and max(s.image.size) <= 1200
            assert all(0 <= m.x < s.image.width and 0 <= m.y < s.image.height for m in s.marks)


def test_every_tile_layout_occurs(drawn):
    grids = {choose_canvas(*s.image.size, 128, 4) for s in drawn["scene"]}
    assert grids == {(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)}


def test_scenes_have_one_to_nine_things_and_every_attribute(drawn):
    marks = [m for s in drawn["scene"] for m in s.marks]
    assert {len(s.marks) for s in drawn["scene"]} == set(range(1, 10))
    assert {m.shape for m in marks} == set(range(len(SHAPES))) and {m.color for m in marks} == set(range(len(COLORS)))
    assert {m.size for m in marks} == {-1, *range(len(SIZES))}


def test_things_show_their_colour(drawn):
    """The pixel at a thing's centre is nearest to its own colour's tones: what is marked is what is drawn."""
    wrong = total = 0
    tones = ((220, 25, 30), (255, 145, 15), (250, 230, 40), (30, 150, 50),
             (45, 90, 210), (135, 50, 165), (115, 65, 30), (10, 10, 10))  # fmt: skip
    for s in drawn["scene"]:
        for m in s.marks:
            near = [palette.contrast(s.image.getpixel((int(m.x), int(m.y))), tone) for tone in tones]
            wrong += near.index(min(near)) != m.color
            total += 1
    assert wrong / total < 0.05


def test_counts_and_existence_follow_from_the_marks(drawn):
    checked = 0
    for s in drawn["scene"]:
        for t in s.turns:
            if t.kind.startswith("count") or t.kind == "existence":
                n = len(named(t.question, s.marks))
                assert t.answer == (("yes" if n else "no") if t.kind == "existence" else str(n)), t
                checked += 1
    assert checked > 400


def test_colours_and_shapes_follow_from_the_marks(drawn):
    for s in drawn["scene"]:
        for t in s.turns:
            if t.kind not in ("color", "shape"):
                continue
            asked = named(t.question, s.marks)
            if not asked:
                assert re.fullmatch(r"There is no [a-z ]+\.", t.answer)
                continue
            assert {(COLORS[m.color] if t.kind == "color" else SHAPES[m.shape]) for m in asked} == {t.answer}, t
            assert len(asked) == 1 or re.search(r"\b(are|do|of the \w+ ?\w*s)\b", t.question), t


def test_relations_follow_from_the_marks(drawn):
    checked = 0
    sides = {phrase: i for i, group in enumerate(SIDES) for phrase in group}
    for s in drawn["scene"]:
        limit = 0.1 * (s.image.width * s.image.height) ** 0.5
        for t in (t for t in s.turns if t.kind == "relation"):
            first, second = (m.group() for m in re.finditer(rf"(?i)(?<=the ){THING}\b", t.question))
            if t.question.lower().startswith(("on which side of", "in which direction from")):
                first, second = second, first
            (one,), (other,) = named(first, s.marks), named(second, s.marks)
            dx, dy = one.x - other.x, one.y - other.y
            if t.answer in ("yes", "no"):
                said = max((p for p in sides if f" {p} the" in t.question), key=len)
                along = (-dx, dx, -dy, dy)[sides[said]]
                assert abs(along) >= limit and t.answer == ("yes" if along > 0 else "no"), t
            else:
                along = {"left": -dx, "right": dx, "above": -dy, "below": dy}[t.answer]
                assert along >= limit and along >= 1.7 * min(abs(dx), abs(dy)), t
            checked += 1
    assert checked > 80


def test_places_follow_from_the_marks(drawn):
    checked = 0
    for s in drawn["scene"]:
        for t in (t for t in s.turns if t.kind == "place"):
            (mark,) = named(re.search(rf"(?i)(?<=the ){THING}\b", t.question).group(), s.marks)
            words = []
            for share, (near, far) in (
                (mark.y / s.image.height, ("top", "bottom")),
                (mark.x / s.image.width, ("left", "right")),
            ):
                assert abs(share - 1 / 3) >= 0.06 and abs(share - 2 / 3) >= 0.06, t  # a person could not tell
                words += [near] if share < 1 / 3 else [far] if share > 2 / 3 else []
            assert t.answer == (" ".join(words) or "center"), t
            checked += 1
    assert checked > 80


def test_mentions_name_their_thing_alone(drawn):
    """Where one thing is asked about; what several things or none fit is no mention."""
    checked = Counter()
    for s in (s for samples in drawn.values() for s in samples):
        for t in s.turns:
            for mention in t.mentions:
                assert re.search(rf"\b{mention.words}\b", t.question), t
                assert named(mention.words, s.marks) == [mention.mark], t
                checked[t.kind] += 1
            if t.kind in ("color", "shape"):
                asked = named(t.question, s.marks)
                assert [m.mark for m in t.mentions] == (asked if len(asked) == 1 else []), t
            elif t.kind in ("place", "relation"):
                assert len(t.mentions) == len({m.mark for m in t.mentions}) == 1 + (t.kind == "relation"), t
    assert set(checked) == {"color", "shape", "place", "relation"} and min(checked.values()) > 60, checked


def test_descriptions_name_the_things_from_left_to_right(drawn):
    checked = 0
    for s in drawn["scene"]:
        for t in (t for t in s.turns if t.kind == "description"):
            if len(s.marks) > 6:
                assert t.answer.startswith(f"{len(s.marks)} objects: ")
                assert sum(map(int, re.findall(r"\d+", t.answer)[1:])) == len(s.marks)
            else:
                marks = sorted(s.marks, key=lambda m: m.x)
                parts = [f"a {SIZES[m.size]} {COLORS[m.color]} {SHAPES[m.shape]}" for m in marks]
                assert t.answer == ", ".join(parts)
            checked += 1
    assert checked > 10


def test_no_answer_dominates_its_kind():
    answers = defaultdict(Counter)
    for seed in range(300):
        for t in sample(seed, family="scene").turns:
            answers[t.kind][t.answer] += 1
    assert 0.4 < answers["existence"]["yes"] / answers["existence"].total() < 0.6
    yes, no = answers["relation"]["yes"], answers["relation"]["no"]
    assert 0.4 < yes / (yes + no) < 0.6
    for kind in ("count_all", "count_color", "count_shape", "count_both"):
        assert max(answers[kind].values()) / answers[kind].total() < 0.5
        assert {str(n) for n in range(1, 6)} <= set(answers[kind])
    assert len(answers["place"]) == 9 and max(answers["place"].values()) / answers["place"].total() < 0.3


def test_printed_text_is_what_the_marks_spell(drawn):
    for s in drawn["text"]:
        assert [m.index for m in s.marks] == list(range(len(s.marks)))
        assert all(a.x < b.x for a, b in zip(s.marks, s.marks[1:]))
        text = "".join(CHARS[m.char] for m in s.marks)
        assert 1 <= len(text) <= (5 if s.image.width < s.image.height / 1.6 else 8)
        assert {t.answer for t in s.turns if t.kind == "text"} == {text}


def test_charts_agree_with_their_marks(drawn):
    for s in drawn["chart"]:
        bars = [m for m in s.marks if m.kind == "bar"]
        letters = {m.index: CHARS[m.char] for m in s.marks if m.kind == "char"}
        names = [letters[m.index] if letters else COLORS[m.color] for m in bars]
        values = [m.value for m in bars]
        assert 3 <= len(bars) <= 6 and len(set(names)) == len(names)
        assert [m.index for m in bars] == list(range(len(bars))) and set(values) <= set(range(1, 11))
        for a in bars:
            assert all((a.y < b.y) == (a.value > b.value) for b in bars if b.value != a.value)
        for t in s.turns:
            if t.kind in ("chart_highest", "chart_lowest"):
                extreme = max(values) if t.kind == "chart_highest" else min(values)
                assert values.count(extreme) == 1 and t.answer == names[values.index(extreme)]
            elif t.kind == "chart_value":
                name = re.search(r"\bbar ([A-Z])\b" if letters else r"\bthe (\w+) bar", t.question).group(1)
                assert t.answer == (str(values[names.index(name)]) if name in names else t.answer)
                assert (name in names) != t.answer.startswith("There is no ")


def test_every_kind_is_asked_in_many_ways(drawn):
    words = re.compile(r"\b(" + "|".join((*COLORS, *NOUNS, *SIZE_WORDS, "bar [a-z]")) + r")\b")
    forms = defaultdict(set)
    for samples in drawn.values():
        for t in (t for s in samples for t in s.turns):
            assert t.question and t.answer
            forms[t.kind].add(words.sub("_", t.question.lower().rstrip("?.!")))
    assert set(forms) == set(KINDS)
    assert {kind: len(ways) for kind, ways in forms.items() if len(ways) < 6} == {}
    single = {"count_color_only", "text_code"}  # further ways of kinds that have more than six already
    assert {form: len(ways) for form, ways in PHRASES.items() if len(set(ways)) < 6 and form not in single} == {}


def test_outside_turns_have_the_fixed_answer(drawn):
    for family, samples in drawn.items():
        for t in (t for s in samples for t in s.turns if t.kind == "outside"):
            assert t.answer == (NO_PICTURE_ANSWER if family == "none" else OUTSIDE_ANSWER)


def test_the_corpus_is_repeatable_and_small_in_words():
    lines = list(corpus(400, 3))
    assert lines == list(corpus(400, 3)) != list(corpus(400, 4))
    assert OUTSIDE_ANSWER in lines and NO_PICTURE_ANSWER in lines
    assert len({word.lower() for line in lines for word in re.findall(r"[A-Za-z]+", line)}) < 600


def test_words():
    assert len(WORDS) >= 500
    assert all(re.fullmatch(r"[a-z]{2,8}", word) for word in WORDS)
