"""Generation and sampling, on a small random model in fp64 and a decoder that spells tokens from a table."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_model import CONFIG, IMAGE, Letters, make_inputs, one_row, random_model

from llama_multimodal import SamplingParams, generate, ops
from llama_multimodal.config import ModelConfig
from llama_multimodal.errors import PromptError
from llama_multimodal.generate import GenerationOutput
from llama_multimodal.inputs import ModelInputs
from llama_multimodal.models import VisionLanguageModel
from llama_multimodal.ops import DecoderBlock, Format
from llama_multimodal.quant.pack import pack, use_int8_activations
from llama_multimodal.sampling import adjusted_logits, sample

NO_END = replace(CONFIG, text=replace(CONFIG.text, eos_token_ids=()))
TABLE = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(64)]  # 64 different pairs of letters
ROWS = [[60, 5, IMAGE, 9, 4], [60, 7], [60, IMAGE, 3, IMAGE, 8, 8, 21, 30]]
GRIDS: list[list[tuple[int, int]]] = [[(1, 2)], [], [(1, 1), (2, 1)]]
HOT = SamplingParams(max_new_tokens=8, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return random_model(dtype=torch.float64, config=NO_END)


@pytest.fixture(scope="module")
def batch() -> ModelInputs:
    return make_inputs(ROWS, GRIDS, decoder=lambda: Letters(TABLE))


@pytest.fixture(scope="module")
def hot(model: VisionLanguageModel, batch: ModelInputs) -> GenerationOutput:
    return generate(model, batch, HOT)


def ending_with(model: VisionLanguageModel, *tokens: int) -> VisionLanguageModel:
    """The same model with other end tokens."""
    other = random_model(dtype=torch.float64, config=with_text(eos_token_ids=tokens))
    other.load_state_dict(model.state_dict())
    return other


def with_text(**changes) -> ModelConfig:
    return replace(NO_END, text=replace(NO_END.text, **changes))


def spelt(tokens: list[int]) -> str:
    return "".join(TABLE[token] for token in tokens)


# --- the loop --------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_largest_logit_of_the_whole_sequence(model, batch) -> None:
    """Each token is the argmax of a forward pass without any cache over all that came before it."""
    out = generate(model, batch, SamplingParams(max_new_tokens=6))
    for b, row in enumerate(ROWS):
        so_far = list(row)
        for token in out.token_ids[b]:
            with torch.inference_mode():
                logits = model(make_inputs([so_far], [GRIDS[b]])).logits
            assert token == int(logits[0, -1].argmax())
            so_far.append(token)
        assert len(so_far) == len(row) + 6
    assert out.texts == [spelt(tokens) for tokens in out.token_ids]


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("int8_activations", [False, True])
def test_packed_blocks_decode_what_the_whole_sequence_says(
    batch, monkeypatch: pytest.MonkeyPatch, format: Format, int8_activations: bool
) -> None:
    """One call for blocks that follow each other; rows of different lengths, with pictures and without."""
    if format == "bf16" and int8_activations:
        pytest.skip("bf16 weights take activations as they are")
    calls = []

    def counted(x: torch.Tensor, blocks: list[DecoderBlock], *args: Any) -> torch.Tensor:
        calls.append((len(x), len(blocks)))
        return decode_blocks(x, blocks, *args)

    decode_blocks = ops.decode_blocks
    monkeypatch.setattr(ops, "decode_blocks", counted)
    config = with_text(intermediate_size=64)  # whole groups of 32 everywhere
    model = pack(random_model(config=config), format)
    if int8_activations:
        use_int8_activations(model)
    answers = generate(model, batch, SamplingParams(max_new_tokens=6, temperature=0.0)).token_ids
    layers, others = range(config.text.num_hidden_layers), config.text.cross_attention_layers
    runs = [len(list(run)) for cross, run in itertools.groupby(layers, others.__contains__) if not cross]
    assert calls == [(len(ROWS), length) for length in runs] * 5  # the first token is the prefill's
    for row, (tokens, grids) in enumerate(zip(ROWS, GRIDS, strict=True)):
        with torch.inference_mode():
            logits = model(make_inputs([[*tokens, *answers[row]]], [grids])).logits[0, len(tokens) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answers[row])[:, None])[:, 0]
        assert (chosen >= logits.amax(1) - (0.05 if int8_activations else 1e-3)).all()


def test_greedy_reads_the_images(model) -> None:
    first, second = (
        generate(model, make_inputs(ROWS[:1], GRIDS[:1], seed=seed), SamplingParams(max_new_tokens=8))
        for seed in (0, 1)
    )
    assert first.token_ids != second.token_ids
    assert first.texts is None  # no decoder, no text


@pytest.mark.parametrize(
    "params", [SamplingParams(max_new_tokens=8), HOT, replace(HOT, top_k=20, top_p=0.9, min_p=0.01)]
)
def test_a_row_answers_alike_alone_and_in_any_batch(model, batch, params: SamplingParams) -> None:
    together = generate(model, batch, params)
    for b in range(len(ROWS)):
        assert generate(model, one_row(batch, b), params).token_ids == [together.token_ids[b]]
    turned = make_inputs(ROWS[::-1], GRIDS[::-1])
    assert generate(model, turned, params).token_ids == together.token_ids[::-1]


def test_a_row_that_ends_early_leaves_the_others_as_they_were(model, batch, hot) -> None:
    end = next(token for token in hot.token_ids[0][:-1] if token not in hot.token_ids[1] + hot.token_ids[2])
    out = generate(ending_with(model, end), batch, HOT)
    assert out.token_ids[0] == hot.token_ids[0][: hot.token_ids[0].index(end) + 1]
    assert out.token_ids[1:] == hot.token_ids[1:]
    assert out.finish_reasons == ["stop", "length", "length"]


def test_seeds(model, batch, hot) -> None:
    assert generate(model, batch, HOT) == hot
    torch.manual_seed(123)  # the global generator plays no part
    torch.rand(5)
    assert generate(model, batch, HOT) == hot
    others = [generate(model, batch, replace(HOT, seed=seed)) for seed in (4, 5)]
    assert hot.token_ids != others[0].token_ids != others[1].token_ids


def test_no_seed_draws_freely(model, batch) -> None:
    params = replace(HOT, seed=None)
    torch.manual_seed(1)
    first, second = generate(model, batch, params), generate(model, batch, params)
    torch.manual_seed(1)
    assert generate(model, batch, params) == first != second


def test_decoding_never_encodes_the_images_again(model, batch, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda inputs: calls.append(1) or encode(inputs))
    generate(model, batch, SamplingParams(max_new_tokens=5))
    assert len(calls) == 1


# --- where an answer ends --------------------------------------------------------------------------------------------


def test_several_end_tokens(model, batch, hot) -> None:
    ends = hot.token_ids[0][3], hot.token_ids[1][5]
    out = generate(ending_with(model, *ends), batch, HOT)
    for tokens, full, text, reason in zip(out.token_ids, hot.token_ids, out.texts, out.finish_reasons):
        places = [i for i, token in enumerate(full) if token in ends]
        assert tokens == (full[: places[0] + 1] if places else full)  # the end token is the last
        assert text == spelt(tokens[:-1] if places else tokens)  # and is not part of the text
        assert reason == ("stop" if places else "length")
    assert out.finish_reasons[:2] == ["stop", "stop"]


@pytest.mark.parametrize("count", [1, 3])
def test_length_limit(model, batch, hot, count: int) -> None:
    out = generate(model, batch, replace(HOT, max_new_tokens=count))
    assert out.token_ids == [tokens[:count] for tokens in hot.token_ids]
    assert out.finish_reasons == ["length"] * 3


def test_context_limit(model) -> None:
    small = random_model(dtype=torch.float64, config=with_text(max_position_embeddings=10))
    small.load_state_dict(model.state_dict())
    rows = [[60, 5, 9, 4, 6, 7, 2], [60, 7]]
    out = generate(small, make_inputs(rows), SamplingParams(max_new_tokens=100))
    assert [len(tokens) for tokens in out.token_ids] == [3, 8]  # 10 tokens in all
    assert out.finish_reasons == ["length", "length"]
    assert out.token_ids == [tokens[:n] for tokens, n in zip(generate(model, make_inputs(rows)).token_ids, (3, 8))]
    assert len(generate(small, make_inputs([[60] * 9])).token_ids[0]) == 1
    for length in (10, 11):
        with pytest.raises(PromptError, match="context of 10"):
            generate(small, make_inputs([[60] * length]))
    with pytest.raises(PromptError, match="past the model's context"):
        small(make_inputs([[60] * 11]))


def test_the_released_context_does_not_allocate_a_cache_of_its_size(model, batch) -> None:
    """The cache holds the prompt and the answer, not the context: a huge limit must not need the memory."""
    huge = random_model(dtype=torch.float64, config=with_text(max_position_embeddings=10**12))
    huge.load_state_dict(model.state_dict())
    assert len(generate(huge, batch, SamplingParams(max_new_tokens=2)).token_ids[0]) == 2


@pytest.mark.parametrize("where", [slice(0, 2), slice(3, 5), slice(3, 8), slice(13, 16)])
def test_stop_strings(model, batch, hot, where: slice) -> None:
    """Also inside a token, and across several: the text ends before the string, the tokens with the one that
    completed it."""
    assert hot.texts is not None
    full = hot.texts[0]
    stop = full[where]
    out = generate(model, one_row(batch, 0), replace(HOT, stop=("neither", stop)))
    cut = full.index(stop)
    assert out.texts == [full[:cut]]
    assert out.token_ids == [hot.token_ids[0][: (cut + len(stop) + 1) // 2]]
    assert out.finish_reasons == ["stop"]


@pytest.mark.parametrize("stop", [("d", "bcd"), ("bcd", "d")])
def test_the_earliest_of_several_stop_strings_wins(model, batch, hot, stop: tuple[str, str]) -> None:
    """Both are complete with the same token; the text ends before the one that begins first."""
    table = ["zz"] * 64
    for token, text in zip(hot.token_ids[0][:2], ("ab", "cd")):
        table[token] = text
    row = replace(one_row(batch, 0), decoder=lambda: Letters(table))
    out = generate(model, row, replace(HOT, stop=stop))
    assert (out.texts, out.token_ids) == (["a"], [hot.token_ids[0][:2]])


def test_a_stop_string_that_never_comes(model, batch, hot) -> None:
    assert generate(model, batch, replace(HOT, stop=("0",))) == hot


def test_stop_strings_need_a_decoder(model) -> None:
    with pytest.raises(PromptError, match="tokenizer"):
        generate(model, make_inputs([[60, 1]]), SamplingParams(stop="x"))


# --- streams ---------------------------------------------------------------------------------------------------------


def stop_sets(texts: list[str]) -> list[tuple[str, ...]]:
    full = texts[0]
    nearly = full[2:6] + "0"  # begins like the text four characters long, then differs
    return [(), (nearly,), (nearly, full[5:9]), (full[7:10], full[3:10] + "0"), (full[-3:] + "0",)]


@pytest.mark.parametrize("which", range(5))
def test_a_stream_gives_what_the_whole_gives(model, batch, hot, which: int) -> None:
    """Joined events equal the answer, and no event shows a character that the answer does not keep."""
    params = replace(HOT, stop=stop_sets(hot.texts)[which])
    whole = generate(model, batch, params)
    tokens: list[list[int]] = [[], [], []]
    texts, reasons = ["", "", ""], [None] * 3
    for event in generate(model, batch, params, stream=True):
        assert reasons[event.row] is None  # nothing after the end
        tokens[event.row].append(event.token_id)
        texts[event.row] += event.text
        reasons[event.row] = event.finish_reason
        assert whole.texts[event.row].startswith(texts[event.row])
    assert (tokens, texts, reasons) == (whole.token_ids, whole.texts, whole.finish_reasons)


def test_text_is_held_back_only_while_a_stop_string_may_begin(model, batch, hot) -> None:
    row, tokens = one_row(batch, 0), hot.token_ids[0][:4]
    assert len(set(tokens)) == 4
    table = ["zz"] * 64
    for token, text in zip(tokens, ("ab", "cd", "ef", "gh")):
        table[token] = text
    row = replace(row, decoder=lambda: Letters(table))

    def shown(*stop: str) -> list[str]:
        params = replace(HOT, max_new_tokens=4, stop=stop)
        return [event.text for event in generate(model, row, params, stream=True)]

    assert shown() == ["ab", "cd", "ef", "gh"]
    assert shown("xyz") == ["ab", "cd", "ef", "gh"]
    assert shown("defx") == ["ab", "c", "", "defgh"]  # "def" may begin the string until "g" comes
    assert shown("defx", "fgx", "h0") == ["ab", "c", "", "defgh"]  # the end of the answer shows all
    assert shown("defx", "fg") == ["ab", "c", "", "de"]  # the longer one fails as the shorter is found
    assert shown("b0", "bcde0") == ["a", "", "bcdef", "gh"]


def test_a_stream_can_be_left(model, batch, hot) -> None:
    events = generate(model, batch, HOT, stream=True)
    assert [next(events).token_id for _ in range(4)] == [
        hot.token_ids[b][i] for i, b in ((0, 0), (0, 1), (0, 2), (1, 0))
    ]
    events.close()


def test_errors_of_a_stream_come_at_once(model) -> None:
    with pytest.raises(PromptError):
        generate(model, make_inputs([[60] * 64]), stream=True)


# --- sampling --------------------------------------------------------------------------------------------------------


def some_logits(seed: int, vocab: int = 50) -> torch.Tensor:
    return 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def kept(logits: torch.Tensor, **settings) -> torch.Tensor:
    params = SamplingParams(**{"temperature": 1.0, **settings})
    return adjusted_logits(logits, params, ()).isfinite()


@pytest.mark.parametrize("seed", range(20))
def test_top_k_keeps_the_k_largest(seed: int) -> None:
    logits = some_logits(seed)
    for k in (1, 7, 49, 50, 1000):
        mask = kept(logits, top_k=k)
        assert mask.sum() == min(k, 50)
        assert logits[mask].min() >= logits[~mask].max() if k < 50 else mask.all()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed: int, p: float) -> None:
    logits = some_logits(seed)
    probabilities, mask = logits.double().softmax(0), kept(logits, top_p=p)
    assert mask.any() and probabilities[mask].min() >= (probabilities[~mask].max() if (~mask).any() else 0)
    assert probabilities[mask].sum() >= p - 1e-6
    assert probabilities[mask].sum() - probabilities[mask].min() < p + 1e-6  # without its least member it falls short


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("p", [1e-4, 0.1, 0.99])
def test_min_p_is_a_share_of_the_best(seed: int, p: float) -> None:
    logits = some_logits(seed)
    probabilities = logits.double().softmax(0)
    assert torch.equal(kept(logits, min_p=p), probabilities >= p * probabilities.max())


@pytest.mark.parametrize("seed", range(5))
def test_kept_logits_are_only_divided_by_the_temperature(seed: int) -> None:
    logits = some_logits(seed)
    params = SamplingParams(temperature=0.7, top_k=30, top_p=0.95, min_p=0.001)
    ours = adjusted_logits(logits, params, ())
    mask = ours.isfinite()
    assert 0 < mask.sum() < 50
    torch.testing.assert_close(ours[mask].diff(), (logits / 0.7)[mask].diff())


def test_top_p_counts_after_the_temperature() -> None:
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    assert kept(logits, top_p=0.55).tolist() == [True, False, False]
    assert kept(logits, top_p=0.55, temperature=5.0).tolist() == [True, True, False]


def test_draws_follow_the_probabilities() -> None:
    logits, generator = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), torch.Generator().manual_seed(0)
    params = SamplingParams(temperature=1.0)
    counts = torch.bincount(torch.tensor([sample(logits, params, (), generator) for _ in range(4000)]), minlength=4)
    # within four standard deviations of each share
    shares = logits.exp()
    assert ((counts / 4000 - shares).abs() < 4 * (shares * (1 - shares) / 4000).sqrt()).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = some_logits(0)
    params = SamplingParams(temperature=temperature)
    assert sample(logits, params, (), torch.Generator().manual_seed(0)) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_repetition_penalty(temperature: float) -> None:
    """Positive logits are divided and negative ones multiplied; ids past the LM head (images) are passed over."""
    logits = torch.tensor([2.0, -2.0, 1.0, -1.0])
    params = SamplingParams(temperature=temperature, repetition_penalty=2.0)
    ours = adjusted_logits(logits, params, {0, 1, 4, 128256})
    torch.testing.assert_close(ours - ours[2], torch.tensor([1.0, -4.0, 1.0, -1.0]) - 1.0)
    assert torch.equal(logits, torch.tensor([2.0, -2.0, 1.0, -1.0]))  # the caller's tensor is left alone


def test_repetition_penalty_with_images(model, batch) -> None:
    """A strong penalty makes every greedy token new, and the image tokens of the prompt do no harm."""
    out = generate(model, batch, SamplingParams(max_new_tokens=20, repetition_penalty=1e9))
    for row, tokens in zip(ROWS, out.token_ids):
        assert len(set(tokens)) == 20 and not set(tokens) & set(row)
        assert max(tokens) < CONFIG.text.vocab_size


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.0}, {"min_p": -0.1}, {"repetition_penalty": 0.0},
        {"stop": ("",)}, {"stop": ""},
    ],
)  # fmt: skip
def test_bad_settings_are_named(bad: dict) -> None:
    with pytest.raises(PromptError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_half_precision_logits_are_sampled_in_full() -> None:
    logits = some_logits(1).to(torch.bfloat16)
    assert adjusted_logits(logits, SamplingParams(temperature=0.3), ()).dtype == torch.float32
