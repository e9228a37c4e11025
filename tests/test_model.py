"""The model against itself: short computations against plain ones, batches against rows, steps against the whole."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from small_model import CONFIG, IMAGE, make_inputs, one_row, random_model, tile_tables, unused_rows

from llama_multimodal.cache import SelfAttentionCache
from llama_multimodal.config import LLAMA_3_2_11B_VISION, LLAMA_3_2_90B_VISION, ModelConfig
from llama_multimodal.errors import PromptError
from llama_multimodal.inputs import ModelInputs
from llama_multimodal.models import VisionLanguageModel, mllama_vision

LAYOUTS = CONFIG.vision.aspect_ratios
ROWS = [[60, 5, 9, IMAGE, 4, 33, 2], [60, 7, 11], [IMAGE, 3, IMAGE, 8, 8, 21, 30, 1, 2], [60, IMAGE, IMAGE, 17, 50]]
GRIDS: list[list[tuple[int, int]]] = [[(1, 2)], [], [(1, 1), (3, 1)], [(2, 2), (1, 4)]]


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return random_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def batch() -> ModelInputs:
    return make_inputs(ROWS, GRIDS)


# --- the vision encoder's short computation --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=[f"{rows}x{columns}" for rows, columns in LAYOUTS])
@pytest.mark.parametrize("patch_tokens", [5, 17])  # 3 and 7 zero tokens a tile
@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_deduplication_changes_nothing(layout: tuple[int, int], patch_tokens: int, seed: int) -> None:
    side = {5: 28, 17: 56}[patch_tokens]
    config = replace(CONFIG, vision=replace(CONFIG.vision, image_size=side))
    assert config.vision.num_patches == patch_tokens
    encoder = random_model(seed, torch.float64, config).vision
    inputs = make_inputs([[IMAGE]], [[layout]], seed=seed, config=config)
    short, plain = (encoder(inputs.tiles, inputs.images, deduplicate=choice) for choice in (True, False))
    assert plain.shape == (layout[0] * layout[1], patch_tokens, config.vision.output_size)
    assert plain.std() > 0.1
    assert (short - plain).abs().max() < 1e-10


@torch.inference_mode()
def test_how_many_tokens_are_computed() -> None:
    config = replace(CONFIG, vision=replace(CONFIG.vision, image_size=14 * 7))  # 50 tokens: 6 zero tokens
    encoder = random_model(0, torch.float64, config).vision
    calls = []
    inputs = make_inputs([[IMAGE]], [[(1, 1)]], config=config)
    block = encoder.layers[0].register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    other = encoder.global_layers[0].register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    for choice in (True, False):
        encoder(inputs.tiles, inputs.images, deduplicate=choice)
    block.remove()
    other.remove()
    # One tile and one padding tile; one zero token in the local blocks, and one for either tile in the global ones.
    assert calls == [101, 102, 201, 204]


@torch.inference_mode()
def test_tables_of_unused_tiles_choose_the_plain_path(model) -> None:
    """A fine-tune may put values there; the short computation would then be wrong, and is not taken."""
    inputs = make_inputs([[IMAGE]], [[(1, 2)]])
    assert model.vision.padding_tiles_are_equal()
    for which, name in enumerate(("tile_position_embedding", "pre_tile_embedding", "post_tile_embedding")):
        changed = copy.deepcopy(model)
        table = tile_tables(changed)[which]
        generator = torch.Generator().manual_seed(which)
        for view in unused_rows(table, CONFIG.vision):
            view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64))
        encoder = changed.vision
        assert not encoder.padding_tiles_are_equal(), name
        chosen = encoder(inputs.tiles, inputs.images)
        assert torch.equal(chosen, encoder(inputs.tiles, inputs.images, deduplicate=False)), name
        assert (chosen - encoder(inputs.tiles, inputs.images, deduplicate=True)).abs().max() > 1e-4, name


def test_tile_tables_are_looked_at_again_only_after_a_change(model, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = copy.deepcopy(model.vision)
    looks = []
    look = type(encoder)._unused_rows_are_zero
    monkeypatch.setattr(type(encoder), "_unused_rows_are_zero", lambda *args: looks.append(0) or look(*args))
    before = copy.deepcopy(encoder.state_dict())
    for _ in range(3):
        assert encoder.padding_tiles_are_equal()
    assert len(looks) == 3  # with gradients, every time
    for _ in range(3):
        assert _equal_without_gradients(encoder)
    assert len(looks) == 4
    optimizer = torch.optim.SGD([encoder.pre_tile_embedding], lr=1.0)
    encoder.pre_tile_embedding.grad = torch.ones_like(encoder.pre_tile_embedding)
    optimizer.step()
    assert not _equal_without_gradients(encoder)
    encoder.load_state_dict(before)
    assert _equal_without_gradients(encoder)
    with torch.inference_mode():
        encoder.post_tile_embedding[1, 1:] = 1  # a view of the table
    assert not _equal_without_gradients(encoder)
    encoder.post_tile_embedding = torch.nn.Parameter(before["post_tile_embedding"])
    assert _equal_without_gradients(encoder)
    encoder.float()
    assert _equal_without_gradients(encoder)
    assert len(looks) == 9


@torch.no_grad()
def _equal_without_gradients(encoder: mllama_vision.TiledVisionEncoder) -> bool:
    return encoder.padding_tiles_are_equal()


@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_the_mlp_in_pieces_changes_nothing(model, batch, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    whole = model.vision(batch.tiles, batch.images)  # with gradients: not in pieces
    monkeypatch.setattr(mllama_vision, "_MLP_TOKENS", tokens)
    with torch.no_grad():
        assert (model.vision(batch.tiles, batch.images) - whole).abs().max() < 1e-12


def test_row_0_of_a_tile_table_is_not_an_unused_tile(model) -> None:
    """Id 0 stands for no image: what lies there is never read, and does not cost the short computation."""
    changed = copy.deepcopy(model.vision)
    with torch.no_grad():
        changed.pre_tile_embedding[0] = 1
    assert changed.padding_tiles_are_equal()


@torch.inference_mode()
def test_images_encoded_together_equal_images_encoded_alone(model) -> None:
    grids = [(2, 1), (1, 1), (1, 4), (1, 2), (2, 2), (1, 1), (3, 1)]
    together = make_inputs([[IMAGE] * len(grids)], [grids])
    parts, first = [], 0
    for grid, image in zip(grids, together.images):
        tiles = together.tiles[first : first + image.num_tiles]
        parts.append(model.vision(tiles, [image]))
        first += grid[0] * grid[1]
    assert (model.vision(together.tiles, together.images) - torch.cat(parts)).abs().max() < 1e-12


# --- steps against the whole -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 3, 6])
@torch.inference_mode()
def test_prefill_equals_decode(model, first: int) -> None:
    """A sequence at once, and its first tokens at once and the rest one by one, with the image inside either part."""
    row, grids = [60, 5, IMAGE, 9, 4, 33, 2, 17, 8, 40], [(2, 1)]
    inputs = make_inputs([row], [grids])
    whole = model(inputs).logits
    cross = model.read_images(inputs)
    cache = SelfAttentionCache.allocate(CONFIG.text, 1, len(row), torch.float64, "cpu")
    steps = [slice(0, first), *(slice(t, t + 1) for t in range(first, len(row)))]
    parts = [model(part(inputs, step), images=cross, self_cache=cache).logits for step in steps]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-12


@torch.inference_mode()
def test_prefill_in_pieces(model) -> None:
    """Several tokens onto a cache that already holds some."""
    inputs = make_inputs([[60, 5, IMAGE, 9, 4, 33, 2, IMAGE, 8, 40]], [[(2, 1), (1, 3)]])
    whole, cross = model(inputs).logits, model.read_images(inputs)
    cache = SelfAttentionCache.allocate(CONFIG.text, 1, 10, torch.float64, "cpu")
    steps = [slice(0, 4), slice(4, 9), slice(9, 10)]
    parts = [model(part(inputs, step), images=cross, self_cache=cache).logits for step in steps]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-12


def part(inputs: ModelInputs, at: slice) -> ModelInputs:
    return replace(
        inputs, tokens=inputs.tokens[:, at], positions=inputs.positions[:, at], visible=inputs.visible[:, at]
    )


@torch.inference_mode()
def test_ragged_decoding(model, batch) -> None:
    """Rows of different lengths, prefilled together and continued at their own positions."""
    steps = torch.tensor([[3, 8, 41], [9, 22, 5], [50, 1, 7], [2, 2, 30]])
    cross = model.read_images(batch)
    cache = SelfAttentionCache.allocate(CONFIG.text, len(ROWS), 12, torch.float64, "cpu")
    last = [length - 1 for length in batch.lengths]
    out = [model(batch, images=cross, self_cache=cache, last_token_of=last).logits]
    assert out[0].shape == (4, 1, CONFIG.text.vocab_size)
    visible = batch.visible[torch.arange(4), torch.tensor(last)][:, None]
    for i in range(3):
        positions = torch.tensor(batch.lengths)[:, None] + i
        step = replace(batch, tokens=steps[:, i : i + 1], positions=positions, visible=visible)
        out.append(model(step, images=cross, self_cache=cache).logits)
    for b, row in enumerate(ROWS):
        whole = model(make_inputs([[*row, *steps[b].tolist()]], [GRIDS[b]])).logits[0, -4:]
        assert (torch.cat([logits[b] for logits in out]) - whole).abs().max() < 1e-12


@torch.inference_mode()
def test_rows_of_a_batch_equal_rows_alone(model, batch) -> None:
    logits = model(batch).logits
    for b, length in enumerate(batch.lengths):
        assert (logits[b, :length] - model(one_row(batch, b)).logits[0]).abs().max() < 1e-12


@torch.inference_mode()
def test_a_cache_that_is_full_says_so(model) -> None:
    inputs = make_inputs([[60, 1, 2, 3]])
    cache = SelfAttentionCache.allocate(CONFIG.text, 1, 3, torch.float64, "cpu")
    with pytest.raises(PromptError, match="holds 3 tokens but position 3"):
        model(inputs, self_cache=cache)


# --- who sees which image --------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_text_sees_the_images_it_should(model) -> None:
    """Change each image in turn: exactly the tokens that may see it, or that come after such a token, change."""
    row, grids = [60, 5, IMAGE, 9, IMAGE, IMAGE, 4, 33], [(1, 2), (1, 1), (2, 1)]
    inputs = make_inputs([row], [grids])
    logits, first = model(inputs).logits[0], 0
    for image, begins in zip(inputs.images, (2, 4, 5)):
        tiles = inputs.tiles.clone()
        tiles[first : first + image.num_tiles] += 1
        first += image.num_tiles
        change = (model(replace(inputs, tiles=tiles)).logits[0] - logits).abs().amax(-1)
        assert (change[:begins] == 0).all()  # also exactly: what is before an image does not depend on it
        assert (change[begins:] > 1e-6).all()


@torch.inference_mode()
def test_text_that_sees_no_image_passes_the_gated_blocks_unchanged(model) -> None:
    """Tokens before the image equal those of the text alone, and of a model whose gates are shut."""
    before = [60, 5, 9]
    alone = model(make_inputs([before])).logits
    shut = copy.deepcopy(model)
    for name, value in shut.decoder.named_parameters():
        if name.endswith("_gate"):
            value.zero_()
    inputs = make_inputs([[*before, IMAGE, 4]], [[(2, 2)]])
    with_image, with_shut = model(inputs).logits, shut(inputs).logits
    assert (with_image[:, :3] - alone).abs().max() < 1e-12
    assert (with_shut[:, :3] - alone).abs().max() < 1e-12
    assert (with_image[:, 3:] - with_shut[:, 3:]).abs().max() > 0.1


@torch.inference_mode()
def test_attention_and_mlp_of_a_gated_block_each_count(model) -> None:
    inputs = make_inputs([[IMAGE, 4]], [[(1, 1)]])
    logits = model(inputs).logits
    for gate in ("attention_gate", "mlp_gate"):
        shut = copy.deepcopy(model)
        for layer in CONFIG.text.cross_attention_layers:
            getattr(shut.decoder.layers[layer], gate).zero_()
        assert (shut(inputs).logits - logits).abs().max() > 0.1, gate


# --- number formats --------------------------------------------------------------------------------------------------

BOUND = {torch.bfloat16: 0.02, torch.float16: 0.0025}
"""Root mean square of the difference from fp32, as a share of the logits' own, from weights that both formats hold."""


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_half_precision(batch, dtype: torch.dtype, seed: int) -> None:
    half = random_model(seed, dtype)
    full = copy.deepcopy(half).float()
    ours, exact = half(batch).logits, full(batch).logits
    assert ours.dtype == dtype
    real = torch.zeros(ours.shape[:2], dtype=torch.bool)
    for b, length in enumerate(batch.lengths):
        real[b, :length] = True
    error = (ours.float() - exact)[real]
    assert error.square().mean().sqrt() < BOUND[dtype] * exact[real].square().mean().sqrt()
    assert error.abs().max() > 0  # they are not the same computation


@torch.inference_mode()
def test_single_precision(batch) -> None:
    single = random_model(0, torch.float32)
    exact = copy.deepcopy(single).double()(batch).logits
    assert (single(batch).logits - exact).abs().max() < 2e-5 < exact.std()


# --- the released sizes ----------------------------------------------------------------------------------------------


def parameters(config: ModelConfig) -> int:
    """Counted from the sizes, block by block."""
    v, t = config.vision, config.text
    mlp = 3 * t.hidden_size * t.intermediate_size
    kv = t.num_key_value_heads * t.hidden_size // t.num_attention_heads
    attention = 2 * t.hidden_size**2 + 2 * t.hidden_size * kv
    selves = (t.num_hidden_layers - len(t.cross_attention_layers)) * (attention + mlp + 2 * t.hidden_size)
    gated = attention + mlp + 2 * t.hidden_size + 2 * t.hidden_size // t.num_attention_heads + 2
    tables = (2 * t.vocab_size + 8) * t.hidden_size
    text = selves + len(t.cross_attention_layers) * gated + tables + t.hidden_size
    block = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size + v.intermediate_size + 5 * v.hidden_size
    blocks = v.num_hidden_layers * block + v.num_global_layers * (block + 2)
    tokens = (v.image_size // v.patch_size) ** 2 + 1
    places = (tokens + 9 * 4 * (tokens + 2)) * v.hidden_size + 3
    vision = blocks + places + (3 * v.patch_size**2 + 1 + 4) * v.hidden_size
    return text + vision + (6 * v.hidden_size + 1) * t.hidden_size


@pytest.mark.parametrize(
    "config, layers", [(LLAMA_3_2_11B_VISION, 40), (LLAMA_3_2_90B_VISION, 100)], ids=["11B", "90B"]
)
def test_released_sizes_on_the_meta_device(config: ModelConfig, layers: int) -> None:
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert len(model.decoder.layers) == layers and config.text.cross_attention_layers == tuple(range(3, layers, 5))
    assert sum(p.numel() for p in model.parameters()) == parameters(config)


def test_the_released_11b_has_10_670_220_835_parameters() -> None:
    assert parameters(LLAMA_3_2_11B_VISION) == 10_670_220_835
