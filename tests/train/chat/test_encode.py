"""Tokens and labels of the three ways to write a conversation, worked out by hand; cutting; micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chat_for_tests import (
    LLAVA,
    TILE,
    answers,
    asked,
    llava,
    meta,
    picture,
    said,
    smolvlm,
    steps_of,
    text_only,
    tokenizer,
    write_lines,
)

from llama_multimodal.errors import ConfigError, ImageError, PromptError
from llama_multimodal.processing import Processor
from llama_multimodal.processing.processor import TrainingRow
from llama_multimodal.train.chat.config import FileSource
from llama_multimodal.train.chat.encode import Example, encode_row, microbatch
from llama_multimodal.train.chat.skips import BadRow
from llama_multimodal.train.chat.sources import Row

ONE, TWO = picture(20, 25, 1), picture(55, 20, 2)


def written(processor: Processor, row: TrainingRow) -> list[tuple[str, bool]]:
    """Every token as it is written, and whether it is learnt."""
    words = processor.tokenizer
    assert words is not None
    return [(words.token_bytes(i, skip_special=False).decode(), learnt) for i, learnt in zip(row.tokens, row.learnt)]


def ids(text: str, processor: Processor) -> list[int]:
    assert processor.tokenizer is not None
    return processor.tokenizer.encode_with_special(text)


def learnt(processor: Processor, messages: list[dict[str, Any]]) -> list[str]:
    """The stretches that are learnt."""
    pieces = [""]
    for text, learns in written(processor, processor.encode_for_training(messages)):
        if learns:
            pieces[-1] += text
        elif pieces[-1]:
            pieces.append("")
    return [piece for piece in pieces if piece]


def encoded(processor: Processor, *messages: dict[str, Any], longest: int = 200, truncate: bool = False) -> Example:
    row = Row({"messages": list(messages)}, lambda name: name)
    return encode_row(row, "here", FileSource(file="f"), processor, longest=longest, truncate=truncate)


# --- what is learnt --------------------------------------------------------------------------------------------------


def test_metas_format_by_hand() -> None:
    row = meta().encode_for_training([said("user", ONE, " is this?"), said("assistant", "a cat")])
    head = [("<|start_header_id|>", False), ("user", False), ("<|end_header_id|>", False), ("\n\n", False)]
    question = [(" is", False), (" this", False), ("?", False), ("<|eot_id|>", False)]
    next_head = [("<|start_header_id|>", False), ("assistant", False), ("<|end_header_id|>", False), ("\n\n", False)]
    answer = [("a", True), (" cat", True), ("<|eot_id|>", True)]
    image = [("<|image|>", False)]
    assert written(meta(), row) == [("<|begin_of_text|>", False), *head, *image, *question, *next_head, *answer]
    example = encoded(meta(), said("user", ONE, " is this?"), said("assistant", "a cat"))
    a, cat, eot = row.tokens[-3:]
    assert example.labels == [-100] * (len(row.tokens) - 4) + [a, cat, eot, -100]
    assert example.tokens == row.tokens and example.where == "here" and example.num_learnt == 3


def test_llavas_template_by_hand() -> None:
    """Its blocks mark what the assistant says; it ends no turn, so the last one gets the end token for its space."""
    turns = [
        said("user", ONE, "what is this?"),
        said("assistant", "a cat"),
        said("user", "and"),
        said("assistant", "two dogs."),
    ]
    row = llava().encode_for_training(turns)
    before, between = "USER: " + "<image>" * 4 + "\nwhat is this? ASSISTANT: ", " USER: and ASSISTANT: "
    assert row.tokens == ids(f"{before}a cat{between}two dogs.</s>", llava())
    assert learnt(llava(), turns) == [" a cat", " two dogs.</s>"]  # a token has the space before its word
    assert row.images[0].num_tokens == 4 and row.tiles.shape == (1, 3, 28, 28)


def test_smolvlms_template_by_hand() -> None:
    """Without blocks, an answer is what its message adds, less the line end behind its last token."""
    turns = [
        said("system", "be brief"),
        said("user", ONE, "what is this?"),
        said("assistant", "a cat"),
        said("user", "and"),
        said("assistant", "dogs."),
    ]
    row = smolvlm().encode_for_training(turns)
    text = written(smolvlm(), row)
    assert "".join(piece for piece, _ in text).startswith(
        "<s>System: be brief<end_of_utterance>\nUser:<fake_token_around_image><row_1_col_1><image>"
    )
    assert "".join(piece for piece, _ in text).endswith(
        "User: and<end_of_utterance>\nAssistant: dogs.<end_of_utterance>\n"
    )
    assert learnt(smolvlm(), turns) == [" a cat<end_of_utterance>", " dogs.<end_of_utterance>"]
    assert row.tokens.count(smolvlm().config.image_token_id) == row.images[0].num_tokens == 4 * row.images[0].num_tiles


@pytest.mark.parametrize("make", [meta, llava, smolvlm])
def test_tokens_are_those_of_inference(make: Any) -> None:
    """A conversation's first tokens are the prompt that its answer is asked for with; nothing of it is learnt."""
    processor = make()
    asking = [said("user", ONE, "what", TWO, "is this?")]
    prompt = processor(asking)
    row = processor.encode_for_training([*asking, said("assistant", "a cat")])
    length = prompt.lengths[0]
    assert row.tokens[:length] == prompt.tokens[0].tolist()
    assert not any(row.learnt[:length]) and any(row.learnt[length:])
    assert torch.equal(row.tiles, prompt.tiles) and row.images == prompt.images


@pytest.mark.parametrize("make", [meta, llava, smolvlm])
def test_pictures_are_never_learnt(make: Any) -> None:
    processor = make()
    row = processor.encode_for_training([said("user", "and", ONE), said("assistant", "a cat", TWO, "two dogs.")])
    image = processor.config.image_token_id
    assert image in row.tokens
    assert not any(learns for token, learns in zip(row.tokens, row.learnt) if token == image)


@pytest.mark.parametrize("make", [meta, llava, smolvlm])
def test_an_answer_can_be_left_out(make: Any) -> None:
    turns = [
        said("user", "what"),
        said("assistant", "a cat", learn=False),
        said("user", "and"),
        said("assistant", "dogs."),
    ]
    pieces = learnt(make(), turns)
    assert len(pieces) == 1 and "dogs." in pieces[0]
    whole = make().encode_for_training([{**turn, "learn": True} for turn in turns])
    assert make().encode_for_training(turns).tokens == whole.tokens


@pytest.mark.parametrize("make", [meta, llava, smolvlm])
def test_names_of_special_tokens_in_an_answer_are_text(make: Any) -> None:
    name = "<|eot_id|>" if make is meta else "</s>"
    pieces = learnt(make(), [said("user", "what"), said("assistant", f"a {name} cat")])
    special = make().tokenizer.special(name)
    assert f"a {name} cat" in pieces[0].replace(" a", "a", 1)
    assert (
        make().encode_for_training([said("user", "what"), said("assistant", f"a {name} cat")]).tokens.count(special)
        == {meta: 2, llava: 1, smolvlm: 0}[make]
    )


def test_blocks_and_prefixes_agree() -> None:
    """The same template with and without blocks teaches the same."""
    bare = LLAVA.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    turns = [
        said("user", ONE, "what is this?"),
        said("assistant", "a cat"),
        said("user", "and"),
        said("assistant", "dogs."),
    ]
    assert llava().encode_for_training(turns).learnt == llava(bare).encode_for_training(turns).learnt


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    forgets = (
        "{% for message in messages %}{{ message['role'] + ': ' + (message['content'] if loop.last or"
        " message['role'] == 'user' else '') + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    one = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "a cat"}]
    assert learnt(text_only(forgets), one) == [" a cat</s>"]
    with pytest.raises(PromptError, match="message 2 differently"):
        text_only(forgets).encode_for_training([*one, *one])


def test_a_template_that_ends_its_turns_gets_no_other_end() -> None:
    lines = (
        "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '</s>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}"
    )
    one = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "a cat"}]
    row = text_only(lines).encode_for_training(one)
    assert row.tokens == tokenizer().encode_with_special("<s>user what</s>\n<s>assistant a cat</s>\n")
    assert learnt(text_only(lines), one) == [" a cat</s>"]


# --- what becomes of it ----------------------------------------------------------------------------------------------


def test_too_long() -> None:
    turns = [
        said("user", ONE, "what is this?"),
        said("assistant", "a cat"),
        said("user", "and", TWO),
        said("assistant", "a cat"),
    ]
    whole = encoded(meta(), *turns)
    assert encoded(meta(), *turns, longest=len(whole.tokens)).cut == 0
    with pytest.raises(BadRow, match=f"{len(whole.tokens)} tokens, and at most 20") as caught:
        encoded(meta(), *turns, longest=20)
    assert caught.value.kind == "too long"
    second = [i for i, token in enumerate(whole.tokens) if token == meta().config.image_token_id][1]
    for longest in (second, second + 1):
        short = encoded(meta(), *turns, longest=longest, truncate=True)
        assert short.tokens == whole.tokens[:longest] and short.cut == len(whole.tokens) - longest
        assert len(short.images) == (1 if longest == second else 2)
        assert len(short.tiles) == sum(image.num_tiles for image in short.images)
        assert short.labels == [*whole.labels[: longest - 1], -100]
        microbatch([short], meta().config)
    with pytest.raises(BadRow, match="no answer is left"):
        encoded(meta(), *turns, longest=6, truncate=True)


def test_a_picture_is_not_cut_in_half() -> None:
    turns = [said("user", "what"), said("assistant", "a cat"), said("user", ONE, "and"), said("assistant", "dogs.")]
    whole = encoded(llava(), *turns)
    first = whole.tokens.index(llava().config.image_token_id)
    for longest in range(first, first + 4):
        short = encoded(llava(), *turns, longest=longest, truncate=True)
        assert short.tokens == whole.tokens[:first] and len(short.tiles) == 0
    kept = encoded(llava(), *turns, longest=first + 4, truncate=True)
    assert kept.tokens == whole.tokens[: first + 4] and len(kept.images) == 1


def test_microbatches() -> None:
    examples = [
        encoded(meta(), said("user", "what"), said("assistant", "a cat")),
        encoded(meta(), said("user", TWO, "what is", ONE, "this?"), said("assistant", "two dogs.")),
        encoded(meta(), said("user", ONE), said("assistant", "a")),
    ]
    batch = microbatch(examples, meta().config)
    alone = meta()([[said("user", TWO, "what is", ONE, "this?")]])
    assert [(image.row, image.num_tiles) for image in batch.inputs.images] == [(1, 2), (1, 1), (2, 1)]
    assert torch.equal(batch.inputs.tiles[:3], alone.tiles) and batch.inputs.tiles.shape == (4, 3, TILE, TILE)
    for row, example in enumerate(examples):
        n = len(example.tokens)
        assert batch.inputs.tokens[row, :n].tolist() == example.tokens
        assert batch.labels[row, :n].tolist() == example.labels and (batch.labels[row, n:] == -100).all()
    last = alone.lengths[0] - 1
    assert batch.inputs.visible[1, last].tolist() == alone.visible[0, last].tolist()
    texts = microbatch(examples[:1], meta().config)
    assert texts.inputs.tiles.shape == (0, 3, TILE, TILE)


def test_pictures_of_different_sizes_do_not_share_a_batch() -> None:
    one = encoded(llava(), said("user", ONE), said("assistant", "a cat"))
    other = Example(one.tokens, one.labels, one.tiles[..., :14], one.images, "there", "messages")
    with pytest.raises(ImageError, match=r"different sizes \(14 × 28 and 28 × 28\)"):
        microbatch([one, other], llava().config)


def test_pixels_in_the_models_dtype(tmp_path: Any) -> None:
    """Rounding in a worker is rounding in the model."""
    picture().save(tmp_path / "p.png")
    path = write_lines(tmp_path / "a.jsonl", [{"image": "p.png", **asked()}])
    exact = steps_of(path)
    half = type(exact)(exact.data, exact.processor, 4, dtype=torch.bfloat16)
    assert torch.equal(half[0].examples[0].tiles, exact[0].examples[0].tiles.to(torch.bfloat16))
    assert answers(exact, 0) == ["a cat"] * 4


def test_lengths_beyond_the_context(tmp_path: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [asked()])
    with pytest.raises(ConfigError, match="max_length is 201, and the model's context is 200"):
        steps_of(path, max_length=201)
