"""Bar charts: 3 to 6 bars of whole values 1 to 10, named by letters under them or by their colours."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from . import fonts
from .backgrounds import Background, background, canvas_size, finish
from .outside import outside_question
from .palette import RGB, contrast, from_hsv, mix, tone_on
from .phrases import MOST, PEAK, phrase
from .types import CHARS, COLORS, OUTSIDE_ANSWER, Mark, Turn

_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_TITLES = (
    "Results", "Sales", "Scores", "Points", "Units", "Total", "Survey", "Chart 1", "Figure 2", "Group", "Budget",
    "Visitors", "Year 2024", "Test scores", "Team points", "Rainfall", "Books read", "Votes",
)  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """values: whole, 1 to 10, with one highest and one lowest. letters: "" where the bars go by their colours."""

    width: int
    height: int
    values: tuple[int, ...]
    letters: str
    colors: tuple[int, ...]  # indices into COLORS; -1 where the colour is not the bar's name
    tones: tuple[RGB, ...]
    behind: Background


def plan_chart(rng: random.Random) -> Chart:
    """Canvas 200 to 1200 pixels a side, within 2:1."""
    width, height = canvas_size(rng, (1, 2), least=200)
    if rng.random() < 0.3:
        width, height = height, width
    behind = background(rng, width, height, "paper" if rng.random() < 0.6 else "calm")
    count = rng.randint(3, 6)
    values = [rng.randint(1, 10) for _ in range(count)]
    while values.count(max(values)) > 1 or values.count(min(values)) > 1:
        values = [rng.randint(1, 10) for _ in range(count)]
    if rng.random() < 0.42:
        tones = [(color, tone_on(rng, color, behind.colors, tries=20)) for color in rng.sample(range(8), 8)]
        usable = [(color, tone) for color, tone in tones if tone is not None][:count]
        colors = tuple(color for color, _ in usable)
        if len(usable) < count:
            return plan_chart(rng)
        return Chart(width, height, tuple(values), "", colors, tuple(tone for _, tone in usable), behind)
    letters = _LETTERS[:count]
    if rng.random() < 0.35:
        letters = "".join(sorted(rng.sample(_LETTERS, count)))
    single = _any_tone(rng, behind)
    mixed = rng.random() < 0.4
    bars = tuple(_any_tone(rng, behind) if mixed else single for _ in range(count))
    return Chart(width, height, tuple(values), letters, (-1,) * count, bars, behind)


def _any_tone(rng: random.Random, behind: Background) -> RGB:
    """The colour of a bar that goes by its letter: a named one or any other, but not the background's."""
    for _ in range(20):
        tone = from_hsv(rng.uniform(0, 360), rng.uniform(0.0, 0.9), rng.uniform(0.1, 0.95))
        if rng.random() < 0.6:
            tone = tone_on(rng, rng.randrange(len(COLORS)), behind.colors) or tone
        if all(contrast(tone, other) >= 30 for other in behind.colors):
            return tone
    return _ink(behind)


def _ink(behind: Background) -> RGB:
    return max(((15, 15, 15), (245, 245, 245)), key=lambda c: min(contrast(c, other) for other in behind.colors))


def chart_turns(rng: random.Random, chart: Chart, count: int) -> tuple[Turn, ...]:
    """At most `count` different questions: which bar is highest or lowest, and values."""
    names = list(chart.letters) or [COLORS[color] for color in chart.colors]
    topics: list[object] = ["highest", "lowest", *range(len(names))]
    order = rng.sample(topics[:2], 2) + rng.sample(topics[2:], len(names))
    # Values are the harder part and come in more kinds: the two extremes are asked in most charts, not in all.
    order = [topic for topic in order if isinstance(topic, int) or rng.random() < 0.85]
    rng.shuffle(order)
    turns = []
    for topic in order[:count]:
        if isinstance(topic, int):
            bar = f"bar {names[topic]}" if chart.letters else f"the {names[topic]} bar"
            turns.append(Turn(phrase(rng, "chart_value", "number", bar=bar), str(chart.values[topic]), "chart_value"))
            continue
        name = str(topic)
        form = "chart_letter" if chart.letters else "chart_color"
        question = phrase(rng, form, "none", most=rng.choice(MOST[name]), peak=rng.choice(PEAK[name]))
        extreme = max(chart.values) if name == "highest" else min(chart.values)
        turns.append(Turn(question, names[chart.values.index(extreme)], f"chart_{name}"))
    if rng.random() < 0.05:
        turns[rng.randrange(len(turns))] = _absent(rng, names, bool(chart.letters))
    if rng.random() < 0.25:
        turns[rng.randrange(len(turns))] = Turn(outside_question(rng, "chart"), OUTSIDE_ANSWER, "outside")
    return tuple(turns)


def _absent(rng: random.Random, names: list[str], letters: bool) -> Turn:
    other = rng.choice([name for name in (_LETTERS if letters else COLORS) if name not in names])
    bar = f"bar {other}" if letters else f"{other} bar"
    question = phrase(rng, "chart_value", "number", bar=bar if letters else f"the {bar}")
    return Turn(question, f"There is no {bar}.", "chart_value")


def paint_chart(rng: random.Random, chart: Chart) -> tuple[Image.Image, tuple[Mark, ...]]:
    """The picture; a mark at the middle of each bar's upper edge, and one at each letter below."""
    image = chart.behind.paint()
    pen = ImageDraw.Draw(image)
    width, height, count = chart.width, chart.height, len(chart.values)
    ink = mix(_ink(chart.behind), chart.behind.colors[0], rng.uniform(0, 0.25))
    faint = mix(_ink(chart.behind), chart.behind.colors[0], rng.uniform(0.65, 0.85))
    face = fonts.pick_face(rng)
    small = fonts.load(face, max(11, round(min(width, height) * rng.uniform(0.035, 0.055))))
    label = fonts.load(face, max(13, round(min(width, height) * rng.uniform(0.05, 0.075))))
    line = max(1, round(min(width, height) * rng.uniform(0.003, 0.007)))

    title = rng.choice(_TITLES) if rng.random() < 0.35 else ""
    left = small.getlength("10") + 6 * line + max(4, width * rng.uniform(0.015, 0.06))
    right = width * rng.uniform(0.93, 0.98)
    bottom = height - (label.size * 1.6 if chart.letters else height * rng.uniform(0.03, 0.07)) - line
    top = small.size * 1.5 + (label.size * 1.6 if title else 0) + height * rng.uniform(0.0, 0.04)
    unit = (bottom - top) / 10  # pixels for a value of 1

    step = rng.choice((1, 2, 5))
    if unit * step < small.size * 1.15:
        step = 2 if unit * 2 > small.size * 1.15 else 5
    grid = rng.random() < 0.5
    for value in range(0, 11, step):
        y = bottom - value * unit
        if grid and value:
            pen.line((left, y, right, y), fill=faint, width=line)
        pen.line((left - 4 * line, y, left, y), fill=ink, width=line)
        pen.text((left - 6 * line, y), str(value), font=small, fill=ink, anchor="rm")

    slot = (right - left) / count
    bar_width = slot * rng.uniform(0.4, 0.82)
    edge = rng.choice((None, None, ink, (0, 0, 0)))
    marks = []
    valued = rng.random() < 0.5
    for index, value in enumerate(chart.values):
        x, y = left + (index + 0.5) * slot, bottom - value * unit
        tone = chart.tones[index]
        box = (x - bar_width / 2, y, x + bar_width / 2, bottom)
        pen.rectangle(box, fill=tone, outline=edge, width=line if edge else 0)
        marks.append(Mark("bar", x, y, box, color=chart.colors[index], value=value, index=index))
        if valued:
            pen.text((x, y - small.size * 0.25), str(value), font=small, fill=ink, anchor="mb")
    for index, letter in enumerate(chart.letters):
        box = label.getbbox(letter)
        x, y = left + (index + 0.5) * slot, bottom + 2 * line + label.size * 0.35
        corner = (x - (box[0] + box[2]) / 2, y - box[1])
        pen.text(corner, letter, font=label, fill=ink)
        half_w, half_h = (box[2] - box[0]) / 2, (box[3] - box[1]) / 2
        around = (x - half_w, y, x + half_w, y + 2 * half_h)
        marks.append(Mark("char", x, y + half_h, around, char=CHARS.index(letter), index=index))
    frame = rng.random()
    pen.line((left, bottom, right, bottom), fill=ink, width=line)
    if frame < 0.75:
        pen.line((left, top, left, bottom), fill=ink, width=line)
    if frame < 0.25:
        pen.line((left, top, right, top, right, bottom), fill=ink, width=line)
    if title:
        pen.text((width / 2, top - small.size * 1.5), title, font=label, fill=ink, anchor="mb")
    return finish(rng, image), tuple(marks)
