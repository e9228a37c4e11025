"""The ways people ask: templates per kind of question, and the small variations that every question gets.

Slots: {thing}, {things} objects in general · {picture} · {noun}, {nouns} what is asked about ("red circle", "circles")
· {a_noun} with its article · {colour} in either spelling · {one}, {other} two referents · {side} a relation · {bar}.
"""

from __future__ import annotations

import random

PHRASES: dict[str, tuple[str, ...]] = {
    "count_all": (
        "How many {things} are there?",
        "How many {things} are in the {picture}?",
        "How many {things} can you see?",
        "How many {things} do you see in this {picture}?",
        "Count the {things}.",
        "Count all the {things} in the {picture}.",
        "What is the number of {things}?",
        "What is the total number of {things} in the {picture}?",
        "Tell me how many {things} there are.",
        "Can you count the {things} for me?",
        "How many {things} does the {picture} show?",
        "How many {things} are there in total?",
        "How many are there?",
        "Give the number of {things} in the {picture}.",
    ),
    "count": (
        "How many {nouns} are there?",
        "How many {nouns} are in the {picture}?",
        "How many {nouns} can you see?",
        "How many {nouns} do you see in this {picture}?",
        "Count the {nouns}.",
        "Count all the {nouns} in the {picture}.",
        "What is the number of {nouns}?",
        "Tell me how many {nouns} there are.",
        "Can you count the {nouns} for me?",
        "How many {nouns} does the {picture} show?",
        "How many of the {things} are {nouns}?",
        "{Nouns}: how many?",
        "Give the number of {nouns} in the {picture}.",
        "In this {picture}, how many {nouns} are there?",
    ),
    "count_color_only": (
        "How many of the {things} are {color}?",
        "How many are {color}?",
        "How many {things} have the {colour} {color}?",
        "How many {color} ones are there?",
    ),
    "color": (
        "What {colour} is the {noun}?",
        "What is the {colour} of the {noun}?",
        "Which {colour} is the {noun}?",
        "Which {colour} does the {noun} have?",
        "What {colour} does the {noun} have?",
        "Tell me the {colour} of the {noun}.",
        "Name the {colour} of the {noun}.",
        "The {noun} is what {colour}?",
        "What {colour} is the {noun} in the {picture}?",
        "In which {colour} is the {noun} drawn?",
        "Can you tell me what {colour} the {noun} is?",
        "Do you know the {colour} of the {noun}?",
    ),
    "color_plural": (
        "What {colour} are the {nouns}?",
        "What is the {colour} of the {nouns}?",
        "Which {colour} are the {nouns}?",
        "Tell me the {colour} of the {nouns}.",
        "Which {colour} do the {nouns} have?",
        "What {colour} are the {nouns} in the {picture}?",
    ),
    "shape": (
        "What shape is the {noun}?",
        "What is the shape of the {noun}?",
        "Which shape is the {noun}?",
        "Which shape does the {noun} have?",
        "What shape does the {noun} have?",
        "Tell me the shape of the {noun}.",
        "Name the shape of the {noun}.",
        "The {noun} has what shape?",
        "What shape is the {noun} in the {picture}?",
        "What kind of shape is the {noun}?",
        "Can you tell me what shape the {noun} is?",
        "What is the {noun}?",
    ),
    "shape_plural": (
        "What shape are the {nouns}?",
        "What is the shape of the {nouns}?",
        "Which shape are the {nouns}?",
        "Tell me the shape of the {nouns}.",
        "Which shape do the {nouns} have?",
        "What shape are the {nouns} in the {picture}?",
    ),
    "existence": (
        "Is there {a_noun}?",
        "Is there {a_noun} in the {picture}?",
        "Is there any {noun}?",
        "Are there any {nouns}?",
        "Are there any {nouns} in the {picture}?",
        "Do you see {a_noun}?",
        "Do you see any {nouns}?",
        "Can you see {a_noun} in this {picture}?",
        "Can you see any {nouns}?",
        "Does the {picture} show {a_noun}?",
        "Does the {picture} contain any {nouns}?",
        "Does this {picture} have {a_noun}?",
        "Can you find {a_noun}?",
        "Tell me if there is {a_noun}.",
    ),
    "place": (
        "Where is the {noun}?",
        "Where is the {noun} in the {picture}?",
        "Where in the {picture} is the {noun}?",
        "In which part of the {picture} is the {noun}?",
        "Which part of the {picture} is the {noun} in?",
        "Where do you see the {noun}?",
        "Where can I find the {noun}?",
        "Where does the {picture} show the {noun}?",
        "What is the position of the {noun}?",
        "What is the place of the {noun} in the {picture}?",
        "Tell me where the {noun} is.",
        "Can you tell me where the {noun} is?",
    ),
    "relation_yes_no": (
        "Is the {one} {side} the {other}?",
        "Is the {one} {side} the {other} in the {picture}?",
        "Does the {one} lie {side} the {other}?",
        "In this {picture}, is the {one} {side} the {other}?",
        "Can you tell me if the {one} is {side} the {other}?",
        "Is it true that the {one} is {side} the {other}?",
        "The {one} is {side} the {other}, right?",
        "Would you say the {one} is {side} the {other}?",
        "Tell me if the {one} is {side} the {other}.",
        "Do you see the {one} {side} the {other}?",
    ),
    "relation_where": (
        "Where is the {one} compared with the {other}?",
        "Where is the {one} compared to the {other}?",
        "Where is the {one} relative to the {other}?",
        "Where is the {one} with respect to the {other}?",
        "Where is the {one}, seen from the {other}?",
        "On which side of the {other} is the {one}?",
        "In which direction from the {other} is the {one}?",
        "Is the {one} left, right, above or below the {other}?",
        "Left, right, above or below: where is the {one} compared with the {other}?",
        "Where does the {one} lie compared with the {other}?",
        "What is the position of the {one} relative to the {other}?",
    ),
    "description": (
        "Describe the {picture}.",
        "Describe this {picture}, please.",
        "What is in the {picture}?",
        "What do you see?",
        "What can you see in the {picture}?",
        "What does the {picture} show?",
        "Tell me what is in the {picture}.",
        "List the {things} in the {picture}.",
        "List all the {things} you can see.",
        "Which {things} are in the {picture}?",
        "What {things} are there?",
        "Give a description of the {picture}.",
        "Can you describe this {picture}?",
    ),
    "text": (
        "What does it say?",
        "What does the {picture} say?",
        "Read the text.",
        "Read the word.",
        "Read what is written.",
        "What is written in the {picture}?",
        "What is written here?",
        "What is printed in the {picture}?",
        "Which word is this?",
        "What word is written here?",
        "What text do you see?",
        "What text is in the {picture}?",
        "Can you read this?",
        "Can you read the text in the {picture}?",
        "Tell me what is written.",
        "Write down the text in the {picture}.",
        "What does the sign say?",
    ),
    "text_number": (
        "What number is printed?",
        "What number is this?",
        "Which number do you see?",
        "Read the number.",
        "What number is in the {picture}?",
        "Tell me the number in the {picture}.",
        "Which number is written here?",
    ),
    "text_code": (
        "What is the code?",
        "Read the code.",
        "Which code is printed?",
        "What code do you see in the {picture}?",
    ),
    "chart_letter": (
        "Which bar is the {most}?",
        "Which bar is the {most} in the {chart}?",
        "Which letter has the {most} bar?",
        "What is the letter of the {most} bar?",
        "What is the {most} bar?",
        "Which bar has the {peak} value?",
        "Which letter has the {peak} value?",
        "Name the {most} bar.",
        "Tell me which bar is the {most}.",
        "What is the label of the {most} bar?",
        "Which bar shows the {peak} value in the {chart}?",
    ),
    "chart_color": (
        "Which bar is the {most}?",
        "Which bar is the {most} in the {chart}?",
        "What {colour} is the {most} bar?",
        "What is the {colour} of the {most} bar?",
        "Which {colour} is the {most} bar?",
        "Which {colour} has the {most} bar?",
        "Which {colour} has the {peak} value?",
        "Which bar has the {peak} value?",
        "Tell me the {colour} of the {most} bar.",
        "Name the {colour} of the bar with the {peak} value.",
        "Which bar shows the {peak} value in the {chart}?",
    ),
    "chart_value": (
        "What is the value of {bar}?",
        "What is the value of {bar} in the {chart}?",
        "How high is {bar}?",
        "How tall is {bar}?",
        "What value does {bar} have?",
        "Which value does {bar} show?",
        "What is the height of {bar}?",
        "Tell me the value of {bar}.",
        "Read the value of {bar}.",
        "What number does {bar} show?",
        "How much is {bar}?",
        "Give the value of {bar}.",
    ),
}
SIDES = (
    ("to the left of", "left of", "on the left of", "on the left side of"),
    ("to the right of", "right of", "on the right of", "on the right side of"),
    ("above", "higher than", "over"),
    ("below", "lower than", "under"),
)
_SLOTS = {
    "picture": ("picture", "picture", "image", "image", "drawing", "scene"),
    "chart": ("chart", "bar chart", "graph", "picture"),
    "colour": ("colour", "color"),
}
_THINGS = (("object", "objects"), ("object", "objects"), ("thing", "things"), ("shape", "shapes"), ("item", "items"))
MOST = {"highest": ("highest", "tallest", "largest", "biggest"), "lowest": ("lowest", "shortest", "smallest")}
PEAK = {"highest": ("highest", "largest", "greatest", "biggest"), "lowest": ("lowest", "smallest", "least")}
_SUFFIXES = {
    "number": ("Just the number.", "Answer with a number.", "Just give the number.", "Answer with one number."),
    "word": ("Answer with one word.", "Just one word.", "One word, please.", "Answer in one word."),
    "yes": ("Yes or no?", "Answer yes or no.", "Just yes or no."),
    "none": (),
}


def thing_words(rng: random.Random) -> tuple[str, str]:
    """A word for a thing and its plural."""
    return rng.choice(_THINGS)


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def phrase(rng: random.Random, form: str, answer: str = "none", **slots: str) -> str:
    """A question of the form (a key of PHRASES) with its slots filled in, varied as people vary.

    answer: what a suffix may ask for: "number", "word", "yes" or "none".
    """
    return vary(rng, fill(rng, rng.choice(PHRASES[form]), **slots), answer)


def fill(rng: random.Random, template: str, **slots: str) -> str:
    """A template with its slots filled in, at random where the slot is not given."""
    thing, things = thing_words(rng)
    words = {name: rng.choice(options) for name, options in _SLOTS.items()}
    words |= {"thing": thing, "things": things} | slots
    if "nouns" in words:
        words["Nouns"] = words["nouns"][0].upper() + words["nouns"][1:]
    return template.format(**words)


def vary(rng: random.Random, question: str, answer: str = "none") -> str:
    """The question as typed by one person or another: polite, terse, without a capital or a mark at the end."""
    draw = rng.random()
    if draw < 0.05 and "lease" not in question:
        question = question[:-1] + ", please" + question[-1]
    elif draw < 0.09 and "lease" not in question and question[-1] == ".":
        question = "Please " + question[0].lower() + question[1:]
    if rng.random() < 0.07 and _SUFFIXES[answer]:
        return question + " " + rng.choice(_SUFFIXES[answer])
    if rng.random() < 0.14:
        question = question[:-1]
    if rng.random() < 0.14:
        question = question[0].lower() + question[1:]
    return question
