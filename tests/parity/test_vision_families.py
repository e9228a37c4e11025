"""LLaVA, LLaVA-NeXT, Idefics3 and SmolVLM against transformers on checkpoints that it wrote: ids, pixels, logits and
greedy tokens. What else holds for these models: batches, rows of tokens, half precision."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from families_for_tests import (
    KINDS,
    SQUARES,
    Kind,
    Pair,
    conversations,
    images_of,
    pair,
    picture,
    said,
    tiles_of,
)
from PIL import Image

import llama_multimodal as lmm
from llama_multimodal.errors import PromptError
from llama_multimodal.processing.processor import Processor

GREEDY = lmm.SamplingParams(max_new_tokens=8, temperature=0.0)
FEW = ["LLaVA", "LLaVA-NeXT", "Idefics3", "SmolVLM"]


pytestmark = pytest.mark.usefixtures("one_thread")


# --- the same as transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_conversations(name: str, pairs: Callable[[str], Pair]) -> None:
    both = pairs(name)
    for about, conversation in conversations().items():
        theirs, ours = both.their_inputs(conversation), both.our_processor(conversation)
        assert ours.tokens.tolist() == theirs["input_ids"].tolist(), about
        if len(ours.images):
            assert torch.equal(ours.tiles, tiles_of(theirs, ours)), about
        with torch.inference_mode():
            expected = both.theirs(**theirs).logits
            assert (both.ours(ours).logits - expected).abs().max() < 1e-4, about


@pytest.mark.parametrize("name", KINDS)
def test_greedy_tokens(name: str, pairs: Callable[[str], Pair]) -> None:
    both = pairs(name)
    for about in ("several", "later", "none"):
        conversation = conversations()[about]
        theirs = both.their_inputs(conversation)
        whole = both.theirs.generate(**theirs, max_new_tokens=8, do_sample=False)[0].tolist()
        answer = lmm.generate(both.ours, both.our_processor(conversation), GREEDY).token_ids[0]
        assert answer == whole[theirs["input_ids"].shape[1] :], about


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("mode", ["RGBA", "LA", "L"])
def test_transparent_and_grey_pictures(mode: str, name: str, pairs: Callable[[str], Pair]) -> None:
    both, conversation = pairs(name), [said("user", picture(45, 31, mode), "what is this?")]
    ours = both.our_processor(conversation)
    assert torch.equal(ours.tiles, tiles_of(both.their_inputs(conversation), ours))


@pytest.mark.parametrize("split", [False, True])
def test_a_picture_of_one_token(split: bool, tmp_path: Path) -> None:
    """It wants what goes around it all the same."""
    both = pair(Kind("Idefics3", SQUARES, {}, {"scale_factor": 4}, split, True), tmp_path)
    conversation = conversations()["several"]
    inputs, ours = both.their_inputs(conversation), both.our_processor(conversation)
    assert ours.tokens.tolist() == inputs["input_ids"].tolist()
    with torch.inference_mode():
        assert (both.ours(ours).logits - both.theirs(**inputs).logits).abs().max() < 1e-4
    for row in (prompt(both, conversation), ours.tokens[0].tolist()):
        assert torch.equal(both.our_processor.encode_tokens([row], [images_of(conversation)]).tokens, ours.tokens)


# --- where transformers is not followed ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_an_image_token_in_a_text_is_text(name: str, pairs: Callable[[str], Pair]) -> None:
    """In transformers a text of the user's that spells the token asks for one more picture, and fails."""
    both = pairs(name)
    image = both.ours.config.image_token_id
    plain, spelt = (
        both.our_processor([said("user", picture(50, 37), text)]).tokens[0].tolist()
        for text in ("what is ?", "what is <image><row_1_col_1>?")
    )
    assert spelt.count(image) == plain.count(image) > 0
    assert both.our_processor.decode(spelt).count("<image><row_1_col_1>?") == 1
    with pytest.raises(Exception):  # noqa: B017  one of several
        both.their_inputs([said("user", picture(50, 37), "what is <image>?")])


def _exact_rows(coordinates: torch.Tensor, boundaries: torch.Tensor, right: bool) -> torch.Tensor:
    """`torch.bucketize` of i/n between the k/n: i, for every patch i of n, as many as the table has."""
    return torch.arange(coordinates.shape[-1]).expand(coordinates.shape)


@pytest.mark.parametrize(("side", "right"), [(26, True), (27, True), (32, True), (25, False), (19, False), (40, False)])
def test_positions_are_exact(side: int, right: bool, tmp_path: Path) -> None:
    """Idefics3 finds a patch's row by comparing fractions in fp32, and for some sides takes the row before."""
    vision = {**SQUARES, "image_size": 4 * side, "patch_size": 4, "num_hidden_layers": 1, "hidden_size": 12}
    kind = Kind("Idefics3", vision, {"num_hidden_layers": 1}, {"scale_factor": side}, False, True)
    both = pair(kind, tmp_path)
    conversation = conversations()["one"]
    inputs, ours = both.their_inputs(conversation), both.our_processor(conversation)
    with torch.inference_mode():
        logits, plain = both.ours(ours).logits, both.theirs(**inputs).logits
        with mock.patch("torch.bucketize", _exact_rows):
            patched = both.theirs(**inputs).logits
    assert (logits - patched).abs().max() < 1e-4
    assert ((plain - patched).abs().max() < 1e-4) == right


def test_a_black_square_is_a_square(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """With no mean to subtract it is all zero, and transformers drops it as padding."""
    both = pairs("Idefics3")
    settings = both.our_processor.preprocess
    assert settings is not None
    processor = Processor(
        both.ours.config,
        both.our_processor.tokenizer,
        both.our_processor.template,
        dataclasses.replace(settings, mean=None, std=None),
    )
    conversation = [said("user", Image.new("RGB", (50, 37)), "what is this?")]
    inputs = processor(conversation)
    assert not inputs.tiles.any() and both.ours(inputs).logits.isfinite().all()
    theirs = both.their_inputs(conversation)
    assert theirs["input_ids"].tolist() == inputs.tokens.tolist()
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        both.theirs(**{**theirs, "pixel_values": inputs.tiles[None]})


def test_what_enters_the_first_block(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """vision_feature_layer 0 fails there; counted from the end, the same state is read."""
    both, conversation = pairs("LLaVA, no block at all"), conversations()["one"]
    folder = shutil.copytree(both.folder, tmp_path / "zero")
    raw = json.loads((folder / "config.json").read_text())
    assert raw["vision_feature_layer"] == -1 - raw["vision_config"]["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps({**raw, "vision_feature_layer": 0}))
    ours, processor = lmm.load(folder, dtype=torch.float32)
    inputs = processor(conversation)
    assert torch.equal(ours(inputs).logits, both.ours(inputs).logits)
    with pytest.raises(TypeError, match="'NoneType' object is not subscriptable"):
        both.theirs(**both.their_inputs(conversation), vision_feature_layer=0)


# --- rows and batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_batches_equal_their_rows(name: str, pairs: Callable[[str], Pair]) -> None:
    """Rows of none to three pictures, in fp64."""
    both = pairs(name)
    model, rows = copy.deepcopy(both.ours).double(), list(conversations().values())
    batch = both.our_processor(rows)
    assert batch.images_per_row() == [len(images_of(row)) for row in rows]
    logits = model(batch).logits
    answers = lmm.generate(model, batch, GREEDY).token_ids
    for b, row in enumerate(rows):
        alone = both.our_processor(row)
        assert (logits[b, : alone.lengths[0]] - model(alone).logits[0]).abs().max() < 1e-10
        assert answers[b] == lmm.generate(model, alone, GREEDY).token_ids[0]


def prompt(both: Pair, conversation: list[dict[str, Any]]) -> list[int]:
    """Its ids with one image token a picture."""
    text = both.their_processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    return both.their_processor.tokenizer(text, add_special_tokens=not text.startswith("<s>"))["input_ids"]


@pytest.mark.parametrize("name", KINDS)
def test_one_image_token_a_picture_or_all_of_them(name: str, pairs: Callable[[str], Pair]) -> None:
    both, rows = pairs(name), [conversations()["several"], conversations()["none"], conversations()["thin"]]
    images, short = [images_of(row) for row in rows], [prompt(both, row) for row in rows]
    image = both.ours.config.image_token_id
    assert [row.count(image) for row in short] == [3, 0, 2]
    spelt_out = both.our_processor(rows)
    long = [row[:length] for row, length in zip(spelt_out.tokens.tolist(), spelt_out.lengths)]
    for given in (short, long, [short[0], *long[1:]]):
        inputs = both.our_processor.encode_tokens(given, images)
        assert torch.equal(inputs.tokens, spelt_out.tokens) and inputs.images == spelt_out.images
        assert torch.equal(inputs.tiles, spelt_out.tiles)


@pytest.mark.parametrize("name", FEW)
def test_numbers_of_image_tokens_that_are_wrong(name: str, pairs: Callable[[str], Pair]) -> None:
    both, pictures = pairs(name), images_of(conversations()["several"])
    encode, image = both.our_processor.encode_tokens, both.ours.config.image_token_id
    short = prompt(both, conversations()["several"])
    long = encode([short], [pictures]).tokens[0].tolist()
    whole = long.count(image)
    for row, given, count, tokens in [
        (short, pictures[:2], 3, None),
        (long[: len(long) - long[::-1].index(image) - 1], pictures, whole - 1, whole),
        ([*long, image], pictures, whole + 1, whole),
        ([5, 6], pictures, 0, whole),
        ([5, image], [], 1, None),
    ]:
        with pytest.raises(PromptError) as caught:
            encode([[5], row], [[], given])
        message = str(caught.value)
        assert f"row 1 has {count} image placeholders" in message and f"but {len(given)} images" in message
        if tokens is not None:
            assert f"of {tokens} tokens" in message


@pytest.mark.parametrize("name", FEW)
def test_a_row_that_is_too_long_once_it_is_spelt_out(name: str, pairs: Callable[[str], Pair]) -> None:
    both = pairs(name)
    image, context = both.ours.config.image_token_id, both.ours.config.text.max_position_embeddings
    spelt_out = both.our_processor.encode_tokens([[image]], [[picture(50, 37)]]).tokens.shape[1]
    row = [5] * (context - spelt_out) + [image]
    assert both.our_processor.encode_tokens([row], [[picture(50, 37)]]).tokens.shape[1] == context
    with pytest.raises(PromptError, match=f"row 0 has {context + 1} tokens, and the model's context is {context}"):
        both.our_processor.encode_tokens([[5, *row]], [[picture(50, 37)]])


# --- number formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float16, 0.0025)])
def test_half_precision(dtype: torch.dtype, bound: float, name: str, pairs: Callable[[str], Pair]) -> None:
    """Root mean square difference from fp32 with the same rounded weights, as a part of the logits' own."""
    both = pairs(name)
    half, processor = lmm.load(both.folder, dtype=dtype)
    inputs = processor(list(conversations().values()))
    logits, expected = half(inputs).logits.float(), copy.deepcopy(half).float()(inputs).logits
    kept = torch.arange(logits.shape[1]) < torch.tensor(inputs.lengths)[:, None]
    logits, expected = logits[kept], expected[kept]
    assert logits.isfinite().all()
    assert (logits - expected).square().mean().sqrt() < bound * expected.square().mean().sqrt()
    assert len(lmm.generate(half, inputs, GREEDY).token_ids) == len(inputs.lengths)
