"""Questions about printed text and charts, questions outside the small world, and talk without a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llama_multimodal.zoo.world.types import COLORS, OUTSIDE_ANSWER, SHAPES, Turn

NO_PICTURE_ANSWER = "There is no picture. Please give me one."

TEXT_QUESTIONS = (
    "What does the text say?",
    "What is written in the picture?",
    "What is written here?",
    "Read the text.",
    "Read the word in the picture.",
    "What does it say?",
    "Which word is printed in the picture?",
    "What text is in the image?",
    "Please read the text in this picture.",
    "Can you read what is written?",
    "Transcribe the text.",
    "Which letters or digits are shown?",
)
_HIGHEST = (
    "Which bar is the highest?",
    "Which bar is the tallest?",
    "What is the highest bar?",
    "Which bar has the largest value?",
    "Which bar has the highest value?",
    "Name the tallest bar.",
    "Which bar is the biggest?",
    "Which bar shows the most?",
    "What is the tallest bar in the chart?",
    "Which bar has the greatest value?",
)
_LOWEST = (
    "Which bar is the lowest?",
    "Which bar is the shortest?",
    "What is the lowest bar?",
    "Which bar has the smallest value?",
    "Which bar has the lowest value?",
    "Name the shortest bar.",
    "Which bar is the smallest?",
    "Which bar shows the least?",
    "What is the shortest bar in the chart?",
    "Which bar has the least value?",
)
# {bar} is "bar A" or "the red bar".
_VALUE = (
    "What is the value of {bar}?",
    "How high is {bar}?",
    "How tall is {bar}?",
    "What value does {bar} have?",
    "What number does {bar} show?",
    "Which value does {bar} reach?",
    "Give the value of {bar}.",
    "Read the value of {bar}.",
    "What does {bar} show?",
    "Up to which number does {bar} go?",
)
CHART_QUESTIONS = {"chart_highest": _HIGHEST, "chart_lowest": _LOWEST, "chart_value": _VALUE}

_FILL = {
    "place": ("France", "Italy", "Japan", "Spain", "Germany", "India", "China", "Brazil", "Egypt", "Canada"),
    "city": ("Paris", "London", "Rome", "Berlin", "Tokyo", "Madrid", "New York"),
    "animal": ("dog", "cat", "horse", "bird", "fish", "cow", "lion", "bear"),
    "thing": ("car", "house", "tree", "boat", "chair", "table", "phone", "cup", "book", "flower"),
    "person": ("man", "woman", "child", "boy", "girl", "person"),
    "day": ("today", "tomorrow", "now", "this week", "on Monday", "on Sunday"),
    "topic": ("love", "music", "the sea", "the moon", "football", "history", "science", "food", "money"),
    "text_kind": ("poem", "story", "song", "letter", "joke", "list"),
    "code": ("Python", "Java", "HTML"),
    "wear": ("wearing", "doing", "eating", "holding", "saying", "thinking"),
    "food": ("bread", "pizza", "soup", "cake", "rice"),
    "a": tuple(str(i) for i in range(1, 21)),
    "b": tuple(str(i) for i in range(1, 21)),
    "op": ("plus", "minus", "times"),
    "sign": ("+", "-", "*"),
    "language": ("French", "German", "Spanish", "Chinese"),
}
OUTSIDE_QUESTIONS = (
    "What is the weather {day}?",
    "How is the weather in {city}?",
    "Will it rain {day}?",
    "Is it cold in {city}?",
    "What is the capital of {place}?",
    "Where is {place}?",
    "How many people live in {city}?",
    "Who is the president of {place}?",
    "How far is it from {city} to {place}?",
    "Who is the {person} in the picture?",
    "What is the {person} {wear}?",
    "How old is the {person}?",
    "Is the {person} happy?",
    "Is there a {person} in the picture?",
    "What animal is in the picture?",
    "Is there a {animal} in the picture?",
    "What is the {animal} doing?",
    "What is the name of the {animal}?",
    "How many {animal}s are there?",
    "Can you see a {thing}?",
    "Is there a {thing} in the image?",
    "Where is the {thing}?",
    "What is {a} {op} {b}?",
    "What is {a} {sign} {b}?",
    "Tell me a joke.",
    "Tell me a {text_kind} about {topic}.",
    "Write a {text_kind} about {topic}.",
    "Write some {code} code.",
    "Write a {code} program.",
    "Who painted this?",
    "Who made this picture?",
    "When was this picture taken?",
    "Where was this picture taken?",
    "Which camera took this?",
    "What time is it?",
    "What time is it in {city}?",
    "What day is it {day}?",
    "How do I make {food}?",
    "Do you like {food}?",
    "Do you like {topic}?",
    "What do you think about {topic}?",
    "Tell me about {topic}.",
    "Tell me about {place}.",
    "What is the meaning of life?",
    "Who are you?",
    "What is your name?",
    "How old are you?",
    "How are you?",
    "Say something in {language}.",
    "How do you say {animal} in {language}?",
    "Who won the game {day}?",
    "What should I do {day}?",
    "Why is the sky blue?",
    "How much does a {thing} cost?",
)

# Talk without a picture: these, and questions about shapes, text and charts.
_GREETINGS = (
    "Hello!",
    "Hi!",
    "Hi there!",
    "Hello, how are you?",
    "Hey!",
    "Good morning!",
    "Good evening!",
    "What can you do?",
    "Can you help me?",
    "What is this?",
    "What do you see?",
    "Describe the picture.",
    "Describe this image.",
    "What is in the picture?",
    "What is in the image?",
    "How many shapes are there?",
    "How many shapes are in the picture?",
)
_NO_PICTURE_TEMPLATES = (
    "How many {color} shapes are there?",
    "How many {shape} shapes are there?",
    "How many {color} {shape} shapes are there?",
    "Is there a {color} {shape}?",
    "Is there a {shape} in the picture?",
    "What color is the {shape}?",
    "What shape is the {color} thing?",
    "Is the {color} {shape} left of the {shape2}?",
    "Where is the {color} {shape}?",
)


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _dress(rng: np.random.Generator, question: str) -> str:
    """The question as different people type it."""
    draw = rng.random()
    if draw < 0.3:
        question = question[0].lower() + question[1:]
    return question.rstrip("?.!") if 0.2 < draw < 0.45 else question


def text_turns(rng: np.random.Generator, text: str, n: int = 2) -> list[Turn]:
    """`n` different questions for the printed text."""
    order = rng.permutation(len(TEXT_QUESTIONS))[:n]
    return [Turn(_dress(rng, TEXT_QUESTIONS[int(i)]), text, "text") for i in order]


def chart_turns(rng: np.random.Generator, names: Sequence[str], values: Sequence[int], n: int) -> list[Turn]:
    """At most `n` distinct questions about a chart: its highest and lowest bar, and the value of each bar."""
    asks: list[tuple[str, int]] = [("chart_value", i) for i in range(len(names))]
    asks += [("chart_highest", i) for i, v in enumerate(values) if v == max(values)]
    asks += [("chart_lowest", i) for i, v in enumerate(values) if v == min(values)]
    turns = []
    for at in rng.permutation(len(asks))[:n]:
        kind, index = asks[int(at)]
        name = names[index]
        bar = f"bar {name}" if len(name) == 1 else f"the {name} bar"
        question = _pick(rng, CHART_QUESTIONS[kind]).format(bar=bar)
        turns.append(Turn(_dress(rng, question), str(values[index]) if kind == "chart_value" else name, kind))
    return turns


def outside_turn(rng: np.random.Generator) -> Turn:
    """A question the model does not answer."""
    fillers = {key: _pick(rng, words) for key, words in _FILL.items()}
    question = _pick(rng, OUTSIDE_QUESTIONS).format(**fillers)
    return Turn(_dress(rng, question.replace("fishs", "fish")), OUTSIDE_ANSWER, "outside")


def no_picture_turn(rng: np.random.Generator) -> Turn:
    """A question about a picture, or a greeting, where there is no picture."""
    kind = rng.random()
    if kind < 0.35:
        question = _pick(rng, _GREETINGS)
    elif kind < 0.55:
        question = _pick(rng, TEXT_QUESTIONS)
    elif kind < 0.75:
        name = _pick(rng, COLORS) if rng.random() < 0.5 else ""
        bar = f"the {name} bar" if name else f"bar {_pick(rng, 'ABCDEFGH')}"
        question = _pick(rng, (*_HIGHEST, *_LOWEST, *_VALUE)).format(bar=bar)
    else:
        question = _pick(rng, _NO_PICTURE_TEMPLATES).format(
            color=_pick(rng, COLORS), shape=_pick(rng, SHAPES), shape2=_pick(rng, SHAPES)
        )
        question = question.replace("a orange", "an orange")
    return Turn(_dress(rng, question), NO_PICTURE_ANSWER, "outside")
