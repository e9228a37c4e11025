"""Training the embedded model: data as a function of seed and step, resuming, two processes, shared tables."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from llama_multimodal.config import ModelConfig, TextConfig, TiledVisionConfig
from llama_multimodal.errors import ConfigError
from llama_multimodal.inputs import ImageLayout
from llama_multimodal.loading import load
from llama_multimodal.models import VisionLanguageModel
from llama_multimodal.models.layers import split_heads
from llama_multimodal.processing.tiles import choose_canvas, fitted_size
from llama_multimodal.train import checkpoint, loop, watch
from llama_multimodal.train.config import Progress
from llama_multimodal.train.loader import IGNORED
from llama_multimodal.train.parallel import Group
from llama_multimodal.train.tile_tables import share_between_ratios
from llama_multimodal.train.world.auxiliary import PATCH_HEADS, AuxiliaryHeads, Targets, middle_block, picture_targets
from llama_multimodal.train.world.config import WorldData, WorldOptim, WorldRecipe
from llama_multimodal.train.world.data import MicroBatch, WorldSteps, prepare_sample
from llama_multimodal.train.world.initial import initialise
from llama_multimodal.train.world.task import WorldTask, learning_rate, prepare
from llama_multimodal.zoo.world import CHARS, Mark, sample

VISION = TiledVisionConfig(32, 48, 2, 1, 2, 3, 64, 16, 4, (1,))
TEXT = TextConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
    cross_attention_layers=(0, 2), max_position_embeddings=512, rope_scaling=None,
)  # fmt: skip


def recipe(folder: Path, **changes: object) -> WorldRecipe:
    base = WorldRecipe(
        output=str(folder), steps=4, vision=VISION, text=TEXT, vision_steps=1, vocabulary_samples=300, save_every=2,
        optim=WorldOptim(warmup_steps=1, decay_steps=1),
        data=WorldData(samples_per_step=4, turns_per_scene=2, workers=0),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def weights(one: WorldRecipe) -> dict[str, torch.Tensor]:
    saved = checkpoint.load(checkpoint.last_path(one.checkpoints))
    assert saved is not None and saved.average is not None
    return dict(saved.average)


def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    whole = recipe(tmp_path / "whole")
    losses: dict[str, list[float]] = {"whole": [], "parts": []}
    loop.train(whole, lambda p: losses["whole"].append(p.values["answer_loss"]))
    parts = recipe(tmp_path / "parts")

    class Killed(Exception):
        pass

    def die_at_three(progress: Progress) -> None:
        if progress.step == 3:
            raise Killed
        losses["parts"].append(progress.values["answer_loss"])

    with pytest.raises(Killed):
        loop.train(parts, die_at_three)
    loop.train(parts, lambda p: losses["parts"].append(p.values["answer_loss"]))
    assert losses["parts"] == losses["whole"] and losses["whole"][1] > 0
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(parts)[name]), name
    assert [p.step for p in watch.lines(tmp_path / "parts")] == [1, 2, 3, 4]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    one, two = recipe(tmp_path / "one", steps=2, vision_steps=0), recipe(tmp_path / "two", steps=2, vision_steps=0)
    seen: list[Progress] = []
    loop.train(one, seen.append)
    loop.train(dataclasses.replace(two, processes=2), seen.append)
    for a, b in zip(seen[:2], seen[2:]):
        assert a.values["answer_loss"] == pytest.approx(b.values["answer_loss"], abs=1e-5)
        assert a.values["auxiliary_loss"] == pytest.approx(b.values["auxiliary_loss"], abs=1e-4)


def test_micro_batches_add_up_to_the_step(tmp_path: Path) -> None:
    seen: list[Progress] = []
    for tokens in (1, 100_000):
        data = WorldData(samples_per_step=6, tokens_per_microbatch=tokens, workers=0)
        one = recipe(tmp_path / str(tokens), steps=2, vision_steps=0, data=data)
        config, tokenizer, _ = prepare(one)
        pieces = WorldSteps(one, config, tokenizer)[0]
        assert len(pieces) == (6 if tokens == 1 else 1)
        assert sum(len(piece.targets.mentions) > 0 for piece in pieces) >= (3 if tokens == 1 else 1)
        loop.train(one, seen.append)
    for a, b in zip(seen[:2], seen[2:]):
        assert a.values["answer_loss"] == pytest.approx(b.values["answer_loss"], abs=1e-5)
        assert a.values["auxiliary_loss"] == pytest.approx(b.values["auxiliary_loss"], abs=1e-4)


def test_learning_rate(tmp_path: Path) -> None:
    optim = WorldOptim(learning_rate=8.0, decoder_learning_rate=2.0, warmup_steps=4, decay_steps=5)
    one = recipe(tmp_path, steps=20, vision_steps=6, optim=optim)
    rates = [learning_rate(step, one) for step in range(20)]
    assert rates[:6] == [2, 4, 6, 8, 8, 8] and rates[6:16] == [2] * 10 and rates[16:] == [1.6, 1.2, 0.8, 0.4]
    same = dataclasses.replace(one, optim=dataclasses.replace(optim, decoder_learning_rate=None))
    assert learning_rate(6, same) == 8


def test_steps_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    one = recipe(tmp_path)
    config, tokenizer, _ = prepare(one)
    first, again = (WorldSteps(one, config, tokenizer)[5][0] for _ in range(2))
    assert torch.equal(first.inputs.tokens, again.inputs.tokens) and torch.equal(first.inputs.tiles, again.inputs.tiles)
    other = WorldSteps(dataclasses.replace(one, data=dataclasses.replace(one.data, seed=1)), config, tokenizer)[5][0]
    assert first.inputs.tokens.shape != other.inputs.tokens.shape or not torch.equal(
        first.inputs.tokens, other.inputs.tokens
    )


def test_only_answers_are_learnt(tmp_path: Path) -> None:
    one = recipe(tmp_path)
    config, tokenizer, _ = prepare(one)
    eot = tokenizer.special("<|eot_id|>")
    for batch in WorldSteps(one, config, tokenizer)[0]:
        for row, length in enumerate(batch.inputs.lengths):
            labels = batch.labels[row]
            learnt = (labels != IGNORED).nonzero().flatten().tolist()
            assert learnt and learnt[-1] == length - 2 and labels[length - 2] == eot
            assert all(labels[t] == batch.inputs.tokens[row, t + 1] for t in learnt)
            assert config.image_token_id not in labels
            # The first answer comes after the first user message and the assistant's header.
            assert (batch.inputs.tokens[row, : learnt[0]] == eot).sum() >= 1


def test_named_tokens_end_what_is_named(tmp_path: Path) -> None:
    config, tokenizer, _ = prepare(recipe(tmp_path))
    for seed in range(20):
        item = sample(seed, family="scene")
        prepared = prepare_sample(item, tokenizer, config)
        named = [(turn.question, mention) for turn in item.turns for mention in turn.mentions]
        assert [mark for _, mark in prepared.named] == [mention.mark for _, mention in named]
        for (position, _), (question, mention) in zip(prepared.named, named):
            assert tokenizer.decode(prepared.tokens[position : position + 1]).strip() == mention.words.split()[-1]
            said = tokenizer.decode(prepared.tokens[: position + 1])
            assert said.endswith(question[: question.index(mention.words) + len(mention.words)])
            assert prepared.labels[position] == IGNORED


def test_characters_are_looked_for_from_the_token_before(tmp_path: Path) -> None:
    config, tokenizer, _ = prepare(recipe(tmp_path))
    for seed in range(20):
        item = sample(seed, family="text")
        prepared = prepare_sample(item, tokenizer, config)
        answers = [turn.answer for turn in item.turns if turn.kind == "text"]
        assert len(prepared.named) == sum(map(len, answers)) > 0
        for (position, mark), char in zip(prepared.named, "".join(answers)):
            assert CHARS[mark.char] == char
            assert tokenizer.decode([prepared.labels[position]]) == char


def test_texts_beside_a_steps_samples(tmp_path: Path) -> None:
    data = WorldData(samples_per_step=2, sheets_beside=2, texts_beside=3, workers=0)
    one = recipe(tmp_path, sheet_steps=1, data=data)
    config, tokenizer, _ = prepare(one)
    sheets, *others = WorldSteps(one, config, tokenizer)[1]
    assert len(sheets.inputs.images) == 2 and sum(len(batch.labels) for batch in others) == 5
    assert WorldSteps(one, config, tokenizer).count(1) == 7
    answers = {tuple(row[row != IGNORED].tolist()) for batch in others for row in batch.labels}
    for seed in range(1 * 7 + 2, 1 * 7 + 5):
        labels = prepare_sample(sample(seed, family="text", turns=data.turns_per_scene), tokenizer, config).labels
        assert tuple(label for label in labels if label != IGNORED) in answers
    assert sum(len(batch.inputs.images) for batch in WorldSteps(one, config, tokenizer)[0]) == data.sheets_per_step


def test_places_are_in_tiles_of_the_canvas(tmp_path: Path) -> None:
    data = WorldData(samples_per_step=24, turns_per_scene=8, workers=0)
    one = recipe(tmp_path, data=data)
    config, tokenizer, _ = prepare(one)
    side, most = VISION.image_size, VISION.max_num_tiles
    items = {}
    for seed in range(24):
        item = sample(seed)
        prepared = prepare_sample(item, tokenizer, config)
        items[tuple(prepared.tokens)] = item, prepared.named
    grids, named = set(), 0
    for batch in WorldSteps(one, config, tokenizer)[0]:
        targets, found = batch.targets, []
        assert targets.mentions.dtype == torch.int64 and targets.places.dtype == torch.float32
        for row, length in enumerate(batch.inputs.lengths):
            item, positions = items[tuple(batch.inputs.tokens[row, :length].tolist())]
            if item.image is None:
                continue
            width, height = item.image.size
            rows, columns = choose_canvas(width, height, side, most)
            fitted = fitted_size(width, height, rows, columns, side)
            for position, mark in positions:
                place = targets.places[len(found)]
                x, y = mark.x / width * fitted[0], mark.y / height * fitted[1]
                assert place.tolist() == pytest.approx((x / side, y / side), abs=1e-5)
                assert 0 < place[0] < columns and 0 < place[1] < rows
                grids.add((rows, columns))
                found.append([row, position])
        assert targets.mentions.tolist() == found and len(targets.places) == len(found)
        assert targets.weights()[-1] == len(found)
        named += len(found)
    assert named > 20 and len(grids) > 2


def with_mentions(one: WorldRecipe) -> tuple[VisionLanguageModel, AuxiliaryHeads, MicroBatch]:
    """A fresh model, its heads, and samples that name things."""
    config, tokenizer, _ = prepare(one)
    (batch,) = WorldSteps(one, config, tokenizer)[0]
    assert len(batch.targets.mentions) > 4
    torch.manual_seed(0)
    model, heads = VisionLanguageModel(config), AuxiliaryHeads(config)
    initialise(model, batch.inputs.tiles)
    return model, heads, batch


def test_places_teach_the_blocks_up_to_the_middle_one(tmp_path: Path) -> None:
    data = WorldData(samples_per_step=8, tokens_per_microbatch=100_000, workers=0)
    text = dataclasses.replace(TEXT, num_hidden_layers=6, cross_attention_layers=(1, 3, 5))
    model, heads, batch = with_mentions(recipe(tmp_path, text=text, data=data))
    assert middle_block(model) is model.decoder.layers[3]
    states: list[torch.Tensor] = []
    middle_block(model).register_forward_hook(lambda block, given, state: states.append(state))
    model(batch.inputs)
    heads.places(states[0], batch.targets, batch.targets.weights().tolist()).backward()

    def learns(module: torch.nn.Module) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())

    assert [learns(block) for block in model.decoder.layers] == [True] * 4 + [False] * 2
    assert learns(model.vision) and learns(model.projector) and not learns(model.decoder.lm_head)
    assert learns(heads.place) and not learns(heads.patch) and not learns(heads.count)


def test_a_step_teaches_places(tmp_path: Path) -> None:
    """By that loss alone: nothing else reaches its head."""
    data = WorldData(samples_per_step=8, tokens_per_microbatch=100_000, workers=0)
    for vision_steps in (0, 1):
        task = WorldTask(recipe(tmp_path, data=data, vision_steps=vision_steps), Group())
        (batch,) = task.dataset[0]
        loss, _ = task.loss(batch, task.totals([batch]).tolist(), 0)
        assert loss is not None
        loss.backward()
        assert (task.heads.place[1].weight.grad is None) == (vision_steps > 0)
        assert not middle_block(task.model)._forward_hooks


def test_place_losses_of_micro_batches_add_up() -> None:
    torch.manual_seed(0)
    heads = AuxiliaryHeads(ModelConfig(VISION, dataclasses.replace(TEXT, vocab_size=32), 32))
    state, mentions = torch.randn(4, 9, TEXT.hidden_size), torch.tensor([[0, 3], [0, 8], [2, 1], [3, 0], [3, 5]])
    places = 4 * torch.rand(5, 2)

    def targets(first: int, end: int, row: int) -> Targets:
        nothing = torch.zeros(len(PATCH_HEADS), 0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.int64)
        return Targets(*nothing, mentions[first:end] - torch.tensor([row, 0]), places[first:end])

    whole, parts = targets(0, 5, 0), [targets(0, 2, 0), targets(2, 5, 2)]
    totals = torch.stack([part.weights() for part in parts]).sum(0).tolist()
    assert totals == whole.weights().tolist() and totals[-1] == 5
    pieces = [heads.places(state[:2], parts[0], totals), heads.places(state[2:], parts[1], totals)]
    loss = heads.places(state, whole, totals)
    torch.testing.assert_close(sum(pieces), loss)
    assert heads.places(state.flip(1), whole, totals) != loss  # other tokens
    with torch.no_grad():
        heads.place[1].weight.zero_()
        heads.place[1].bias.copy_(places[0] + 0.4)
        exact = dataclasses.replace(whole, places=places[:1].expand(5, 2))
    # Smooth l1 with a knee at 0.1: 0.4 - 0.05 for each coordinate.
    assert heads.places(state, exact, totals).item() == pytest.approx(3.0 * 2 * 0.35, rel=1e-5)


def test_picture_targets_find_their_patch() -> None:
    layout = ImageLayout(1, 2)  # a canvas of 128 x 64, patches of 16
    marks = [
        Mark("object", 90, 20, (70, 0, 110, 40), shape=2, color=3, size=1),
        Mark("object", 5, 5, (3, 3, 7, 7), shape=0, color=0, size=-1),
    ]
    patches, counts = picture_targets(marks, layout, VISION)
    names = list(PATCH_HEADS)
    # x = 90 is column 5 of 8: the second tile's column 1; y = 20 is row 1: patch 1 * 4 + 1.
    assert patches[names.index("shape"), 1, 5] == 3 and patches[names.index("color"), 1, 5] == 4
    assert patches[names.index("size"), 1, 5] == 2 and patches[names.index("size"), 0, 0] == -100
    # The circle of radius 20 around (90, 20) holds the middles at x = 72, 88, 104 of the rows y = 8 and 24, all but
    # (72, 8), and none of y = 40. The speck holds no middle: its own patch stands in.
    circle = patches[names.index("shape"), 1].view(4, 4)
    inside = [[math.hypot(72 + 16 * c - 90, 8 + 16 * r - 20) <= 20 for c in range(4)] for r in range(4)]
    assert torch.equal(circle == 3, torch.tensor(inside)) and circle.count_nonzero() == 5
    assert patches[names.index("shape"), 0].tolist() == [1] + [0] * 15
    assert patches[names.index("center")].nonzero().tolist() == [[0, 0], [1, 5]]
    assert patches[names.index("same"), 1, 5] == 1 and patches[names.index("same_shape")].max() == 1
    assert counts[0] == 2 and counts[1 + 3] == 1 and counts.sum() == 6


def test_tile_embeddings_stay_as_metas_layout_holds_them() -> None:
    model = VisionLanguageModel(ModelConfig(VISION, dataclasses.replace(TEXT, vocab_size=32), 32))
    initialise(model, torch.randn(20, 3, 64, 64))
    share_between_ratios(model.vision)
    optimizer = torch.optim.AdamW(model.vision.parameters(), lr=0.1)
    images = [ImageLayout(1, 1), ImageLayout(1, 2), ImageLayout(2, 1), ImageLayout(2, 2)]
    for _ in range(3):
        tiles = torch.randn(sum(i.num_tiles for i in images), 3, 64, 64)
        model.vision(tiles, images, deduplicate=True).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.vision.padding_tiles_are_equal()
    table = model.vision.pre_tile_embedding
    assert table[1, 0].abs().max() > 0
    ids = {pair: 1 + i for i, pair in enumerate(VISION.aspect_ratios)}
    assert torch.equal(table[ids[1, 1], 0], table[ids[2, 2], 0])  # row 0, column 0
    assert torch.equal(table[ids[1, 2], 1], table[ids[2, 2], 1])  # row 0, column 1
    assert torch.equal(table[ids[2, 1], 1], table[ids[2, 2], 2])  # row 1, column 0


def test_fresh_heads_look_at_the_next_patch_also_across_tiles() -> None:
    torch.manual_seed(0)
    vision = TiledVisionConfig(128, 128, 2, 1, 4, 3, 64, 16, 4, (1,))
    model = VisionLanguageModel(ModelConfig(vision, dataclasses.replace(TEXT, vocab_size=32), 32))
    tiles = torch.randn(64, 3, 64, 64)
    initialise(model, tiles)
    encoder, attention = model.vision, model.vision.layers[0].attention
    ids = torch.tensor([1 + vision.aspect_ratios.index((1, 2))])
    x = encoder.pre_norm(encoder._embed(torch.randn(1, 2, 3, 64, 64), ids, 0)).flatten(1, 2)
    x = model.vision.layers[0].attention_norm(x)
    q, k = (split_heads(proj(x), 4)[0] for proj in (attention.q_proj, attention.k_proj))

    def token(row: int, column: int) -> int:
        return column // 4 * 17 + 1 + row * 4 + column % 4

    for head, (down, right) in enumerate(((0, 1), (0, -1), (1, 0), (-1, 0))):
        chosen = (q[head] @ k[head].T).argmax(-1)
        for row, column in ((1, 1), (2, 3), (1, 4), (2, 6)):
            assert chosen[token(row, column)] == token(row + down, column + right)


def test_the_patch_embedding_starts_as_a_whitening() -> None:
    torch.manual_seed(0)
    vision = TiledVisionConfig(96, 128, 2, 1, 4, 3, 64, 16, 4, (1,))
    model = VisionLanguageModel(ModelConfig(vision, dataclasses.replace(TEXT, vocab_size=32), 32))
    tiles = torch.nn.functional.interpolate(torch.randn(400, 3, 8, 8), size=(64, 64), mode="bicubic")  # smooth
    initialise(model, tiles)
    embedded = model.vision.patch_embedding(model.vision.patches(tiles)).flatten(0, 1)
    strengths = torch.linalg.eigvalsh(embedded.T @ embedded / len(embedded)).flip(0)
    # 96 - 24 free directions, the strong patterns among them (12 a channel) nearly equal; the places' stay empty.
    assert strengths[:30].min() > 0.7 and strengths[0] < 1.01 and strengths[72:].max() < 1e-5


def test_sheets_ask_what_is_where_and_nothing_about_the_picture_as_a_whole(tmp_path: Path) -> None:
    one = recipe(tmp_path, sheet_steps=1, data=WorldData(samples_per_step=4, sheets_per_step=6, workers=0))
    config, tokenizer, _ = prepare(one)
    (sheets,), after = WorldSteps(one, config, tokenizer)[0], WorldSteps(one, config, tokenizer)[1]
    names = list(PATCH_HEADS)
    assert len(sheets.inputs.images) == 6 and (sheets.labels == IGNORED).all()
    assert (sheets.targets.patches[names.index("shape")] > 0).any() and (sheets.targets.counts == IGNORED).all()
    for name in ("value", "same", "same_color", "same_shape"):
        assert (sheets.targets.patches[names.index(name)] == IGNORED).all()
    placed, chars = (sheets.targets.patches[names.index(name)] for name in ("index", "char"))
    assert (placed > 0).any() and ((placed > 0) <= (chars > 0)).all() and not (placed == 0).any()  # words only
    assert sum(batch.inputs.tokens.shape[0] for batch in after) == 4


def test_sheets_beside_a_steps_samples_are_for_the_encoder_alone(tmp_path: Path) -> None:
    data = WorldData(samples_per_step=4, sheets_beside=3, workers=0)
    one = recipe(tmp_path, steps=1, vision_steps=0, data=data)
    config, tokenizer, _ = prepare(one)
    first, *others = WorldSteps(one, config, tokenizer)[0]
    assert len(first.inputs.images) == 3 and (first.labels == IGNORED).all()
    assert all((batch.labels != IGNORED).any(1).all() for batch in others)
    seen: list[Progress] = []
    loop.train(one, seen.append)
    assert seen[0].values["answer_loss"] > 0 and seen[0].values["auxiliary_loss"] > 0


def test_a_run_starts_from_saved_weights(tmp_path: Path) -> None:
    first = recipe(tmp_path / "first", steps=2, vision_steps=0)
    loop.train(first, lambda _: None)
    folder, file = loop.export(first), tmp_path / "first" / "tokenizer.json"
    model, _ = load(folder, dtype=torch.float32)
    frozen = WorldOptim(learning_rate=0.0, warmup_steps=1, decay_steps=1)
    # Another seed would choose other words for the vocabulary, and the embeddings would belong to none of them.
    second = recipe(tmp_path / "second", steps=1, start_from=str(folder), optim=frozen, seed=5)
    loop.train(second, lambda _: None)
    assert (tmp_path / "second" / "tokenizer.json").read_bytes() == file.read_bytes()
    for name, value in weights(second).items():
        assert torch.equal(value, dict(model.named_parameters())[name]), name
    wider = dataclasses.replace(TEXT, intermediate_size=64)
    with pytest.raises(ConfigError, match=r"differs from the recipe in text.intermediate_size \(48, not 64\)"):
        loop.train(dataclasses.replace(second, output=str(tmp_path / "third"), text=wider), lambda _: None)
