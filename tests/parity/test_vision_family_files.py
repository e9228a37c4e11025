"""The files of LLaVA, LLaVA-NeXT, Idefics3 and SmolVLM: what is saved and converted, what published configurations say,
and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families_for_tests import KINDS, Kind, Pair, conversations, images_of, pair, peer, picture, said
from published_for_tests import PUBLISHED
from safetensors.torch import load_file, save_file

import llama_multimodal as lmm
from llama_multimodal import cli
from llama_multimodal.cli import common
from llama_multimodal.config import MLPProjector, ModelConfig, PixelShuffleProjector, config_from_hf, config_to_hf
from llama_multimodal.errors import CheckpointError, ConfigError, PromptError
from llama_multimodal.quant.pack import Packing
from llama_multimodal.weights.checkpoint import parameter_shapes
from llama_multimodal.weights.convert import convert
from llama_multimodal.weights.io import SafetensorsFile
from llama_multimodal.weights.rules import same_bits
from llama_multimodal.weights.save import save_checkpoint
from llama_multimodal.zoo.configs import CONFIGS

FEW = ["LLaVA", "LLaVA, SigLIP", "LLaVA, DINOv2", "LLaVA-NeXT", "Idefics3", "SmolVLM, tied"]


pytestmark = pytest.mark.usefixtures("one_thread")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def released(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names of the released files, where transformers 5 leaves out what SigLIP's and CLIP's begin with."""
    wrapped = re.compile(r"^vision_tower\.(?=(embeddings\.(?!cls)|encoder\.layers|pre_layrnorm|post_layernorm|head\.))")
    if any(".embeddings.cls_token" in name for name in tensors):  # DINOv2
        return dict(tensors)
    return {wrapped.sub("vision_tower.vision_model.", name): value for name, value in tensors.items()}


# --- written and read again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_transformers_reads_what_is_saved(name: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    both, conversation = pairs(name), conversations()["several"]
    save_checkpoint(both.ours, tmp_path, tokenizer_from=both.folder, max_shard_size=40_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, info = type(both.theirs).from_pretrained(tmp_path, output_loading_info=True)
    if both.kind.vision.get("model_type") == "dinov2_with_registers":  # it always has one, for training
        info["missing_keys"].remove("model.vision_tower.embeddings.mask_token")
    assert not any(info.values()), info
    inputs = both.their_inputs(conversation)
    with torch.inference_mode():
        assert torch.equal(again.eval()(**inputs).logits, both.theirs(**inputs).logits)
    ours, processor = lmm.load(tmp_path, dtype=torch.float32)
    assert ours.config == both.ours.config
    mine = processor(conversation)
    assert torch.equal(mine.tokens, inputs["input_ids"])
    assert torch.equal(ours(mine).logits, both.ours(mine).logits)


@pytest.mark.parametrize("name", FEW)
def test_every_key_that_is_written_means_something_there(
    name: str, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    """transformers keeps a key that it does not know, without a word."""
    both = pairs(name)
    save_checkpoint(both.ours, tmp_path)
    written, theirs = json.loads((tmp_path / "config.json").read_text()), both.theirs.config.to_dict()
    renamed = {"torch_dtype", "rope_scaling", "rope_theta"}  # as in their version 4
    own = {"tie_word_embeddings", "use_mask_token"}  # in the text's table too, as version 4 looks there; not stored
    for table, known in [(written, theirs), *((written[key], theirs[key]) for key in ("text_config", "vision_config"))]:
        assert table.keys() <= known.keys() | renamed
        same = {key: value for key, value in table.items() if isinstance(value, int | float | str | bool)}
        same = {key: value for key, value in same.items() if key in known and key not in own}
        assert same == {key: known[key] for key in same}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FEW)
def test_converted_tensors_are_the_same(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = peer(KINDS[name]).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    convert(tmp_path / "theirs", tmp_path / "ours", "hf")
    before, after = released(stored(tmp_path / "theirs")), stored(tmp_path / "ours")
    before = {name: value for name, value in before.items() if not name.endswith("mask_token")}  # training's
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True, dtype=dtype)
    assert not any(info.values())
    states = theirs.state_dict(), again.state_dict()
    assert all(same_bits(states[0][name], value) for name, value in states[1].items())


def test_the_command_converts(
    pairs: Callable[[str], Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "bind_threads", lambda: False)  # it would outlive the test
    both = pairs("SmolVLM")
    for layout, code in (("hf", 0), ("meta", 2)):
        with pytest.raises(SystemExit) as exit:
            cli.main(["convert", str(both.folder), str(tmp_path / layout), "--layout", layout])
        assert (exit.value.code or 0) == code
    assert "Meta's layout is read and written for Llama 3.2 Vision only" in capsys.readouterr().err
    ours, processor = lmm.load(tmp_path / "hf", dtype=torch.float32)
    inputs = processor(conversations()["several"])
    assert torch.equal(ours(inputs).logits, both.ours(inputs).logits)


@pytest.mark.parametrize("name", FEW)
def test_metas_layout_holds_none_of_them(name: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    both = pairs(name)
    for write in (
        lambda: convert(both.folder, tmp_path / "converted", "meta"),
        lambda: save_checkpoint(both.ours, tmp_path / "saved", "meta"),
    ):
        with pytest.raises(CheckpointError, match=r"Llama 3\.2 Vision only; choose the layout hf"):
            write()
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize("name", ["LLaVA", "LLaVA, SigLIP", "LLaVA-NeXT", "SmolVLM"])
@pytest.mark.parametrize("shards", [1, 3])
def test_names_of_released_files(shards: int, name: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """With tables of numbers that files once held, in shards."""
    both = pairs(name)
    folder = shutil.copytree(both.folder, tmp_path / "released")
    tensors = released(stored(folder))
    (folder / "model.safetensors").unlink()
    if not both.kind.of_squares:
        assert "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight" in tensors
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(tensors)
    files = {names[i]: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i in range(len(names))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    ours, processor = lmm.load(folder, dtype=torch.float32)
    inputs = processor(conversations()["several"])
    assert torch.equal(ours(inputs).logits, both.ours(inputs).logits)


@pytest.mark.parametrize("name", ["LLaVA, SigLIP", "LLaVA-NeXT", "Idefics3", "SmolVLM, tied"])
def test_packed_files(name: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """They load again with the same logits, and their configuration names the packed layers, and no others."""
    both, conversation = pairs(name), conversations()["several"]
    packed, processor = lmm.load(both.folder, dtype=torch.float32, pack=Packing("int8", group=16))
    inputs = processor(conversation)
    assert 0 < (packed(inputs).logits - both.ours(inputs).logits).abs().max() < 1
    assert len(lmm.generate(packed, inputs, lmm.SamplingParams(max_new_tokens=8, temperature=0.0)).token_ids[0]) == 8
    save_checkpoint(packed, tmp_path, tokenizer_from=both.folder)
    again, processor = lmm.load(tmp_path, dtype=torch.float32)
    if packed.config.text.tie_word_embeddings:  # files hold the embedding, from which the head was packed
        packed.decoder.lm_head = again.decoder.lm_head
    assert torch.equal(again(processor(conversation)).logits, packed(inputs).logits)

    table = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    targets = [target for group in table["config_groups"].values() for target in group["targets"]]
    linear = [path for path, layer in both.theirs.named_modules() if isinstance(layer, torch.nn.Linear)]
    named = {path for path in linear if _any(targets, path) and not _any(table["ignore"], path)}
    decoder = {path for path in linear if "language_model" in path or "text_model" in path}
    assert named == decoder | (set() if packed.config.text.tie_word_embeddings else {"lm_head"})


def _any(patterns: list[str], path: str) -> bool:
    return any(re.match(pattern.removeprefix("re:"), path) for pattern in patterns)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 0x4B50])
def test_a_header_that_is_as_long_as_a_pickle_begins(length: int, tmp_path: Path) -> None:
    """The first two bytes of such a file are those of a pickle, or of a zip archive."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(length)
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + header.encode() + struct.pack("<f", 5.0))
    assert torch.equal(load_file(tmp_path / "file")["a"], torch.tensor([5.0]))
    assert torch.equal(SafetensorsFile(tmp_path / "file").tensor("a"), torch.tensor([5.0]))


# --- what configurations mean ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name: str) -> None:
    raw, count = PUBLISHED[name]
    config = config_from_hf(raw)
    assert isinstance(config, ModelConfig) and config.fusion == "splice"
    assert CONFIGS.get(name, config) == config
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == count
    side = config.vision.image_size
    tokens = {"llava": 576, "llava_next": 576, 364: 169, 384: 81, 512: 64}
    assert config.num_tokens(side, side) == tokens.get(raw["model_type"], tokens.get(side))
    theta = (raw["text_config"].get("rope_theta"), config.text.rope_theta)
    assert theta[0] == theta[1] or theta == (None, 10000.0)


@pytest.mark.parametrize("family", ["Llava", "LlavaNext", "Idefics3", "SmolVLM"])
def test_keys_that_a_file_leaves_out(family: str) -> None:
    """They mean what they mean there, where a table that is empty is not one that is missing."""
    made = getattr(transformers, f"{family}Config")
    raw = {"model_type": made.model_type, "text_config": {"vocab_size": 128258}, "vision_config": {}}
    if family != "Idefics3":
        raw["text_config"]["model_type"] = "llama"
    if family.startswith("Llava"):
        raw["vision_config"]["patch_size"] = 16
    elif family == "SmolVLM":
        raw["scale_factor"] = 7
    else:
        raw["vision_config"]["patch_size"] = 14
    theirs, config = made.from_dict(copy.deepcopy(raw)), config_from_hf(raw)
    assert isinstance(config, ModelConfig)
    vision, text = theirs.vision_config, theirs.text_config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in (*sizes, "image_size", "patch_size", "num_channels", "hidden_act"):
        assert getattr(config.vision, name) == getattr(vision, name), name
    assert config.vision.norm_eps == vision.layer_norm_eps
    for name in (*sizes, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "vocab_size"):
        assert getattr(config.text, name) == getattr(text, name), name
    assert config.text.rope_theta == text.rope_parameters["rope_theta"]
    assert config.text.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.image_token_id == theirs.image_token_id
    if family.startswith("Llava"):
        assert [list(pair) for pair in config.grid_pinpoints] == getattr(theirs, "image_grid_pinpoints", [])
        assert config.vision.layer == theirs.vision_feature_layer and not config.vision.with_class_token
        projector = MLPProjector(theirs.multimodal_projector_bias, theirs.projector_hidden_act)
    else:
        projector = PixelShuffleProjector(theirs.scale_factor)
    assert config.projector == projector


def test_a_projector_of_another_width_is_refused_for_llavas_files(pairs: Callable[[str], Pair]) -> None:
    """The files have no key for it; our own do."""
    config = pairs("LLaVA").ours.config
    same = dataclasses.replace(config.projector, hidden_size=config.text.hidden_size)
    assert config_to_hf(dataclasses.replace(config, projector=same)) == config_to_hf(config)
    other = dataclasses.replace(config, projector=dataclasses.replace(config.projector, hidden_size=7))
    with pytest.raises(ConfigError, match=r'7 wide between; give the configuration model_type="llama_multimodal"'):
        config_to_hf(other)
    own = dataclasses.replace(other, model_type="llama_multimodal")
    assert config_from_hf(config_to_hf(own)) == own


def change(source: Path, folder: Path, changes: Mapping[str, Any], file: str = "config.json") -> Path:
    """A copy of a checkpoint with other values in a file; by a dotted name within a table, None for no such key."""
    shutil.copytree(source, folder)
    raw = json.loads((folder / file).read_text())
    for name, value in changes.items():
        *tables, key = name.split(".")
        table = functools.reduce(lambda table, key: table[key], tables, raw)
        table[key] = value
        if value is None:
            del table[key]
    (folder / file).write_text(json.dumps(raw))
    return folder


def test_mistrals_decoder(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    both, context = pairs("LLaVA-NeXT, Mistral"), 1024
    for i, window in enumerate((context, 5000, None)):  # None: its default, 4096
        folder = change(both.folder, tmp_path / str(i), {"text_config.sliding_window": window})
        assert lmm.load(folder, device="meta")[0].config == both.ours.config
    folder = change(both.folder, tmp_path / "short", {"text_config.sliding_window": context - 1})
    with pytest.raises(ConfigError, match=r"sliding_window is 1023 .* less than the context of 1024 \(max_pos"):
        lmm.load(folder)
    long = {"text_config.sliding_window": None, "text_config.max_position_embeddings": 8192}
    with pytest.raises(ConfigError, match=r"sliding_window is 4096 .* less than the context of 8192"):
        lmm.load(change(both.folder, tmp_path / "long", long))
    bare = {**PUBLISHED["llava-hf/llava-v1.6-mistral-7b-hf"][0], "text_config": {"model_type": "mistral"}}
    theirs = transformers.MistralConfig()
    with pytest.raises(ConfigError, match="sliding_window is 4096"):
        config_from_hf(bare)
    bare["text_config"] |= {"sliding_window": None, "vocab_size": 32001}
    text = config_from_hf(bare).text
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for name in (*names, "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id"):
        assert getattr(text, name) == getattr(theirs, name), name
    assert text.rope_theta == theirs.rope_parameters["rope_theta"] and text.rope_scaling is None
    save_checkpoint(both.ours, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["text_config"]["model_type"] == "llama"


@pytest.mark.parametrize("family", ["Llava", "LlavaNext", "Idefics3"])
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("within", [True, False])
def test_tied_embeddings_are_where_transformers_looks(family: str, beside: bool, within: bool, tmp_path: Path) -> None:
    """Beside the decoder's table, and for LLaVA 1.5 also in it."""
    kinds = {"Llava": KINDS["LLaVA"], "LlavaNext": KINDS["LLaVA-NeXT"], "Idefics3": KINDS["Idefics3"]}
    kind = kinds[family]
    text, more = {**kind.text, "tie_word_embeddings": within}, {**kind.more, "tie_word_embeddings": beside}
    both = pair(Kind(family, kind.vision, text, more, True, kind.places), tmp_path)
    tied = both.theirs.lm_head.weight is both.theirs.get_input_embeddings().weight
    assert both.ours.config.text.tie_word_embeddings == tied
    conversation = conversations()["one"]
    with torch.inference_mode():
        expected = both.theirs(**both.their_inputs(conversation)).logits
        assert (both.ours(both.our_processor(conversation)).logits - expected).abs().max() < 1e-4


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("LLaVA", {"projector_hidden_act": "relu"}, 'hidden_act "relu" is not implemented; supported: gelu, gelu_py'),
    (
        "LLaVA",
        {"vision_feature_layer": [-2, -1]},
        r"vision_feature_layer is \[-2, -1\]; features of one layer",
    ),
    ("LLaVA", {"vision_feature_layer": 4}, "vision_config: ClipVisionConfig: layer must lie between -4 and 3, not 4"),
    ("LLaVA", {"vision_feature_select_strategy": "cls"}, 'select_strategy "cls" is not implemented; default, full'),
    ("LLaVA", {"model_type": "llava_nex"}, 'model_type "llava_nex"; supported: .* did you mean "llava_next"'),
    (
        "LLaVA",
        {"text_config.model_type": "qwen2"},
        'text_config: model_type "qwen2" is not .* supported: llama',
    ),
    (
        "LLaVA",
        {"vision_config.model_type": "pixtral"},
        'vision_config: model_type "pixtral" is no encoder; sup',
    ),
    ("LLaVA", {"vision_config": None}, "vision_config is missing or not a table"),
    ("LLaVA", {"image_token_index": "<image>"}, "image_token_id must be a whole number, not '<image>'"),
    ("LLaVA", {"image_token_index": 5000}, r"image_token_id must be under \d+, the embedding's rows"),
    ("LLaVA", {"quantization_config": {"quant_method": "awq"}}, 'quantized as "awq"'),
    ("LLaVA", {"projector_hidden_acts": "gelu"}, 'unknown key "projector_hidden_acts"; did you mean "projector_hid'),
    ("LLaVA, SigLIP", {"vision_feature_select_strategy": "default"}, "SigLIP has no class token to leave out"),
    ("LLaVA-NeXT", {"vision_feature_select_strategy": "full"}, "grid_pinpoints need patches alone, and no class token"),
    (
        "LLaVA-NeXT",
        {"use_image_newline_parameter": False},
        "use_image_newline_parameter is False; this model needs",
    ),
    (
        "LLaVA-NeXT",
        {"text_config.rope_parameters.rope_type": "yarn"},
        'rope type "yarn" is not implemented; suppor',
    ),
    (
        "Idefics3",
        {"vision_config.model_type": "clip_vision_model"},
        '"clip_vision_model" is no encoder of idefics3',
    ),
    ("Idefics3", {"scale_factor": 3}, "4 × 4 patches do not divide by 3; scale_factor 2, linear or mlp would fit"),
    ("Idefics3", {"scale_factor": 0}, "scale_factor must be at least 1"),
    ("SmolVLM", {"text_config.qk_layer_norms": True}, "qk_layer_norms is True; this model needs False"),
    ("SmolVLM", {"vision_config.num_patches": 9}, 'vision_config: unknown key "num_patches"'),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=[str(changes) for _, changes, _ in REFUSED])
def test_configurations_that_are_refused(
    name: str, changes: dict[str, Any], message: str, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    folder = change(pairs(name).folder, tmp_path / "changed", changes)
    with pytest.raises(ConfigError, match=message) as caught:
        lmm.load(folder)
    assert "\n" not in str(caught.value)


PREPROCESSING: list[tuple[dict[str, Any], str]] = [
    ({"longest_edge": 64}, 'preprocessor_config.json .SmolVLMImageProcessor.: unknown key "longest_edge"'),
    (
        {"image_processor_type": "PixtralImageProcessor"},
        "image_processor_type PixtralImageProcessor is not impl",
    ),
    ({"max_image_size": {"longest_edge": 76}}, "squares of 76 pixels, and the model's encoder is for 38"),
    ({"do_resize": "yes"}, "do_resize must be true or false, not 'yes'"),
]


@pytest.mark.parametrize(("changes", "message"), PREPROCESSING, ids=[str(changes) for changes, _ in PREPROCESSING])
def test_preprocessing_that_is_refused(
    changes: dict[str, Any], message: str, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    folder = change(pairs("SmolVLM").folder, tmp_path / "changed", changes, "preprocessor_config.json")
    with pytest.raises(ConfigError, match=message):
        lmm.load(folder)


def test_no_chat_template(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    folder = shutil.copytree(pairs("LLaVA").folder, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    _, processor = lmm.load(folder)
    with pytest.raises(PromptError, match=r"no chat template \(chat_template.jinja, .*\): a base model continues text"):
        processor([said("user", "hello")])
    assert processor.encode_tokens([[0, 5]]).tokens.tolist() == [[0, 5]]


def test_a_chat_template_without_pictures(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    folder = shutil.copytree(pairs("LLaVA").folder, tmp_path / "text")
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['content'] }}{% endfor %}no image"
    )
    _, processor = lmm.load(folder)
    with pytest.raises(PromptError, match="chat template wrote 0 image tokens for 1 images"):
        processor([said("user", picture(9, 9))])


def test_no_tokenizer(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """Rows that are spelt out need none; what goes around a picture of Idefics3's does."""
    both = pairs("Idefics3")
    folder = shutil.copytree(both.folder, tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    _, processor = lmm.load(folder)
    conversation = conversations()["several"]
    expected, pictures = both.our_processor(conversation), images_of(conversation)
    assert torch.equal(processor.encode_tokens(expected.tokens.tolist(), [pictures]).tokens, expected.tokens)
    with pytest.raises(PromptError, match=r"has neither tokenizer\.json nor"):
        processor.encode_tokens([[processor.config.image_token_id]], [pictures[:1]])
