"""Questions that the embedded model cannot answer, and ways to start a conversation without a picture."""

from __future__ import annotations

import random
import re

from .phrases import PHRASES, fill, vary

_TEMPLATES = (
    "What is the weather like {when}?",
    "Will it rain {when}?",
    "How warm is it in {city}?",
    "What is the temperature in {city} {when}?",
    "Write a poem about {topic}.",
    "Write a short story about {topic}.",
    "Tell me a joke about {topic}.",
    "Sing a song about {topic}.",
    "Tell me a story.",
    "Tell me a joke.",
    "What do you know about {topic}?",
    "Explain {topic} to me.",
    "Who invented {topic}?",
    "Why do people like {topic}?",
    "Where can I buy {topic}?",
    "What is the history of {topic}?",
    "Who is {person}?",
    "Who was {person}?",
    "How old is {person}?",
    "When was {person} born?",
    "Where does {person} live?",
    "What is the capital of {country}?",
    "How many people live in {city}?",
    "Where is {city}?",
    "How far is it from {city} to {country}?",
    "What language do people speak in {country}?",
    "Who is the president of {country}?",
    "What is {n} plus {m}?",
    "What is {n} times {m}?",
    "How much is {n} minus {m}?",
    "Divide {n} by {m}.",
    "What is {n} + {m}?",
    "Solve x + {n} = {m}.",
    "Is {n} a prime number?",
    "What is the square root of {n}?",
    "Write a program that sorts a list.",
    "Write code in {code} for {topic}.",
    "How do I open a file in {code}?",
    "Fix the error in my {code} program.",
    "What breed is the {animal}?",
    "What is the {animal} doing?",
    "What colour is the {animal}?",
    "How many {animal}s are there?",
    "Is there a {animal} in the picture?",
    "Is the {animal} happy?",
    "Where is the {animal}?",
    "Describe the {animal}.",
    "What is the {human} wearing?",
    "What is the {human} doing?",
    "Who is the {human} in this photo?",
    "How old is the {human}?",
    "Is the {human} smiling?",
    "What colour is the {human}'s hair?",
    "How many people are in the picture?",
    "What colour is the {object}?",
    "Is there a {object} in the image?",
    "How many {object}s can you see?",
    "What brand is the {object}?",
    "How much does the {object} cost?",
    "Where is the {object}?",
    "Where was this photo taken?",
    "When was this picture taken?",
    "Who took this photo?",
    "Who painted this picture?",
    "What time is it?",
    "What time is it on the clock?",
    "What day is it {when}?",
    "What year is it?",
    "Translate {topic} into {language}.",
    "How do you say {topic} in {language}?",
    "Do you speak {language}?",
    "How do I cook {food}?",
    "What is a good recipe for {food}?",
    "How many calories are in {food}?",
    "Is {food} good for me?",
    "What should I eat {when}?",
    "What should I do {when}?",
    "Can you help me with my homework?",
    "What is your name?",
    "Who are you?",
    "Who made you?",
    "How are you?",
    "Are you a human?",
    "What can you do?",
    "Do you like {topic}?",
    "What is your favourite {animal}?",
    "What is the meaning of life?",
    "Who won the game {when}?",
    "What is the news {when}?",
    "Play some music.",
    "Send an email to {person}.",
    "Set an alarm for {n} o'clock.",
    "Book a flight to {city}.",
    "What is the best phone?",
    "Should I buy a new {object}?",
    "Thank you!",
    "Good morning!",
    "Hello!",
    "What does {topic} mean?",
    "Give me advice about {topic}.",
    "Is this picture real?",
    "Is this a photo of {city}?",
    "Does this picture show {person}?",
    "Summarise a book about {topic}.",
    "What is the plot of the film about {topic}?",
)
_FILLERS = {
    "when": ("today", "tomorrow", "tonight", "now", "this week", "in winter", "in the summer"),
    "city": ("Paris", "London", "Berlin", "Tokyo", "New York", "Rome", "Madrid", "Cairo", "Moscow", "Boston"),
    "country": ("France", "Germany", "Japan", "Spain", "Italy", "China", "India", "Brazil", "Canada", "Egypt"),
    "topic": (
        "love", "the sea", "spring", "cats", "football", "music", "the moon", "the sun", "computers", "history",
        "science", "chess", "money", "war", "the world", "school", "trees", "the internet", "physics", "art",
    ),
    "person": (
        "Einstein", "Shakespeare", "Napoleon", "Mozart", "Anna", "John", "my mother", "the king", "the president",
        "Marie Curie", "Peter", "Maria",
    ),
    "code": ("Python", "Java", "Rust", "C"),
    "animal": ("dog", "cat", "horse", "bird", "cow", "fish", "rabbit", "bear", "lion", "sheep"),
    "human": ("man", "woman", "girl", "boy", "child", "person", "baby"),
    "object": ("car", "house", "tree", "phone", "chair", "table", "bottle", "bike", "hat", "book", "ball", "flower"),
    "language": ("German", "French", "Spanish", "English", "Latin", "Japanese"),
    "food": ("rice", "pasta", "bread", "soup", "an egg", "pizza", "cake", "an apple"),
}  # fmt: skip
_GREETINGS = (
    "Hello!",
    "Hi!",
    "Hi there!",
    "Hey!",
    "Good morning!",
    "Good evening!",
    "How are you?",
    "What can you do?",
    "Who are you?",
    "Can you help me?",
    "Help me, please.",
    "Are you there?",
    "Thank you!",
)
# A question of another family is outside too: there is nothing in the picture that answers it.
_ELSEWHERE = {
    "scene": ("text", "text_number", "text_code", "chart_letter", "chart_value"),
    "text": ("count_all", "count", "color", "shape", "existence", "relation_where", "chart_letter", "chart_value"),
    "chart": ("count", "shape", "existence", "relation_yes_no", "relation_where"),
}
_NOUNS = (
    ("circle", "circles"), ("red square", "red squares"), ("star", "stars"), ("blue circle", "blue circles"),
    ("triangle", "triangles"), ("green hexagon", "green hexagons"), ("cross", "crosses"),
)  # fmt: skip


def outside_question(rng: random.Random, family: str) -> str:
    """A question that a picture of that family ("none": no picture) cannot answer."""
    if family in _ELSEWHERE and rng.random() < 0.25:
        return elsewhere_question(rng, rng.choice(_ELSEWHERE[family]))
    template = rng.choice(_TEMPLATES)
    names = re.findall(r"{(\w+)}", template)
    slots = {name: rng.choice(_FILLERS[name]) for name in names if name in _FILLERS}
    slots |= {name: str(rng.randint(2, 99)) for name in names if name in ("n", "m")}
    question = template.format(**slots)
    if rng.random() < 0.5:
        question = question.replace("colour", "color").replace("favourite", "favorite")
    return vary(rng, question)


def unseen_question(rng: random.Random) -> str:
    """What somebody says who has not shown a picture: a greeting, or a question of any kind."""
    draw = rng.random()
    if draw < 0.25:
        return vary(rng, rng.choice(_GREETINGS))
    if draw < 0.45:
        return outside_question(rng, "none")
    return elsewhere_question(rng, rng.choice(tuple(PHRASES)))


def elsewhere_question(rng: random.Random, form: str) -> str:
    """A question of that form (a key of PHRASES) about nothing in particular."""
    (one, many), (other, _) = rng.sample(_NOUNS, 2)
    bar = f"bar {rng.choice('ABCDEF')}" if rng.random() < 0.6 else f"the {rng.choice(('red', 'blue', 'green'))} bar"
    template = rng.choice(PHRASES[form])
    words = {"noun": one, "nouns": many, "a_noun": f"a {one}", "one": one, "other": other, "color": "red"}
    return vary(rng, fill(rng, template, **words, side="to the left of", most="highest", peak="highest", bar=bar))
