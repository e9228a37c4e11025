"""Against Meta's reference: logits, vision features, and the five faults that other implementations have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llama_multimodal.cache import SelfAttentionCache

TOLERANCE = 1e-4  # absolute, fp32; the logits have a standard deviation of 1.5


def test_logits(golden_of, case_name: str) -> None:
    assert golden_of.error(golden_of.case(case_name)) < TOLERANCE  # 6e-6 at most when this was written


def test_every_layout_and_kind_of_row_has_a_case(golden) -> None:
    layouts = {tuple(v.tolist()) for k, v in golden.vision.items() if k.endswith("aspect_ratio")}
    assert layouts == set(golden.model.config.vision.aspect_ratios)
    assert [len(row) for row in golden.case("mixed_batch").images] == [0, 1, 2, 2]


@pytest.mark.parametrize("case_name_", ["decode_one_image", "decode_two_images"])
@torch.inference_mode()
def test_decode(golden, case_name_: str) -> None:
    """A prompt at once and then a token at a time gives the logits that the reference's own decoding gives."""
    case = golden.case(case_name_)
    assert case.prompt is not None
    row, prompt = case.rows[0], case.prompt
    model = golden.model
    inputs = golden.processor.encode_tokens([row[:prompt]], images=case.images)
    images = model.read_images(inputs)
    self_cache = SelfAttentionCache.allocate(model.config.text, 1, len(row), model.dtype, model.device)
    logits = [model(inputs, images=images, self_cache=self_cache).logits]
    for position in range(prompt, len(row)):
        step = replace(
            inputs,
            tokens=torch.tensor([[row[position]]]),
            positions=torch.tensor([[position]]),
            visible=inputs.visible[:, -1:],  # as the last token of the prompt
        )
        logits.append(model(step, images=images, self_cache=self_cache).logits)
    assert (torch.cat(logits, dim=1)[0] - case.logits[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("deduplicate", [True, False])
@torch.inference_mode()
def test_vision_features(any_golden, deduplicate: bool) -> None:
    """Projected features of the real tiles of every layout, by the short computation and by the plain one."""
    model = any_golden.model
    layouts = [key.removesuffix(".projected") for key in any_golden.vision if key.endswith(".projected")]
    for layout in layouts:
        inputs = any_golden.encode(any_golden.case(layout))
        assert [inputs.images[0].rows, inputs.images[0].columns] == any_golden.vision[f"{layout}.aspect_ratio"].tolist()
        features = model.projector(model.vision(inputs.tiles, inputs.images, deduplicate=deduplicate))
        assert (features - any_golden.vision[f"{layout}.projected"]).abs().max() < TOLERANCE, layout


@torch.inference_mode()
def test_images_of_a_batch_do_not_mix(golden) -> None:
    """All layouts encoded in one call, in an order that interleaves their sizes."""
    layouts = ["tiles_2x2", "one_tile", "tiles_1x4", "tiles_2x1", "tiles_1x3", "tiles_3x1", "tiles_4x1", "tiles_1x2"]
    cases = [golden.case(layout) for layout in layouts]
    inputs = golden.processor.encode_tokens([c.rows[0] for c in cases], images=[c.images[0] for c in cases])
    expected = torch.cat([golden.vision[f"{layout}.projected"] for layout in layouts])
    features = golden.model.projector(golden.model.vision(inputs.tiles, inputs.images))
    assert (features - expected).abs().max() < TOLERANCE


# --- the five faults -------------------------------------------------------------------------------------------------


def test_excludes(golden, fault: str) -> None:
    """Each fault, put into the reference, moves the logits of a case much further than we are from the true ones."""
    change = golden.facts["faults: max abs change of the logits"][fault]
    assert change["change"] > 100 * TOLERANCE
    assert golden.error(golden.case(change["case"])) < TOLERANCE


@torch.inference_mode()
def test_fault_1_taps_are_the_inputs_of_their_blocks(golden) -> None:
    model, vision = golden.model, golden.vision
    inputs = golden.encode(golden.case("tiles_2x1"))
    assert torch.equal(inputs.tiles, vision["tiles_2x1.pixels"])
    features = model.vision(inputs.tiles, inputs.images)
    assert (features - vision["tiles_2x1.encoder"]).abs().max() < TOLERANCE

    width, indices = model.config.vision.hidden_size, model.config.vision.intermediate_layers_indices
    assert (features[..., :width] - vision["tiles_2x1.final"]).abs().max() < TOLERANCE
    taps = features[..., width:].unflatten(-1, (width, len(indices)))  # dimension-major, tap-minor
    states = vision["tiles_2x1.states"]  # what enters each block; the last is what leaves the last one
    for tap, index in enumerate(indices):
        assert (taps[..., tap] - states[index]).abs().max() < TOLERANCE
        for other in set(range(len(states))) - {index}:
            assert (taps[..., tap] - states[other]).abs().max() > 0.1


@torch.inference_mode()
def test_fault_2_text_before_an_image_does_not_see_it(golden) -> None:
    case = golden.case("text_before_image")
    row = case.rows[0]
    before = row.index(golden.model.config.image_token_id)
    with_image = golden.model(golden.encode(case)).logits[0, :before]
    alone = golden.model(golden.processor.encode_tokens([row[:before]])).logits[0]
    assert (with_image - alone).abs().max() < 1e-5
    assert (alone - case.logits[0][:before]).abs().max() < TOLERANCE


@torch.inference_mode()
def test_fault_2_a_row_of_text_is_the_same_beside_rows_with_images(golden) -> None:
    case = golden.case("mixed_batch")
    alone = golden.model(golden.processor.encode_tokens([case.rows[0]])).logits[0]
    assert (alone - case.logits[0]).abs().max() < TOLERANCE


@torch.inference_mode()
def test_fault_3_real_patches_read_padding(golden) -> None:
    """Features depend on the class embedding of *unused* tiles: hide it from them and they change."""
    case = golden.case("tiles_1x3")
    inputs = golden.encode(case)
    vision = golden.model.vision
    few, all_tiles = replace_max_tiles(golden.model, 3), vision(inputs.tiles, inputs.images)
    assert (few(inputs.tiles, inputs.images) - all_tiles).abs().max() > 1e-2
    assert (golden.model.projector(all_tiles) - golden.vision["tiles_1x3.projected"]).abs().max() < TOLERANCE


def replace_max_tiles(model, max_num_tiles: int):
    """The same encoder for a model of fewer tiles: one padding tile less, all else equal."""
    config = replace(model.config.vision, max_num_tiles=max_num_tiles)
    encoder = type(model.vision)(config).eval()
    state = model.vision.state_dict()
    kept = [0, *(1 + model.config.vision.aspect_ratios.index(ratio) for ratio in config.aspect_ratios)]
    for name in ("tile_position_embedding", "pre_tile_embedding", "post_tile_embedding"):
        state[name] = state[name][kept, :max_num_tiles]
    encoder.load_state_dict(state)
    return encoder


@torch.inference_mode()
def test_fault_4_the_first_text_token_reads_the_whole_image(golden) -> None:
    """The image's own token reads its last tile, and text reads nothing but real tiles."""
    case = golden.case("tiles_2x2")
    inputs = golden.encode(case)
    changed = inputs.tiles.clone()
    changed[-1] += 1
    at = case.rows[0].index(golden.model.config.image_token_id)
    difference = golden.model(inputs).logits - golden.model(replace(inputs, tiles=changed)).logits
    assert difference[0, at].abs().max() > 1e-2
    assert difference[0, :at].abs().max() == 0

    inputs = golden.encode(golden.case("tiles_1x2"))
    cache = golden.model.read_images(inputs)
    assert cache.keys[0].shape[1] == 2 * golden.model.config.vision.num_patches


@torch.inference_mode()
def test_fault_5_adjacent_images_share_their_end(golden) -> None:
    """Text after A B sees both; text after A, text, B sees only B."""
    for name, last in (("adjacent_images", [0, 2]), ("two_images", [1, 2]), ("adjacent_then_third", [2, 3])):
        case = golden.case(name)
        assert golden.encode(case).visible[0, -1].tolist() == last
        assert golden.error(case) < TOLERANCE
