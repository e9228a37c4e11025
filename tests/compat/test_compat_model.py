"""`MllamaForConditionalGeneration` against the library's model that it wraps, and against plain torch."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_compat import IMAGE, TEXT, VISION, config, model, pixels
from torch import Tensor

import llama_multimodal as lmm
from llama_multimodal import ops
from llama_multimodal.compat import MLLAMAConfig, MllamaForConditionalGeneration, SiglipVisionConfig
from llama_multimodal.config import SiglipConfig, TextConfig
from llama_multimodal.errors import CheckpointError, ConfigError, ImageError, PromptError
from llama_multimodal.inputs import ImageLayout, batch_inputs
from llama_multimodal.processing.processor import Processor


def plain(made: MllamaForConditionalGeneration, row: list[int], images: Tensor | None = None) -> Tensor:
    """The logits of one row by the library's own model; one token a picture."""
    images = torch.empty(0, 3, 16, 16) if images is None else images
    layouts = [ImageLayout(1, 1) for _ in images]
    inputs = batch_inputs([row], images, layouts, image_token_id=IMAGE, pad_token_id=0)
    return made.model(inputs).logits[0]


# --- configuration ---------------------------------------------------------------------------------------------------


def test_the_original_tables_give_the_11b_decoder_and_siglip() -> None:
    vision = {**VISION, "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
    vision |= {"num_attention_heads": 16, "image_size": 384, "patch_size": 14}
    text = {
        "vocab_size": 128256, "hidden_size": 4096, "n_heads": 32, "n_kv_heads": 8, "n_layers": 32, "hidden_dim": 14336,
        "max_position_embeddings": 131072, "rope_theta": 500000, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    made = MLLAMAConfig(vision_config=vision, text_config=text, projection_dim=4096, image2text_projection_bias=True)
    assert made.model.vision == SiglipConfig(1152, 27, 16, 3, 384, 14, intermediate_size=4304, pooling_head=False)
    assert made.model.text == replace(TextConfig(), rope_scaling=None, num_extra_embeddings=1)
    assert made.model.image_token_id == 128256
    assert made.model.projector.bias and made.model.projector.hidden_size == 4096
    assert (made.text_config.num_hidden_layers, made.projection_dim) == (32, 4096)
    assert MLLAMAConfig({}, {}, 64).vision_config == SiglipVisionConfig() == SiglipConfig(pooling_head=False)
    few = MLLAMAConfig(SiglipVisionConfig(**VISION), {"n_layers": 16, "hidden_dim": 8192}, 64, False)
    assert few.model.text.cross_attention_layers == (3, 8, 13, 18) and few.model.text.num_hidden_layers == 20
    assert not few.model.projector.bias


@pytest.mark.parametrize(
    "vision, text, more, message",
    [
        (VISION | {"hiden_size": 3}, TEXT, {}, 'unknown key "hiden_size"; did you mean "hidden_size"'),
        (VISION, TEXT | {"n_head": 3}, {}, 'unknown key "n_head"; did you mean "n_heads"'),
        (VISION, TEXT | {"num_attention_heads": 4}, {}, '"num_attention_heads" is called "n_heads" here'),
        (VISION, TEXT | {"n_kv_heads": 3}, {}, "query heads must divide"),
        (VISION, TEXT | {"n_layers": "four"}, {}, "num_hidden_layers must be a number"),
        (VISION, TEXT | {"eos_token_id": 260}, {}, "must be under vocab_size"),
        (VISION, TEXT, {"image_token_id": 261}, "image_token_id is 261; it must be at most 260"),
        (VISION, TEXT, {"projection_dim": 2.5}, "projection_dim must be a whole number"),
        (VISION, TEXT, {"projection_dim": 0}, "hidden_size must be at least 1"),
        (VISION, 7, {}, "text_config must be a table"),
        (7, TEXT, {}, "vision_config must be a table"),
        (VISION, TextConfig(), {}, "are added by MLLAMAConfig"),
    ],
)
def test_refused_configurations(vision: Any, text: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MLLAMAConfig(vision, text, **({"projection_dim": 20} | more))


def test_only_the_flag_can_be_set() -> None:
    made = config()
    made.use_cuda_kernels = False
    assert made.use_cuda_kernels is False and "use_cuda_kernels=False" in repr(made)
    with pytest.raises(ConfigError, match=r'"use_cuda_kernel" cannot be set.*did you mean "use_cuda_kernels"'):
        made.use_cuda_kernel = False
    with pytest.raises(ConfigError, match="make another MLLAMAConfig"):
        made.projection_dim = 3


# --- a call ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_the_wrapped_models() -> None:
    made, images = model(), pixels(3)
    rows = [[5, IMAGE, 7, 8, IMAGE, 9], [IMAGE, 11, 12, 13, 14, 15]]
    out = made(input_ids=torch.tensor(rows), pixel_values=images)
    for b, some in enumerate((images[:2], images[2:])):
        torch.testing.assert_close(out.logits[b], plain(made, rows[b], some), atol=1e-5, rtol=1e-5)
    assert out.logits is out["logits"] and out["loss"] is None and dict(out).keys() == {"logits", "loss"}
    without = made(torch.tensor(rows), pixels(3, seed=1)).logits
    assert torch.equal(without[0, 0], out.logits[0, 0])  # before its picture, a token does not see it
    assert ((without - out.logits)[0, 1:].abs().amax(-1) > 1e-3).all()
    with pytest.raises(KeyError, match="did you mean"):
        out["logit"]


@torch.no_grad()
def test_several_tokens_a_picture_see_it_whole() -> None:
    """From the first of its tokens on; pictures side by side are seen together, as single tokens are."""
    made, images = model(), pixels(3)
    rows = torch.tensor([[4, IMAGE, IMAGE, 7, IMAGE, IMAGE, IMAGE, IMAGE, 9]])
    seen: list[Tensor] = []
    handle = made.model.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    made(rows, images)
    handle.remove()
    wanted = [(0, 0), (0, 1), (0, 1), (0, 1), (1, 2), (1, 2), (1, 3), (1, 3), (1, 3)]
    assert seen[0][0].tolist() == [list(pair) for pair in wanted]


@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padding_changes_nothing(side: str) -> None:
    made, images = model(), pixels(2)
    rows = [[5, IMAGE, 7, 8, 10], [IMAGE, 11]]
    before = {"left": (1, 4), "right": (0, 0), "both": (0, 2)}[side]
    width = 6
    ids, mask = torch.full((2, width), 3), torch.zeros(2, width, dtype=torch.int64)
    labels = torch.full((2, width), 77)
    for b, (row, first) in enumerate(zip(rows, before)):
        ids[b, first : first + len(row)] = torch.tensor(row)
        mask[b, first : first + len(row)] = 1
        labels[b, first : first + len(row)] = torch.tensor(row)
    out = made(ids, images, mask, labels)
    assert out.logits.shape == (2, width, 260)
    losses, count = 0.0, 0
    for b, (row, first) in enumerate(zip(rows, before)):
        alone = plain(made, row, images[b : b + 1])
        torch.testing.assert_close(out.logits[b, first : first + len(row)], alone, atol=1e-5, rtol=1e-5)
        wanted = torch.tensor([-100 if token == IMAGE else token for token in row[1:]])
        losses += float(F.cross_entropy(alone[:-1], wanted, reduction="sum"))
        count += int((wanted != -100).sum())
    assert not out.logits[~mask.bool()].any()
    assert float(out.loss) == pytest.approx(losses / count, rel=1e-5)

    whole = made.generate(ids, images, max_new_tokens=5, attention_mask=mask)
    assert torch.equal(whole[:, :width], ids)
    for b, row in enumerate(rows):
        alone_ids = made.generate(torch.tensor([row]), images[b : b + 1], max_new_tokens=5)
        assert torch.equal(whole[b, width:], alone_ids[0, len(row) :])


def test_loss_is_of_the_next_token_and_trains() -> None:
    made = model().train()
    ids = torch.tensor([[IMAGE, 7, 8, 9, 10]])
    labels = torch.tensor([[IMAGE, 7, -100, 9, 10]])
    out = made(ids, pixels(1), labels=labels)
    expected = F.cross_entropy(out.logits[0, [0, 2, 3]], torch.tensor([7, 9, 10]))
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert made(ids, pixels(1), labels=torch.full_like(ids, -100)).loss.item() == 0
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(8):
        loss = made(ids, pixels(1), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert made.model.vision.patch_embedding.weight.grad.abs().max() > 0
    assert loss.item() < 0.5 * out.loss.item()


def test_gradient_checkpointing_computes_again_and_changes_nothing() -> None:
    made, again = model().train(), model().train()
    again.gradient_checkpointing_enable()
    ids, calls = torch.tensor([[IMAGE, 7, 8, 9, 10]]), []
    vision, text = again.model.vision.layers[0].mlp, again.model.decoder.layers
    for part in (vision, text[0].mlp, text[3].mlp):  # text[3] is gated
        part.register_forward_pre_hook(lambda part, *_: calls.append(part))
    for one in (made, again):
        one(ids, pixels(1), labels=ids).loss.backward()
    assert [calls.count(part) for part in (vision, text[0].mlp, text[3].mlp)] == [2, 2, 2]
    for (name, plain), other in zip(made.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(plain.grad, other.grad), name
    tokens = again.eval().generate(ids, pixels(1), max_new_tokens=3)
    assert torch.equal(tokens, made.eval().generate(ids, pixels(1), max_new_tokens=3))
    assert len(calls) > 6 and again.state_dict().keys() == made.state_dict().keys()


@torch.no_grad()
def test_text_alone() -> None:
    made, row = model(), [5, 6, 7]
    torch.testing.assert_close(made(torch.tensor([row])).logits[0], plain(made, row))


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"input_ids": torch.tensor([5, 6])}, PromptError, r"input_ids must be whole numbers \[batch, seq\]"),
        ({"input_ids": torch.tensor([[0.5]])}, PromptError, "whole numbers"),
        ({"input_ids": torch.tensor([[5, 261]])}, PromptError, "token id 261 is not the model's.*an image is 260"),
        ({"input_ids": torch.tensor([[5, IMAGE]])}, PromptError, "1 image placeholders.*but 0 images"),
        ({"input_ids": torch.tensor([[5, 6]]), "pixel_values": pixels(1)}, PromptError, r"id 260\) do not go together"),
        (
            {"input_ids": torch.tensor([[IMAGE, IMAGE, 6, IMAGE]]), "pixel_values": pixels(2)},
            PromptError,
            "do not go together",
        ),
        (
            {"input_ids": torch.tensor([[IMAGE, 6, IMAGE]]), "pixel_values": pixels(1)},
            PromptError,
            None,
        ),
        (
            {"input_ids": torch.tensor([[IMAGE, 6]]), "pixel_values": pixels(1)[0]},
            ImageError,
            r"pixel_values must be \[pictures, 3",
        ),
        (
            {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(2, 2)},
            PromptError,
            "attention_mask must be",
        ),
        (
            {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 0, 1]])},
            PromptError,
            "row 0 has no token, or padding between",
        ),
        (
            {"input_ids": torch.tensor([[5, 6], [5, 6]]), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
            PromptError,
            "row 1 has no token",
        ),
        ({"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5]])}, PromptError, r"labels must be \[1, 2\]"),
        ({"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 300]])}, PromptError, "ids under 260"),
    ],
)
def test_refused_calls(given: dict[str, Tensor], error: type[Exception], message: str | None) -> None:
    made = model()
    if message is None:  # one picture of two tokens that lie apart: the second would be another picture's
        message = "must lie side by side"
    with pytest.raises(error, match=message):
        made(**given)


# --- generation ------------------------------------------------------------------------------------------------------


def test_generate_is_the_librarys() -> None:
    made, images = model(), pixels(1)
    ids = torch.tensor([[IMAGE, 7, 8]])
    inputs = batch_inputs([ids[0].tolist()], images, [ImageLayout(1, 1)], image_token_id=IMAGE, pad_token_id=0)
    greedy = lmm.generate(made.model, inputs, lmm.SamplingParams(6)).token_ids[0]
    calls: list[dict[str, Any]] = [{}, {"do_sample": False, "temperature": 0.7}, {"temperature": 0}]
    for settings in calls:
        assert made.generate(ids, images, max_new_tokens=6, **settings)[0, 3:].tolist() == greedy
    torch.manual_seed(3)
    drawn = made.generate(ids, images, 6, 1.5, True, 0.9)[0, 3:].tolist()
    torch.manual_seed(3)
    params = lmm.SamplingParams(6, temperature=1.5, top_p=0.9)
    assert lmm.generate(made.model, inputs, params).token_ids[0] == drawn != greedy
    torch.manual_seed(3)
    assert made.generate(ids, images, 6, temperature=1.5, top_p=0.9)[0, 3:].tolist() == drawn


def test_an_ended_row_is_padded() -> None:
    free = model()
    ids = torch.tensor([[7, 8], [9, 10]])
    tokens = free.generate(ids, max_new_tokens=6)
    first = [row[2:].tolist() for row in tokens]
    assert len(tokens[0]) == 8
    end = next(token for i, token in enumerate(first[0][:5]) if token not in first[0][:i] and token not in first[1])
    ended = model(eos_token_id=end, pad_token_id=2).generate(ids, max_new_tokens=6)
    at = first[0].index(end) + 1
    assert ended[0, 2:].tolist() == first[0][:at] + [2] * (6 - at) and ended[1, 2:].tolist() == first[1]


def test_refused_generation() -> None:
    made, ids = model(), torch.tensor([[7, 8]])
    with pytest.raises(PromptError, match="temperature of 0 does not sample"):
        made.generate(ids, do_sample=True, temperature=0.0)
    with pytest.raises(PromptError, match="top_p must be above 0"):
        made.generate(ids, top_p=0.0)
    with pytest.raises(PromptError, match="leave room"):
        made.generate(torch.ones(1, 64, dtype=torch.int64))


# --- what a module has -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_half_and_weights_again() -> None:
    made, ids = model(), torch.tensor([[IMAGE, 7, 8]])
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    again = MllamaForConditionalGeneration(config()).eval()
    again.load_state_dict(torch.load(file), strict=False)
    expected = made(ids, pixels(1)).logits
    assert torch.equal(again(ids, pixels(1)).logits, expected)
    narrow = again.half()(ids, pixels(1).half())
    assert narrow.logits.dtype == torch.float16
    torch.testing.assert_close(narrow.logits.float(), expected, atol=0.05, rtol=0.05)


def test_part_of_the_weights_and_none_of_them() -> None:
    made, whole = model(), model(seed=1).state_dict()
    part = {name: value for name, value in whole.items() if ".vision." in name}
    missing = made.load_state_dict({**part, "other": torch.ones(1)}, strict=False)
    assert "model.decoder.norm.weight" in missing.missing_keys and missing.unexpected_keys == ["other"]
    assert torch.equal(made.model.vision.position_embedding, whole["model.vision.position_embedding"])
    with pytest.raises(CheckpointError, match="none of these weights"):
        made.load_state_dict({"language_model.lm_head.weight": torch.ones(1)}, strict=False)
    with pytest.raises(CheckpointError, match="Missing key"):
        made.load_state_dict(part)
    with pytest.raises(CheckpointError, match="size mismatch"):
        made.load_state_dict({**whole, "model.decoder.norm.weight": torch.ones(3)}, strict=False)


def test_the_model_within_saves_and_loads(tmp_path: Any) -> None:
    made, ids = model(), torch.tensor([[IMAGE, 7, 8]])
    lmm.save(made.model, Processor(made.config.model), tmp_path)
    again, _ = lmm.load(tmp_path, dtype=torch.float32)
    inputs = batch_inputs([ids[0].tolist()], pixels(1), [ImageLayout(1, 1)], image_token_id=IMAGE, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(again(inputs).logits, made(ids, pixels(1)).logits)


def test_the_flag_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU plain torch is forced; on a CPU there is nothing to leave out, and its own kernels stay."""
    made, forced = model(), []
    made.model.register_forward_pre_hook(lambda *_: forced.append(ops._dispatch.requested_backend()))
    monkeypatch.delenv("LLAMA_MM_BACKEND", raising=False)
    ids = torch.tensor([[5, 6]])
    made(ids)
    made.config.use_cuda_kernels = False
    made(ids)
    monkeypatch.setattr("llama_multimodal.compat.model._on_gpu", lambda model: True)
    made(ids)
    made.generate(ids, max_new_tokens=1)
    made.config.use_cuda_kernels = True
    made(ids)
    assert forced == [None, None, "torch", "torch", None]
    assert ops._dispatch.requested_backend() is None
