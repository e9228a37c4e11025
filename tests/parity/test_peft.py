"""Adapters against PEFT on transformers: trained here and read there, trained there and read here."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families_for_tests import Pair, conversations, pair
from safetensors.torch import load_file, save_file
from small_model import make_inputs, random_model
from test_llama import ROWS
from test_llama import peer as llama_peer

import llama_multimodal as lmm
from llama_multimodal.adapters.lora import adapter_pairs, remove_adapter
from llama_multimodal.adapters.targets import PRESETS, places
from llama_multimodal.config import config_to_hf
from llama_multimodal.models import LanguageModel
from llama_multimodal.weights.families import hf_modules

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TEXT, VISION = (
    ["Llama 3.1", "SmolLM2"],
    ["LLaVA", "LLaVA, SigLIP", "LLaVA, DINOv2", "LLaVA-NeXT", "Idefics3", "SmolVLM"],
)
KINDS = {
    "LoRA": {},
    "rsLoRA": {"rslora": True, "rank_pattern": {"q_proj": 2, "layers.1": 3}, "alpha_pattern": {"layers.1": 5}},
    "DoRA": {"dora": True},
    "DoRA, rsLoRA": {"dora": True, "rslora": True, "rank_pattern": {"mlp": 5}},
}


class Both:
    """One model here and in transformers, and the logits of the same input."""

    def __init__(self, name: str, folder: Path) -> None:
        self.theirs: Any
        if name in TEXT:
            self.theirs = llama_peer(name, folder)
            self.ours, processor = lmm.load(folder, dtype=torch.float32)
            self.our_inputs = processor.encode_tokens(ROWS[:1])
            self.their_inputs: dict[str, Any] = {"input_ids": torch.tensor(ROWS[:1])}
        else:
            both: Pair = pair(name, folder)
            self.theirs, self.ours = both.theirs, both.ours
            conversation = conversations()["one"]
            self.our_inputs, self.their_inputs = both.our_processor(conversation), both.their_inputs(conversation)

    @torch.inference_mode()
    def differ(self, theirs: Any) -> float:
        """Relative to the logits' size."""
        mine, other = self.ours(self.our_inputs).logits, theirs(**self.their_inputs).logits
        return float((mine - other).abs().max() / other.abs().max())


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Both]:
    return functools.cache(lambda name: Both(name, tmp_path_factory.mktemp("both")))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def targets_of(model: LanguageModel) -> tuple[str, ...]:
    groups = {place.group for place in places(model).values()}
    return (*(name for name in PRESETS if name in groups), "lm_head")


@torch.no_grad()
def fill(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, value in parameters:
        if "magnitude" in name:
            value.mul_(1 + 0.1 * torch.randn(value.shape, generator=generator))
        else:
            value.copy_(0.15 * torch.randn(value.shape, generator=generator))


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "LoRA") for name in (*TEXT, *VISION)]
    + [(name, kind) for name in ("SmolLM2", "LLaVA", "SmolVLM") for kind in KINDS if kind != "LoRA"],
)
@torch.no_grad()  # kernels are chosen by gradients: a base that learns would take others than one that does not
def test_ours_there_and_back(name: str, kind: str, both: Callable[[str], Both], tmp_path: Path) -> None:
    here = both(name)
    plain = here.ours(here.our_inputs).logits
    config = lmm.LoraConfig(rank=4, alpha=6, targets=targets_of(here.ours), **KINDS[kind])  # type: ignore[arg-type]
    lmm.apply_lora(here.ours, config)
    pairs = adapter_pairs(here.ours, "default")
    fill((f"{path}.{key}", value) for path, one in pairs.items() for key, value in one.named_parameters())
    assert (here.ours(here.our_inputs).logits - plain).abs().max() > 0.1
    lmm.save_adapter(here.ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(here.theirs, tmp_path / "ours").eval()
    try:
        assert here.differ(theirs) < 1e-5
        assert count(theirs) == len(pairs)
        theirs.save_pretrained(tmp_path / "theirs")
    finally:
        remove_adapter(here.ours)
        theirs.unload()
    assert torch.equal(here.ours(here.our_inputs).logits, plain)
    lmm.load_adapter(here.ours, tmp_path / "theirs")
    for path, again in adapter_pairs(here.ours, "default").items():
        assert (again.rank, again.scale) == (pairs[path].rank, pytest.approx(pairs[path].scale))
        for mine, other in zip(again.parameters(), pairs[path].parameters(), strict=True):
            assert torch.equal(mine, other)
    remove_adapter(here.ours)


def count(theirs: Any) -> int:
    return sum(hasattr(module, "lora_A") and len(module.lora_A) > 0 for module in theirs.modules())


@pytest.mark.parametrize(
    ("name", "dora"), [(name, False) for name in (*TEXT, *VISION)] + [("Llama 3.1", True), ("Idefics3", True)]
)
def test_theirs_trained_and_read_here(name: str, dora: bool, both: Callable[[str], Both], tmp_path: Path) -> None:
    here = both(name)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules="all-linear", use_dora=dora, init_lora_weights=False,
        rank_pattern={r".*\.0\.self_attn\.q_proj": 5, "v_proj": 2}, alpha_pattern={"v_proj": 1}, lora_dropout=0.1,
    )  # fmt: skip
    theirs = peft.get_peft_model(here.theirs, config).eval()
    try:
        optimizer = torch.optim.SGD((p for p in theirs.parameters() if p.requires_grad), lr=1e-3)
        logits = theirs(**here.their_inputs).logits
        logits.log_softmax(-1)[..., 3].mean().neg().backward()
        optimizer.step()
        theirs.save_pretrained(tmp_path)
        lmm.load_adapter(here.ours, tmp_path, "theirs")
        assert here.differ(theirs) < 1e-5
        assert count(theirs) >= len(adapter_pairs(here.ours, "theirs")) > 10
        assert not any(value.requires_grad for value in here.ours.parameters())
    finally:
        theirs.unload()
        if hasattr(here.ours, "_adapters"):
            remove_adapter(here.ours)


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_theirs(dora: bool, both: Callable[[str], Both], tmp_path: Path) -> None:
    here = both("SmolVLM")
    lmm.apply_lora(here.ours, lmm.LoraConfig(rank=4, alpha=6, targets=targets_of(here.ours), dora=dora))
    pairs = adapter_pairs(here.ours, "default")
    fill((f"{path}.{key}", value) for path, one in pairs.items() for key, value in one.named_parameters())
    lmm.save_adapter(here.ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(here.theirs, tmp_path, is_trainable=True).eval()
    try:
        for model, inputs in ((here.ours, (here.our_inputs,)), (theirs, ())):
            out = model(*inputs) if inputs else model(**here.their_inputs)
            out.logits.log_softmax(-1)[..., 3].mean().backward()
        names = {path: modules[0] for path, modules in hf_modules(here.ours.config, pairs).items()}
        found = dict(theirs.named_parameters())
        for path, one in pairs.items():
            module = f"base_model.model.{names[path]}"
            wanted = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
            if dora:
                wanted["magnitude"] = "lora_magnitude_vector.default.weight"
            for key, value in one.named_parameters():
                other = found[f"{module}.{wanted[key]}"].grad
                assert value.grad is not None
                assert (value.grad - other).abs().max() < 1e-4 * max(1e-2, float(other.abs().max())), (path, key)
    finally:
        theirs.unload()
        remove_adapter(here.ours)


# --- Llama 3.2 Vision ------------------------------------------------------------------------------------------------


def test_mllama_has_their_modules(tmp_path: Path) -> None:
    """transformers computes another vision encoder (docs/exactness.md): the names and shapes, and our own merge."""
    model = random_model(dtype=torch.float32)
    lmm.apply_lora(model, lmm.LoraConfig(rank=3, targets=("all-linear", "lm_head"), dora=True))
    fill((k, v) for one in adapter_pairs(model, "default").values() for k, v in one.named_parameters())
    lmm.save_adapter(model, tmp_path)
    raw = {k: v for k, v in config_to_hf(model.config).items() if k not in ("architectures", "model_type")}
    theirs = transformers.MllamaForConditionalGeneration(transformers.MllamaConfig(**raw)).eval()
    linear = {n: tuple(m.weight.shape) for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)}
    names = {path: modules[0] for path, modules in hf_modules(model.config, places(model)).items()}
    assert {names[path]: place.shape for path, place in places(model).items()} == linear
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path)
    assert count(loaded) == len(linear) == 67
    stored = {name: value for name, value in loaded.named_parameters() if "lora_" in name}
    for path, one in adapter_pairs(model, "default").items():
        assert torch.equal(stored[f"base_model.model.{names[path]}.lora_A.default.weight"], one.A)
        assert torch.equal(stored[f"base_model.model.{names[path]}.lora_B.default.weight"], one.B)
    inputs = make_inputs([[1, 64, 3, 4]], [[(1, 2)]])
    with torch.no_grad():
        adding = model(inputs).logits
        assert (lmm.merge_lora(model)(inputs).logits - adding).abs().max() < 1e-4


# --- names of older versions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "old"),
    [
        (
            "LLaVA",
            {
                "model.language_model.": "language_model.model.",
                "model.vision_tower.": "vision_tower.vision_model.",
                "model.multi_modal_projector.": "multi_modal_projector.",
            },
        ),
        ("LLaVA", {"model.vision_tower.": "model.vision_tower.vision_model."}),
        (
            "LLaVA, DINOv2",
            {
                "attention.q_proj": "attention.attention.query",
                "attention.k_proj": "attention.attention.key",
                "attention.v_proj": "attention.attention.value",
                "attention.o_proj": "attention.output.dense",
            },
        ),
    ],
    ids=["before 4.52", "before 5", "DINOv2 before 5"],
)
@torch.no_grad()
def test_names_of_older_versions(name: str, old: dict[str, str], both: Callable[[str], Both], tmp_path: Path) -> None:
    here = both(name)
    lmm.apply_lora(here.ours, lmm.LoraConfig(rank=2, targets="all-linear"))
    fill((k, v) for one in adapter_pairs(here.ours, "default").values() for k, v in one.named_parameters())
    expected = here.ours(here.our_inputs).logits
    lmm.save_adapter(here.ours, tmp_path)
    remove_adapter(here.ours)
    renamed = {}
    for key, value in load_file(tmp_path / "adapter_model.safetensors").items():
        for new, before in old.items():
            key = key.replace(f".{new}", f".{before}", 1)
        renamed[key] = value
    assert any(before in key for key in renamed for before in old.values())
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    lmm.load_adapter(here.ours, tmp_path)
    assert torch.equal(here.ours(here.our_inputs).logits, expected)
    remove_adapter(here.ours)


def test_what_is_written(both: Callable[[str], Both], tmp_path: Path) -> None:
    """Short names where they mean these modules and no others, else whole ones."""
    here = both("LLaVA")
    for targets, expected in {
        "mlp": ["down_proj", "gate_proj", "up_proj"],
        "projector": ["linear_1", "linear_2"],
        "decoder.layers.0.mlp.gate_up.up_proj": ["model.language_model.layers.0.mlp.up_proj"],
    }.items():
        lmm.apply_lora(here.ours, lmm.LoraConfig(rank=2, alpha=4, targets=targets))
        lmm.save_adapter(here.ours, tmp_path, base_model="llava-hf/llava-1.5-7b-hf")
        remove_adapter(here.ours)
        raw = json.loads((tmp_path / "adapter_config.json").read_text())
        assert raw["target_modules"] == expected
        assert raw["lora_alpha"] == 4 and type(raw["lora_alpha"]) is int
        assert raw["base_model_name_or_path"] == "llava-hf/llava-1.5-7b-hf"
    lmm.apply_lora(here.ours, lmm.LoraConfig(rank=2, targets="self"))  # the encoder has layers of these names too
    lmm.save_adapter(here.ours, tmp_path)
    remove_adapter(here.ours)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(raw["target_modules"]) == 8 and all("language_model" in name for name in raw["target_modules"])
