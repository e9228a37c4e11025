"""Which adapter is in force: by block, by row, beside packed weights and in their fast path."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from adapters_for_tests import INPUTS, add, differ, logits
from small_model import make_inputs, one_row, random_model
from torch import Tensor

from llama_multimodal import SamplingParams, generate, ops, use_adapter
from llama_multimodal.adapters.lora import adapter_names, adapter_pairs
from llama_multimodal.errors import ConfigError
from llama_multimodal.models import LanguageModel, VisionLanguageModel
from llama_multimodal.models.layers import Linear
from llama_multimodal.ops import Format
from llama_multimodal.quant.pack import Packing, pack

TEXT_SIDE = ("self", "mlp", "decoder.layers.[13].attention.[qo]_proj")
"""Targets that read no images themselves."""


def several(dtype: torch.dtype = torch.float64) -> VisionLanguageModel:
    """Adapters of several ranks and places, one with DoRA."""
    model = random_model(dtype=dtype)
    add(model, "a", 1, targets=TEXT_SIDE)
    add(model, "b", 2, targets=("self", "lm_head"), rank=2, alpha=3, dora=True)
    add(model, "c", 3, targets=("mlp", "down_proj"), rank=7, rslora=True)
    return model


def under(model: LanguageModel, choice: Any) -> Tensor:
    with use_adapter(model, choice):
        return logits(model)


# --- by block --------------------------------------------------------------------------------------------------------


def test_one_at_a_time() -> None:
    model = several()
    plain = logits(random_model(dtype=torch.float64))
    found = [under(model, name) for name in (None, "a", "b", "c")]
    assert torch.equal(found[0], plain) and torch.equal(logits(model), found[1])
    for i in range(4):
        for j in range(i):
            assert differ(found[i], found[j]) > 1e-3


def test_blocks_nest_and_end() -> None:
    model = several()
    first = logits(model)
    with use_adapter(model, "b"):
        second = logits(model)
        with pytest.raises(KeyError), use_adapter(model, None):
            raise KeyError
        assert torch.equal(logits(model), second)
    assert torch.equal(logits(model), first) and not torch.equal(first, second)


def test_what_is_refused() -> None:
    model = several()
    with pytest.raises(ConfigError, match='there is no adapter "d"; the model has a, b, c'), use_adapter(model, "d"):
        pass
    with pytest.raises(ConfigError, match='no adapter "aa"'), use_adapter(model, ["a", "aa", None]):
        pass
    with pytest.raises(ConfigError, match="this model has no adapter"), use_adapter(random_model(), None):
        pass
    for wrong in (torch.tensor([0, 3, 1]), torch.tensor([-2, 0, 1]), torch.tensor([0.0, 1.0]), torch.tensor(0)):
        with pytest.raises(ConfigError, match=r"int64 \[B\] or \[B, T\], from -1 to 2"), use_adapter(model, wrong):
            pass
    with pytest.raises(ConfigError, match=r"given for \[2\] rows, and the batch has \[3, 6\]"):
        under(model, ["a", "b"])
    assert torch.equal(logits(model), under(model, "a"))


def test_one_thread_at_a_time() -> None:
    model, errors = several(), []

    def other() -> None:
        try:
            with use_adapter(model, "b"):
                pass
        except ConfigError as error:
            errors.append(str(error))

    for inside in (True, False):
        thread = threading.Thread(target=other)
        if inside:
            with use_adapter(model, "a"):
                thread.start()
                thread.join()
        else:
            thread.start()
            thread.join()
    assert errors == ["another thread is inside use_adapter of this model; take turns, or give each row its own"]


# --- by row ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [["a", None, "b"], ["c", "b", "a"], [None, None, "c"], ["b", "b", None]], ids=str)
def test_each_row_gives_what_it_gives_alone(rows: list[str | None], dtype: torch.dtype) -> None:
    model = several(dtype)
    limit = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.15}[dtype]
    index = torch.tensor([-1 if name is None else adapter_names(model).index(name) for name in rows])
    for choice in (rows, index, index[:, None].expand(3, 6)):
        together = under(model, choice).split(INPUTS.lengths)
        for row, name in enumerate(rows):
            with use_adapter(model, name):
                assert differ(together[row], logits(model, one_row(INPUTS, row))) < limit


def test_one_adapter_for_every_row_is_that_adapter() -> None:
    model = random_model(dtype=torch.float64)
    add(model, "a", targets="all-linear")
    add(model, "b", 1, targets="self")
    assert torch.equal(under(model, ["a"] * 3), under(model, "a"))
    assert torch.equal(under(model, [None] * 3), under(model, None))


def test_rows_follow_the_parameters() -> None:
    """What is kept joined between calls is joined again after a change."""
    model = several()
    rows = ["a", "b", "c"]
    before = under(model, rows)
    assert torch.equal(under(model, rows), before)
    with torch.no_grad():
        for pair in adapter_pairs(model, "b").values():
            pair.B.mul_(2)
    after = under(model, rows).split(INPUTS.lengths)
    assert torch.equal(after[0], before.split(INPUTS.lengths)[0])
    with use_adapter(model, "b"):
        assert differ(after[1], logits(model, one_row(INPUTS, 1))) < 1e-12
    assert differ(after[1], before.split(INPUTS.lengths)[1]) > 1e-3


def test_gradients_of_rows_are_those_of_each_alone() -> None:
    model = several()
    with use_adapter(model, ["a", "b", "a"]), torch.enable_grad():
        out = model(INPUTS).logits
        sum(out[row, :length].square().sum() for row, length in enumerate(INPUTS.lengths)).backward()  # type: ignore[union-attr]
    together = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    model.zero_grad()
    for row, name in enumerate(("a", "b", "a")):
        with use_adapter(model, name), torch.enable_grad():
            model(one_row(INPUTS, row)).logits.square().sum().backward()
    for key, value in model.named_parameters():
        if value.requires_grad:
            mine, theirs = together[key], value.grad
            assert (mine is None or not mine.any()) == (theirs is None), key
            if theirs is not None:
                assert mine is not None and differ(mine, theirs) < 1e-10 * max(1.0, float(theirs.abs().max()))


def test_layers_that_read_images_take_one_adapter_at_a_time() -> None:
    model = random_model(dtype=torch.float64)
    add(model, "a", targets="all-linear")
    add(model, "b", 1, targets="self")
    with pytest.raises(ConfigError, match=r"vision\.layers\.0\.attention\.q_proj reads images.*model\.read_images"):
        under(model, ["a", "b", "a"])
    row = one_row(INPUTS, 2)
    with torch.no_grad():
        with use_adapter(model, "a"):
            images, alone = model.read_images(row), model(row).logits
        with use_adapter(model, torch.tensor([0])):
            assert differ(model(row, images=images).logits, alone) < 1e-12


def test_rows_are_not_for_dropout() -> None:
    model = several().train()
    under(model, ["a", "b", None])
    add(model, "dropping", targets="self", dropout=0.1)
    with pytest.raises(ConfigError, match=r"is for answering; call model\.eval\(\), or train one at a time"):
        under(model, ["a", "dropping", None])
    model.eval()
    under(model, ["a", "dropping", None])


# --- answers ---------------------------------------------------------------------------------------------------------

PROMPTS = make_inputs([[1, 2, 64, 3], [7, 8, 9], [5, 6]], [[(1, 2)], [], []])
GREEDY = SamplingParams(max_new_tokens=7)


def answers(model: LanguageModel, choice: Any, inputs: Any = PROMPTS) -> list[list[int]]:
    with use_adapter(model, choice):
        return generate(model, inputs, GREEDY).token_ids


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_of_answers_with_an_adapter_each(packed: bool) -> None:
    model = random_model()
    if packed:
        pack(model, "bf16")
    add(model, "a", 1, targets=TEXT_SIDE, alpha=16)
    add(model, "b", 2, targets=("self", "lm_head"), rank=2, dora=True)
    choice = ["b", None, "a"]
    together = answers(model, choice)
    for row, name in enumerate(choice):
        assert together[row] == answers(model, name, one_row(PROMPTS, row))[0]
    assert len({tuple(answers(model, name)[1]) for name in (None, "a", "b")}) == 3


# --- packed weights --------------------------------------------------------------------------------------------------


def rounded(packing: Packing) -> VisionLanguageModel:
    """A plain model of the values that packed weights stand for."""
    model = random_model()
    with torch.no_grad():
        for layer in model.decoder.modules():
            if isinstance(layer, Linear):
                packed = ops.pack_weight(layer.weight, packing.format, group=packing.group)
                layer.weight.copy_(ops.unpack_weight(packed))
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_over_packed_weights(format: Format, dora: bool) -> None:
    packing = Packing(format, group=16)
    packed, plain = pack(random_model(), packing), rounded(packing)
    for model in (packed, plain):
        add(model, "default", targets=(*TEXT_SIDE, "cross", "lm_head"), dora=dora)
    assert adapter_pairs(packed, "default").keys() == adapter_pairs(plain, "default").keys()
    assert differ(logits(packed), logits(plain)) < 1e-4
    assert differ(under(packed, None), logits(packed)) > 1e-3
    assert answers(packed, "default") == answers(plain, "default")
    assert answers(packed, None) == answers(plain, None)
    with torch.enable_grad():
        for model in (packed, plain):
            model(INPUTS).logits[0].square().sum().backward()
    theirs = dict(plain.named_parameters())
    count = 0
    for name, value in packed.named_parameters():
        if value.requires_grad:
            part, _, rest = name.rpartition(".lora.")
            for key, other in theirs.items():
                if other.requires_grad and key.replace(".lora.", ".") == f"{part}.{rest}":
                    assert value.grad is not None and other.grad is not None
                    assert differ(value.grad, other.grad) < 1e-3 * max(1.0, float(other.grad.abs().max()))
                    count += 1
    assert count == len(adapter_pairs(packed, "default")) * (3 if dora else 2)


def test_the_fast_path_of_a_decoding_step_is_for_blocks_without_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pack(random_model(), "bf16")
    add(model, "a", targets="decoder.layers.2.mlp.down_proj")
    add(model, "b", targets="decoder.layers.[02].attention.qkv.v_proj")
    taken: list[int] = []

    def counted(x: torch.Tensor, blocks: list[ops.DecoderBlock], *rest: Any) -> torch.Tensor:
        taken.append(len(blocks))
        return decode_blocks(x, blocks, *rest)

    decode_blocks = ops.decode_blocks
    monkeypatch.setattr(ops, "decode_blocks", counted)
    for choice, blocks in ((None, 3), ("a", 2), ("b", 1), (["a", None, "b"], 1), (["a", None, "a"], 2)):
        taken.clear()
        answers(model, choice)
        assert sum(taken) == 6 * blocks, choice  # of three self-attention blocks, in each of 6 steps


def test_a_compiled_layer_sees_the_choice() -> None:
    mlp = (model := several(torch.float32)).decoder.layers[0].mlp
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    x = torch.randn(3, 5, 32)
    with torch.no_grad():
        for choice in ("a", None, ["c", "a", None], "a", torch.tensor([2, 2, -1])):
            with use_adapter(model, choice):
                assert differ(compiled(x), mlp(x)) < 1e-5


def test_what_is_kept_for_dora_follows_the_base() -> None:
    model = random_model(dtype=torch.float64)
    add(model, "a", targets="projector", dora=True)
    before = logits(model)
    with torch.no_grad():
        model.projector.base.weight.mul_(2)  # type: ignore[union-attr,operator]
        lengths = model.projector.lora["a"].magnitude  # type: ignore[union-attr,index]
        after = logits(model)
        lengths.mul_(2)
    assert differ(after, before) > 1e-3 and differ(logits(model), after) > 1e-3


def test_what_is_kept_is_dropped_where_weights_change_unseen() -> None:
    """As those do that are gathered from several processes: in the same place, and as if nobody had written there."""
    model = random_model(dtype=torch.float64)
    add(model, "a", targets="projector", dora=True)
    layer = model.projector
    with torch.no_grad():
        logits(model)
        with torch.autograd._unsafe_preserve_version_counter(layer.lora["a"].magnitude):  # type: ignore[union-attr,index]
            layer.lora["a"].magnitude.mul_(2)  # type: ignore[union-attr,index]
        stale = logits(model)
        layer.lora.forget()  # type: ignore[union-attr,operator]
        assert differ(logits(model), stale) > 1e-3
