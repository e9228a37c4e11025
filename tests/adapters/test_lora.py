"""LoRA and DoRA: what is added, its gradients, dropout, merging and undoing it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapters_for_tests import INPUTS, TOLERANCE, adapted, add, differ, fill, logits
from small_model import CONFIG, random_model
from torch import Tensor
from torch.func import functional_call

from llama_multimodal import LoraConfig, apply_lora, load, merge_lora, save, unmerge_lora, use_adapter
from llama_multimodal.adapters.layers import LoraLinear
from llama_multimodal.adapters.lora import adapter_names, adapter_pairs, count_parameters, remove_adapter
from llama_multimodal.errors import CheckpointError, ConfigError
from llama_multimodal.models import LanguageModel
from llama_multimodal.models.layers import PackedLinear
from llama_multimodal.quant.pack import pack

each_kind = pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])


def state(model: LanguageModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what is added ---------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("own", ["float32", "model"])
def test_a_new_adapter_changes_no_bit(own: Any, dtype: torch.dtype, dora: bool) -> None:
    model = random_model(dtype=dtype)
    before = logits(model)
    apply_lora(model, LoraConfig(rank=4, targets=("all-linear", "lm_head"), dora=dora, dtype=own))
    found = {value.dtype for value in model.parameters() if value.requires_grad}
    assert found == {torch.float32 if own == "float32" else dtype}
    after = logits(model)
    assert after.dtype == dtype
    if dora and own == "float32" and dtype == torch.float64:  # lengths in fp32
        assert differ(after, before) < 1e-4
    elif dora and dtype == torch.bfloat16 and own == "model":  # lengths in bf16
        assert differ(after, before) < TOLERANCE[dtype]
    else:
        assert torch.equal(after, before)


@each_kind
@pytest.mark.parametrize("targets", ["self", "cross", "mlp", "vision", "projector", "lm_head"])
def test_every_target_adds_something(targets: str, dora: bool) -> None:
    model = random_model(dtype=torch.float64)
    plain = logits(model)
    add(model, "default", targets=targets, dora=dora)
    assert differ(logits(model), plain) > 1e-3
    with torch.enable_grad():
        model(INPUTS).logits.square().sum().backward()
    for path, pair in adapter_pairs(model, "default").items():
        for name, value in pair.named_parameters():
            assert value.grad is not None and bool(value.grad.abs().max() > 0), (path, name)


def weights_with(model: LanguageModel, leaves: dict[str, tuple[Tensor, ...]], scale: float) -> dict[str, Tensor]:
    """Every adapted layer's weight as an expression of A, B and with DoRA the magnitude."""
    found = {}
    for path, (a, b, *magnitude) in leaves.items():
        weight = model.get_parameter(f"{path}.weight").detach() + scale * b @ a
        if magnitude:
            weight = magnitude[0][:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
        found[f"{path}.weight"] = weight
    return found


@each_kind
@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_are_those_of_the_merged_weight(dora: bool, rslora: bool) -> None:
    model = adapted(dora=dora, rslora=rslora, targets=("all-linear", "lm_head"))
    weigh = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weigh[1, 3:] = weigh[2, 3:] = 0  # padding
    given = {p: list(pair.parameters()) for p, pair in adapter_pairs(model, "default").items()}
    ours = torch.autograd.grad((model(INPUTS).logits * weigh).sum(), [x for row in given.values() for x in row])
    plain = random_model(dtype=torch.float64)
    leaves = {path: tuple(x.detach().clone().requires_grad_() for x in row) for path, row in given.items()}
    weights = weights_with(plain, leaves, 8 / (2 if rslora else 4))
    out = functional_call(plain, weights, (INPUTS,)).logits
    expected = torch.autograd.grad((out * weigh).sum(), [x for row in leaves.values() for x in row])
    assert len(ours) == 67 * (3 if dora else 2)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() < 1e-10 * max(1.0, float(theirs.abs().max()))
        assert theirs.abs().max() > 0


def test_only_the_adapter_is_trained() -> None:
    model = random_model()
    total = sum(value.numel() for value in model.parameters())
    apply_lora(model, LoraConfig(rank=2, targets="q_proj"))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora.default." in name}
    shapes = 10 * 2 * (32 + 32)  # 5 blocks of the encoder, 5 of the decoder
    counts = count_parameters(model)
    assert counts == (shapes, total + shapes)
    assert str(counts) == f"1,280 of {total + shapes:,} parameters are trained (1.2 %)"
    with torch.enable_grad():
        model(INPUTS).logits.sum().backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == trained


def test_counting_packed_weights_and_tied_ones() -> None:
    model = random_model()
    plain = count_parameters(model)
    pack(model, "bf16")
    assert count_parameters(model).total == plain.total
    assert count_parameters(torch.nn.Linear(2, 3)) == (9, 9)


def test_ranks_and_alphas() -> None:
    model = adapted(targets="mlp", rank_pattern={"down_proj": 2}, alpha_pattern={"layers.0": 3})
    pairs = adapter_pairs(model, "default")
    assert pairs["decoder.layers.0.mlp.down_proj"].A.shape == (2, 48)
    assert pairs["decoder.layers.0.mlp.down_proj"].scale == 1.5
    assert pairs["decoder.layers.1.mlp.gate_up.up_proj"].B.shape == (48, 4)
    assert pairs["decoder.layers.1.mlp.gate_up.up_proj"].scale == 2


def test_initial_values() -> None:
    """A as a linear layer's weight is drawn, by torch's generator; B zero."""
    torch.manual_seed(3)
    first = adapter_pairs(apply_lora(random_model(), LoraConfig(rank=64, targets="projector")), "default")["projector"]
    torch.manual_seed(3)
    again = adapter_pairs(apply_lora(random_model(), LoraConfig(rank=64, targets="projector")), "default")["projector"]
    assert torch.equal(first.A, again.A) and not first.B.any()
    bound = first.A.shape[1] ** -0.5
    assert 0.97 * bound < first.A.abs().max() <= bound and abs(first.A.std() - bound / 3**0.5) < 0.02 * bound


# --- dropout ---------------------------------------------------------------------------------------------------------


@each_kind
def test_dropout_is_of_the_adapters_way_and_of_training_only(dora: bool) -> None:
    dropping, plain = (adapted(targets="projector", dropout=p, dora=dora) for p in (0.5, 0.0))
    x = torch.randn(7, plain.projector.lora.shape[1], dtype=torch.float64)  # type: ignore[union-attr,operator]
    assert torch.equal(dropping.projector(x), plain.projector(x))
    plain.train()
    dropping.train()
    assert torch.equal(plain.projector(x), plain.eval().projector(x))
    torch.manual_seed(5)
    found = dropping.projector(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    layer = dropping.projector
    assert isinstance(layer, LoraLinear)
    pair, weight = layer.lora["default"], layer.dense()
    added = dropped @ pair.delta(torch.float64).T
    expected = layer.base(x) + added
    if pair.magnitude is not None:
        factor = pair.magnitude / (weight + pair.delta(torch.float64)).norm(dim=1)
        expected = layer.base(x) + (factor - 1) * (dropped @ weight.T) + factor * added
    assert differ(found, expected) < 1e-12 < differ(found, plain.projector(x))


def test_the_mode_follows_the_model() -> None:
    model = random_model()
    model.train()
    model.vision.eval()
    apply_lora(model, LoraConfig(targets="all-linear"))
    modes = {name.startswith("vision"): module.training for name, module in model.named_modules() if "lora" in name}
    assert modes == {True: False, False: True}


# --- merging ---------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_merging_and_undoing_it(dtype: torch.dtype, dora: bool) -> None:
    model = adapted(dtype, dora=dora, targets=("all-linear", "lm_head"))
    plain, adding, before = random_model(dtype=dtype).state_dict(), logits(model), state(model)
    assert merge_lora(model) is model
    assert model.state_dict().keys() == plain.keys()  # a plain model
    assert differ(logits(model), adding) < TOLERANCE[dtype]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, plain[name])}
    assert len(changed) == 67
    assert unmerge_lora(model) is model
    assert same(state(model), before) and torch.equal(logits(model), adding)


def test_a_merged_model_is_saved_and_packed(tmp_path: Path) -> None:
    model = adapted(torch.float32)
    with pytest.raises(CheckpointError, match="layers were changed"):
        save(model, None, tmp_path)
    merged = logits(merge_lora(model))
    save(model, None, tmp_path)
    again, _ = load(tmp_path)
    assert torch.equal(logits(again), merged)
    assert differ(logits(pack(model, "bf16")), merged) < 0.5
    with pytest.raises(ConfigError, match="was replaced since the adapter was merged; load the model again"):
        unmerge_lora(model)


def test_a_merged_model_that_moves() -> None:
    model = adapted(torch.float64)
    merge_lora(model).to(torch.float32)
    unmerge_lora(model)
    assert {value.dtype for name, value in model.named_parameters() if ".lora." not in name} == {torch.float32}
    assert same_values(model, adapted(torch.float64).float())


def same_values(a: LanguageModel, b: LanguageModel) -> bool:
    return same({k: v.double() for k, v in state(a).items() if "lora" not in k}, {
        k: v.double() for k, v in state(b).items() if "lora" not in k
    })  # fmt: skip


def test_merging_one_of_several() -> None:
    model = random_model(dtype=torch.float64)
    add(model, "a", 1, targets="self")
    add(model, "b", 2, targets=("mlp", "q_proj"))
    found = {}
    for name in ("a", "b"):
        with use_adapter(model, name):
            found[name] = logits(model)
    assert differ(logits(merge_lora(model, "b")), found["b"]) < 1e-12
    assert differ(logits(merge_lora(unmerge_lora(model))), found["a"]) < 1e-12


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter; call apply_lora or load_adapter first"):
        merge_lora(random_model())
    model = pack(random_model(), "bf16")
    add(model, "default", targets="self")
    before = logits(model)
    with pytest.raises(ConfigError, match="packed weights, which would be rounded again; load the model unpacked"):
        merge_lora(model)
    assert torch.equal(logits(model), before)
    model = adapted()
    with pytest.raises(ConfigError, match="no adapter is merged"):
        unmerge_lora(model)
    merge_lora(model)
    for refused in (merge_lora, lambda m: apply_lora(m, LoraConfig(), "x"), remove_adapter):
        with pytest.raises(ConfigError, match="merged"):
            refused(model)
    with pytest.raises(ConfigError, match="merged"), use_adapter(model, None):
        pass


def test_the_embeddings_own_table_is_not_merged_into() -> None:
    tied = replace(CONFIG, text=replace(CONFIG.text, tie_word_embeddings=True))
    model = random_model(dtype=torch.float64, config=tied)
    add(model, "default", targets="lm_head")
    assert model.decoder.lm_head.base.weight is model.decoder.embedding.weight  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="the embedding's own table"):
        merge_lora(model)


# --- undoing it ------------------------------------------------------------------------------------------------------


@each_kind
def test_removing(dora: bool) -> None:
    model = random_model(dtype=torch.float64)
    before, plain = state(model), logits(model)
    add(model, "a", 1, targets="self", dora=dora)
    only_a = logits(model)
    add(model, "b", 2, targets=("vision", "q_proj"), dora=dora)
    assert adapter_names(model) == ("a", "b") and torch.equal(logits(model), only_a)
    remove_adapter(model, "b")
    assert adapter_names(model) == ("a",) and torch.equal(logits(model), only_a)
    assert not any(isinstance(module, LoraLinear) for module in model.vision.modules())
    add(model, "b", 2, targets="self", dora=dora)
    remove_adapter(model)
    assert adapter_names(model) == () and same(state(model), before) and torch.equal(logits(model), plain)


def test_removing_from_a_packed_model() -> None:
    model = pack(random_model(), "bf16")
    packed = logits(model)
    add(model, "a", targets=("self", "mlp"))
    remove_adapter(model, "a")
    assert torch.equal(logits(model), packed)
    assert isinstance(model.decoder.layers[0].attention.qkv, PackedLinear)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    fill(twin, seed=9)
    with use_adapter(twin, None):
        assert torch.equal(logits(model), before)
    remove_adapter(twin)
    assert torch.equal(logits(model), before) and adapter_names(model) == ("default",)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a.b", "a b", "keys", "training", "shape", "../x"])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name for an adapter; take letters"):
        apply_lora(random_model(), LoraConfig(), name)


def test_requests_that_are_refused() -> None:
    model = adapted(name="receipts")
    with pytest.raises(ConfigError, match='"receipts" already; choose another name, or remove it first'):
        add(model, "receipts")
    with pytest.raises(ConfigError, match='no adapter "reciepts"; the model has receipts; did you mean "receipts"'):
        remove_adapter(model, "reciepts")
    with pytest.raises(ConfigError, match=r"layers were changed \(adapters or NF4\); pack it before"):
        pack(model, "bf16")
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    before = state(model)
    with pytest.raises(ConfigError, match="means no layer"):
        add(model, "other", targets=("self", "nothing"))
    assert same(state(model), before) and adapter_names(model) == ("receipts",)
