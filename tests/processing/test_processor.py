from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers_for_tests import TEXT

from llama_multimodal.config import ModelConfig, TextConfig, TiledVisionConfig
from llama_multimodal.errors import ImageError, PromptError
from llama_multimodal.processing import Processor, Tokenizer
from llama_multimodal.processing.tiles import image_tiles
from llama_multimodal.zoo.tokenizer import build_tokenizer

TILE = 28
TOKENIZER = Tokenizer.from_backend(build_tokenizer([TEXT], 200))
SIZE = TOKENIZER.vocab_size
CONFIG = ModelConfig(
    vision=TiledVisionConfig(image_size=TILE),
    text=TextConfig(
        vocab_size=SIZE, max_position_embeddings=64, pad_token_id=TOKENIZER.special("<|finetune_right_pad_id|>")
    ),
    image_token_id=SIZE,
)
PROCESSOR = Processor(CONFIG, TOKENIZER)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


ONE, WIDE, TALL = picture(20, 25, 1), picture(55, 20, 2), picture(20, 105, 3)


def user(*parts: object) -> list[dict]:
    """A message of texts and pictures; a path is a picture."""
    kinds = ["text" if isinstance(part, str) else "image" for part in parts]
    return [{"role": "user", "content": [{"type": kind, kind: part} for kind, part in zip(kinds, parts)]}]


def test_one_conversation(tmp_path: Path) -> None:
    WIDE.save(tmp_path / "wide.png")
    for source in (WIDE, tmp_path / "wide.png", (tmp_path / "wide.png").read_bytes(), np.asarray(WIDE)):
        inputs = PROCESSOR(user(source, "How many red circles are there?"))
        expected, grid = image_tiles(WIDE, TILE, 4)
        assert grid == (1, 2) == (inputs.images[0].rows, inputs.images[0].columns)
        assert torch.equal(inputs.tiles, torch.from_numpy(expected))
        assert inputs.tokens.dtype == torch.int64 and inputs.tokens[0, 0] == TOKENIZER.special("<|begin_of_text|>")
        assert inputs.tokens[0].tolist().count(SIZE) == 1
        assert inputs.lengths == (inputs.tokens.shape[1],)
    assert PROCESSOR.decode(inputs.tokens[0].tolist()) == "user\n\nHow many red circles are there?assistant\n\n"


def test_batch_of_conversations() -> None:
    dialogs = [user("How many?"), user(ONE, "red", TALL, "blue"), user(WIDE)]
    inputs = PROCESSOR(dialogs)
    assert [(image.row, image.rows, image.columns) for image in inputs.images] == [(1, 1, 1), (1, 4, 1), (2, 1, 2)]
    assert inputs.images_per_row() == [0, 2, 1]
    expected = np.concatenate([image_tiles(image, TILE, 4)[0] for image in (ONE, TALL, WIDE)])
    assert inputs.tiles.dtype == torch.float32 and torch.equal(inputs.tiles, torch.from_numpy(expected))
    for b, dialog in enumerate(dialogs):  # a row is what it is alone, and padding
        alone, n = PROCESSOR(dialog), inputs.lengths[b]
        assert torch.equal(inputs.tokens[b, :n], alone.tokens[0])
        assert (inputs.tokens[b, n:] == CONFIG.text.pad_token_id).all()
        assert torch.equal(inputs.visible[b, :n], alone.visible[0])


def test_tokens_without_a_tokenizer() -> None:
    processor = Processor(CONFIG)
    inputs = processor.encode_tokens([[1, SIZE, 2], np.array([3, 4])], images=[[WIDE], []])
    assert inputs.tokens.tolist() == [[1, SIZE, 2], [3, 4, CONFIG.text.pad_token_id]]
    assert inputs.visible.tolist() == [[[0, 0], [0, 1], [0, 1]], [[0, 0], [0, 0], [0, 0]]]
    text = processor.encode_tokens([[1, 2]])
    assert text.tiles.shape == (0, 3, TILE, TILE) and text.images == ()
    for call in (lambda: processor(user("hi")), lambda: processor.decode([1]), processor.stream_decoder):
        with pytest.raises(PromptError, match=r"tokenizer\.json.*tokenizer\.model.*encode_tokens"):
            call()


@pytest.mark.parametrize(
    ("rows", "images", "message"),
    [
        ([], None, "no rows"),
        ([[]], None, "row 0 has no tokens"),
        ([[1], [SIZE]], None, "row 1 has 1 image placeholders"),
        ([[1, SIZE]], [[ONE, ONE]], "but 2 images"),
        ([[1]], [[ONE]], "row 0 has 0 image placeholders"),
        ([[1, SIZE], [1]], [[ONE]], "2 rows of tokens but 1 lists of images"),
        ([[1, SIZE]], [ONE], "images of row 0 must be a list"),
        ([[1, SIZE]], ["a.png"], "images of row 0 must be a list"),
        ([[1, SIZE + 1]], None, f"token id {SIZE + 1} is outside the vocabulary"),
        ([[1, -1]], None, "token id -1 is outside"),
        ([[1, 10**30]], None, "outside"),
        ([[1, 2.5]], None, "whole numbers"),
        ([["a"]], None, "whole numbers"),
        ([[1] * 65], None, "65 tokens, and the model's context is 64"),
    ],
)
def test_bad_tokens(rows: list, images: list | None, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        PROCESSOR.encode_tokens(rows, images)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_conversations() -> None:
    for conversation in ([], "text", {"role": "user", "content": "x"}, [[]], [user("a"), "b"], 5):
        with pytest.raises(PromptError):
            PROCESSOR(conversation)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="context is 64"):
        PROCESSOR(user("red " * 100))
    with pytest.raises(ImageError, match="does not exist"):
        PROCESSOR(user(Path("none.png")))
    assert PROCESSOR.encode_tokens([[1] * 64]).lengths == (64,)


def test_stream_decoder() -> None:
    decoder = PROCESSOR.stream_decoder()
    ids = TOKENIZER.encode("naïve 🦙 red")
    assert "".join(map(decoder.push, ids)) + decoder.flush() == "naïve 🦙 red"
