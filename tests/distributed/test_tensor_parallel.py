"""Products that two processes share, against one process that computes them alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ranks import Group
from runs import CONFIGS, assert_same_run, make_batch, make_model, train
from small_model import CONFIG
from torch import nn

from llama_multimodal import LoraConfig, apply_lora, use_adapter
from llama_multimodal.config import LanguageModelConfig
from llama_multimodal.distributed import DECODER, ParallelConfig, make_mesh, parallelize
from llama_multimodal.distributed.tensor_parallel import TensorParallelLinear
from llama_multimodal.engine import Engine, EngineConfig, Request, plan_cache
from llama_multimodal.errors import ConfigError
from llama_multimodal.generate import generate
from llama_multimodal.models import LanguageModel, build_model
from llama_multimodal.quant.pack import pack
from llama_multimodal.sampling import SamplingParams

HEAD = (("decoder.lm_head", "enter"), ("decoder.lm_head", "gather"))


def parts(name: str) -> Any:
    return train(name, make_mesh(ParallelConfig(tensor=2), "cpu"))


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_learn_what_one_process_learns(name: str, two: Group) -> None:
    wanted = train(name)
    got, rest = two(parts, name)
    assert_same_run(got, wanted)
    assert rest[:2] == got[:2]


def shared(name: str, plan: Any = None) -> tuple[LanguageModel, LanguageModel]:
    """A model whole and in parts; every rank's weights come from its own seed, and those of the first count."""
    mesh = make_mesh(ParallelConfig(tensor=2), "cpu")
    return make_model(name), parallelize(make_model(name, seed=mesh.get_rank()), mesh, plan)


def answers(name: str, dtype: torch.dtype) -> Any:
    """What both generate, from rows of different lengths with and without pictures, and the parts' logits."""
    inputs, _ = make_batch(name, 7, [2, 0, 1])
    found = []
    for model in (model.to(dtype) for model in shared(name)):
        said = [
            generate(model, inputs, params).token_ids
            for params in (SamplingParams(max_new_tokens=8), SamplingParams(max_new_tokens=8, temperature=1.0, seed=4))
        ]
        found.append((said, model(inputs).logits.detach()))
    return found


@pytest.mark.parametrize("name, dtype", [(name, torch.float64) for name in CONFIGS] + [("llama vision", torch.float32)])
def test_parts_answer_as_the_whole(name: str, dtype: torch.dtype, two: Group) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    told = []
    for (wanted, logits), (said, theirs) in two(answers, name, dtype):
        assert said == wanted and said[0] != said[1]
        torch.testing.assert_close(theirs, logits, rtol=0, atol=tolerance)
        told.append(theirs)
    assert torch.equal(*told)  # to the bit: ranks that sample go the same way


def engine_answers(name: str) -> Any:
    """What the engine answers over parts, what `generate` answers over the whole, and the cache's blocks of each."""
    whole, model = shared(name)
    rows = [make_batch(name, 7 + count, [count])[0] for count in (2, 0, 1)]
    params = SamplingParams(max_new_tokens=8)
    config = EngineConfig(block_size=4, cache_memory="256KiB")
    engine = Engine(model, None, config)
    answers = engine.generate([Request(inputs=row, params=params) for row in rows])
    wanted = [generate(whole, row, params).token_ids[0] for row in rows]
    blocks = [plan_cache(whole.config, config, whole.dtype, whole.device).block_bytes, engine.plan.block_bytes]
    return wanted, [answer.token_ids for answer in answers], blocks, engine.runner.nbytes


@pytest.mark.parametrize("name", ["llama vision", "llama", "siglip"])
def test_the_engine_runs_over_parts(name: str, two: Group) -> None:
    for wanted, said, (whole, part), nbytes in two(engine_answers, name):
        assert said == wanted
        assert whole == 2 * part and nbytes <= 256 << 10  # each holds its own heads' keys alone


def adapted(name: str, plan: Any = None) -> LanguageModel:
    """In parts or, where a plan is left out, whole; with two adapters of other ranks that change what it says."""
    model = make_model(name)
    for adapter, rank in (("small", 2), ("wide", 5)):
        targets = ("self", "mlp", *(["cross"] if name == "llama vision" else ["lm_head"]))
        apply_lora(model, LoraConfig(rank=rank, targets=targets), adapter)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora" in key:
                value.copy_(0.4 * torch.randn(value.shape, generator=generator))
    return model.eval() if plan is None else parallelize(model.eval(), make_mesh(ParallelConfig(tensor=2), "cpu"), plan)


def answers_of_adapters(name: str, plan: Any) -> Any:
    """Of a row each, over the whole one row at a time and over parts together: logits, and what the engine says."""
    asked, params = ("wide", "", "small", "wide"), SamplingParams(max_new_tokens=8)
    whole, model = adapted(name), adapted(name, plan)
    rows = [make_batch(name, 7 + i, [0])[0] for i in range(len(asked))]
    logits, said = [], []
    for row, adapter in zip(rows, asked):
        with use_adapter(whole, adapter or None), torch.no_grad():
            logits.append(whole(row).logits)
            said.append(generate(whole, row, params).token_ids[0])
    told = []
    with torch.no_grad(), use_adapter(model, [adapter or None for adapter in asked]):
        for i, row in enumerate(rows):  # four rows alike, so that the batch has one length
            four = row.tokens.repeat(4, 1)
            places, nothing = torch.arange(four.shape[1])[None], torch.zeros(*four.shape, 2, dtype=torch.int64)
            told.append(model.decoder(model.embed(four, None), places, nothing)[i])
    engine = Engine(model, None, EngineConfig(block_size=4, cache_memory="256KiB"))
    requests = [Request(inputs=row, params=params, adapter=adapter) for row, adapter in zip(rows, asked)]
    return logits, told, said, [answer.token_ids for answer in engine.generate(requests)]


WIDE = (
    *(place for place in DECODER if ".mlp." not in place[0]),
    ("decoder.layers.*.mlp.gate_up", "enter"),
    ("decoder.layers.*.mlp.gate_up.*_proj", "gather"),
    ("decoder.layers.*.mlp.down_proj", "slice"),
)


@pytest.mark.parametrize("name, plan", [("llama vision", DECODER), ("llama", DECODER + HEAD), ("llama", WIDE)])
def test_rows_with_an_adapter_each_over_parts(name: str, plan: Any, two: Group) -> None:
    """Layers that are cut in every way: by outputs and by inputs, and those that give or take all of them."""
    for logits, told, wanted, said in two(answers_of_adapters, name, plan):
        for ours, theirs in zip(told, logits):
            torch.testing.assert_close(ours, theirs[0], rtol=0, atol=1e-10)
        assert said == wanted and len({tuple(tokens) for tokens in said}) > 2


def sizes(name: str) -> Any:
    whole, model = shared(name)
    local: dict[str, tuple[int, ...]] = {}
    hooks = model.decoder.layers[0].attention.qkv.k_proj.register_forward_hook(
        lambda layer, given, out: local.update(k=tuple(out.shape), kind=type(out))
    )
    generate(model, make_batch(name, 7, [1])[0], SamplingParams(max_new_tokens=1))
    hooks.remove()
    cut = {key for key, layer in model.named_modules() if isinstance(layer, TensorParallelLinear)}
    held = sum(layer.weight.to_local().numel() for layer in model.modules() if isinstance(layer, TensorParallelLinear))
    return (
        local,
        model.decoder.num_kv_heads,
        cut,
        held,
        sum(whole.get_parameter(f"{key}.weight").numel() for key in cut),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_every_product_of_a_block_is_shared(name: str, two: Group) -> None:
    for local, kv_heads, cut, held, whole in two(sizes, name):
        assert local["k"][-1] == 8 and local["kind"] is torch.Tensor  # one of two key heads, and no DTensor
        assert kv_heads == 1 and 2 * held == whole
        linear = {key for key, layer in make_model(name).named_modules() if isinstance(layer, nn.Linear)}
        assert linear - cut == linear & {"decoder.lm_head", "vision.patch_embedding"}


def with_head() -> Any:
    whole, model = shared("llama", DECODER + HEAD)
    inputs, _ = make_batch("llama", 3, [0, 0])
    gradients = []
    for one in (whole, model):
        one(inputs).logits.square().mean().backward()
        gradients.append(one.decoder.embedding.weight.grad)
    return model.decoder.lm_head.weight.to_local().shape, model(inputs).logits - whole(inputs).logits, gradients


def test_a_plan_may_cut_the_head(two: Group) -> None:
    for shape, difference, (wanted, got) in two(with_head):
        assert shape == (32, 32) and difference.abs().max() < 1e-12
        torch.testing.assert_close(got, wanted)


def on_meta() -> Any:
    mesh = make_mesh(ParallelConfig(tensor=2), "cpu")
    with torch.device("meta"):
        model = parallelize(build_model(CONFIGS["llama vision"]), mesh)
    return model.vision.layers[0].mlp.fc1.weight.to_local().shape, model.device.type


def test_a_model_without_weights_is_cut(two: Group) -> None:
    assert two(on_meta) == [((20, 32), "meta")] * 2


# --- what is refused --------------------------------------------------------------------------------------------------


def refusals() -> list[str]:
    mesh = make_mesh(ParallelConfig(tensor=2), "cpu")
    text = dataclasses.replace(CONFIG.text, cross_attention_layers=(), num_extra_embeddings=0)

    def built(**changes: Any) -> LanguageModel:
        return build_model(LanguageModelConfig(dataclasses.replace(text, **changes)))

    adapted = built()
    adapted.decoder.layers[0].mlp.down_proj = nn.Sequential(adapted.decoder.layers[0].mlp.down_proj)
    twice = parallelize(built(), mesh)
    said = []
    for model, plan in (
        (built(num_key_value_heads=1), None),
        (built(intermediate_size=31), None),
        (pack(built(hidden_size=128, intermediate_size=128), "int8"), None),
        (adapted, None),
        (built(tie_word_embeddings=True), HEAD),
        (built(), (("decoder.lm_head", "columnwise"),)),
        (built(), (("decoder.norm", "colwise"),)),
        (built(), (("decoder.layers.0.mlp", "heads"),)),
        (twice, None),
    ):
        before = None if model is twice else dict(model.named_modules())
        with pytest.raises(ConfigError) as refused:
            parallelize(model, mesh, plan)
        assert before is None or before == dict(model.named_modules())  # nothing is half done
        said.append(str(refused.value))
    return said


def test_what_cannot_be_cut_is_refused(two: Group) -> None:
    said = two(refusals)[0]
    for message, words in zip(
        said,
        (
            "tensor 2 does not divide decoder.layers.0.attention.num_kv_heads = 1",
            "does not divide the 31 channels of decoder.layers.0.mlp.gate_up.gate_proj",
            "is packed and cannot be cut",
            "down_proj is a Sequential and cannot be cut",
            "decoder.lm_head shares its weight",
            'style "columnwise" is not known; did you mean "colwise"?',
            "decoder.norm is a RMSNorm",
            "decoder.layers.0.mlp has no num_heads",
            "num_kv_heads = 1",
        ),
        strict=True,
    ):
        assert words in message and "\n" not in message
