"""`MllamaImageProcessor` with each kind of tokenizer: ids, padding on either side, pixels, a model that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_compat import IMAGE, bytes_tokenizer, model
from transformers import PreTrainedTokenizerFast

from llama_multimodal.compat import MLLAMAConfig, MllamaImageProcessor, ProcessorOutput
from llama_multimodal.errors import ConfigError, ImageError, PromptError
from llama_multimodal.processing.tokenizer import Tokenizer


def picture(seed: int, width: int = 20, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def hugging_face(side: str = "right", **names: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer(), padding_side=side, **names)


KINDS = {
    "tokenizers": bytes_tokenizer,
    "transformers": hugging_face,
    "transformers, with a pad token": lambda: hugging_face(pad_token="<pad>", bos_token="<s>"),
    "ours": lambda: Tokenizer.from_backend(bytes_tokenizer()),
}


@pytest.fixture(params=KINDS)
def processor(request: pytest.FixtureRequest) -> MllamaImageProcessor:
    return MllamaImageProcessor(KINDS[request.param](), num_image_token=2, image_size=16)


def text_ids(text: str) -> list[int]:
    return bytes_tokenizer().encode(text).ids


def test_ids_mask_and_pixels(processor: MllamaImageProcessor) -> None:
    assert processor.image_token_id == IMAGE
    out = processor(text=["a <image>b", "what is this?"], images=[picture(0), picture(1)], padding=True)
    rows = [text_ids("a ") + [IMAGE] * 2 + text_ids("b"), [IMAGE] * 2 + text_ids("what is this?")]
    for b, row in enumerate(rows):
        assert out["input_ids"][b, : len(row)].tolist() == row
        assert out["attention_mask"][b].tolist() == [1] * len(row) + [0] * (len(rows[1]) - len(row))
    assert out["pixel Value"] is out["pixel_values"] is out.pixel_values is out.get("pixel Value")
    assert "pixel Value" in out and set(out) == {"input_ids", "attention_mask", "pixel_values"}
    assert out.pixel_values.shape == (2, 3, 16, 16) and out.pixel_values.dtype == torch.float32
    expected = np.asarray(picture(0).resize((16, 16), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1)
    torch.testing.assert_close(out.pixel_values[0], torch.from_numpy(expected) / 127.5 - 1, atol=1e-6, rtol=1e-5)


def test_several_pictures_and_none(processor: MllamaImageProcessor) -> None:
    out = processor(["<image>and<image>", "no picture"], [[picture(0), picture(1)], []])
    assert (out.input_ids == IMAGE).sum(1).tolist() == [4, 0] and len(out.pixel_values) == 2
    alone = processor("two: ", [picture(0), picture(1)])
    assert alone.input_ids[0].tolist() == [IMAGE] * 4 + text_ids("two: ")
    assert torch.equal(alone.pixel_values, out.pixel_values)
    assert "pixel_values" not in processor("text") and processor("text").get("pixel Value") is None
    assert torch.equal(processor("<image>", picture(0)).pixel_values, out.pixel_values[:1])


def test_the_token_is_added_once_and_decodes() -> None:
    theirs = hugging_face()
    assert MllamaImageProcessor(theirs, 1, 16).tokenizer is theirs
    again = MllamaImageProcessor(theirs, 1, 16)
    assert again.image_token_id == IMAGE and len(theirs) == 261
    ids = again("hello", picture(0)).input_ids[0]
    assert theirs.decode(ids, skip_special_tokens=True) == "hello"
    backend = bytes_tokenizer()
    for _ in range(2):
        assert MllamaImageProcessor(backend, 1, 16).image_token_id == IMAGE == backend.token_to_id("<image>")
    ours = Tokenizer.from_backend(bytes_tokenizer())
    made = MllamaImageProcessor(ours, 1, 16)
    assert made.tokenizer.decode(made("hello", picture(0)).input_ids[0]) == "hello"
    assert "<image>" not in ours.special_tokens  # which stays as it was
    assert MllamaImageProcessor(made.tokenizer, 1, 16).tokenizer is made.tokenizer


def test_a_tokens_file_keeps_its_prefix() -> None:
    """What a tokenizer begins every text with, such as BOS, comes before the picture, whoever holds the tokenizer."""
    from tokenizers.processors import TemplateProcessing

    def backend() -> Any:
        made = bytes_tokenizer()
        made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
        return made

    kinds = (backend(), PreTrainedTokenizerFast(tokenizer_object=backend()), Tokenizer.from_backend(backend()))
    for tokenizer in kinds:
        ids = MllamaImageProcessor(tokenizer, 1, 16)("hi", picture(0)).input_ids[0].tolist()
        assert ids == [256, IMAGE, *text_ids("hi")]


@torch.no_grad()
def test_padding_sides_give_one_answer() -> None:
    made, texts, images = model(), ["a <image>b", "what is this?"], [picture(0), picture(1)]
    right = MllamaImageProcessor(hugging_face("right"), 2, 16)(texts, images, padding="longest")
    left = MllamaImageProcessor(hugging_face("left", pad_token="<pad>"), 2, 16)(texts, images)
    assert (
        left.attention_mask[0].tolist() == right.attention_mask[0].flip(0).tolist() != right.attention_mask[0].tolist()
    )
    assert left.input_ids[0, 0] == 258
    outs = [made(**inputs, labels=inputs["input_ids"]) for inputs in (left, right)]
    real = [out.logits[inputs["attention_mask"].bool()] for out, inputs in zip(outs, (left, right))]
    torch.testing.assert_close(*real, atol=1e-5, rtol=1e-5)
    assert outs[0].loss.item() == pytest.approx(outs[1].loss.item(), rel=1e-6)
    answers = [made.generate(**inputs, max_new_tokens=4)[:, -4:] for inputs in (left, right)]
    assert torch.equal(*answers)


def test_an_image_token_within_the_vocabulary() -> None:
    """A model whose vocabulary counts `<image>` too."""
    from small_compat import TEXT, VISION

    processor = MllamaImageProcessor(bytes_tokenizer(), 1, 16)
    settings = {"projection_dim": 20, "image_token_id": processor.image_token_id}
    wide = MLLAMAConfig(VISION, TEXT | {"vocab_size": 261}, **settings)
    assert wide.model.text.num_extra_embeddings == 0 and wide.model.image_token_id == IMAGE
    with pytest.raises(ConfigError, match="image_token_id is 260; it must be at most 200"):
        MLLAMAConfig(VISION, TEXT | {"vocab_size": 200}, **settings)


def test_other_sources_and_devices(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    processor = MllamaImageProcessor(bytes_tokenizer(), 1, 16)
    given = (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), np.asarray(picture(0)))
    expected = processor("", picture(0)).pixel_values
    for source in given:
        assert torch.equal(processor("", source).pixel_values, expected)
    moved = processor("a", picture(0)).to("meta")
    assert isinstance(moved, ProcessorOutput) and all(value.is_meta for value in moved.values())


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"text": []}, PromptError, "at least one"),
        ({"text": [3]}, PromptError, "list of strings"),
        ({"text": ["a", "bc"], "padding": False}, PromptError, "rows have 1 to 2 tokens, which needs padding=True"),
        ({"text": "a", "padding": "max_length"}, PromptError, 'padding must be True, "longest" or False'),
        ({"text": ["a", "b"], "images": [picture(0)]}, PromptError, "2 texts but pictures for 1"),
        ({"text": "<image><image>", "images": picture(0)}, PromptError, "2 times and 1 pictures"),
        ({"text": "<image>"}, PromptError, "1 times and 0 pictures"),
        ({"text": "a", "images": "nowhere.png"}, ImageError, "nowhere.png does not exist"),
    ],
)
def test_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    processor = MllamaImageProcessor(bytes_tokenizer(), 1, 16)
    with pytest.raises(error, match=message):
        processor(**given)


def test_refused_settings_and_keys() -> None:
    with pytest.raises(ConfigError, match="num_image_token must be a whole number of at least 1, not 0"):
        MllamaImageProcessor(bytes_tokenizer(), 0, 16)
    with pytest.raises(ConfigError, match="image_size must be"):
        MllamaImageProcessor(bytes_tokenizer(), 1, 16.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="str is no tokenizer"):
        MllamaImageProcessor("meta-llama", 1, 16)
    out = MllamaImageProcessor(bytes_tokenizer(), 1, 16)("a", picture(0))
    with pytest.raises(KeyError, match=r"pixel_value.*did you mean"):
        out["pixel_value"]
    with pytest.raises(AttributeError, match="did you mean"):
        out.pixel_value  # noqa: B018
