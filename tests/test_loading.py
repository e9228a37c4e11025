"""`load`: layouts, dtypes, devices, and everything that can be wrong with a name."""

from __future__ import annotations

import errno
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llama_multimodal as lmm
from llama_multimodal import loading
from llama_multimodal.config import config_to_hf
from llama_multimodal.errors import CheckpointError, DeviceError
from llama_multimodal.quant.pack import Packing
from llama_multimodal.weights.convert import convert
from llama_multimodal.weights.io import write_json
from llama_multimodal.weights.save import save_checkpoint

HERE = Path(__file__).parent
META = HERE / "golden" / "mllama"
INSTRUCT = "meta-llama/Llama-3.2-11B-Vision-Instruct"

sys.path += [str(HERE / "processing"), str(HERE / "weights")]
from checkpoints_for_tests import CONFIG, edit_json, random_model  # noqa: E402
from tokenizers_for_tests import TEXT, train_ranks, write_ranks  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "fp32", "bf16", "torch.float16"])
def test_dtypes(dtype: torch.dtype | str) -> None:
    model, processor = lmm.load(META, dtype=dtype)
    wanted = loading.pick_dtype(dtype)
    assert {value.dtype for value in model.parameters()} == {wanted}
    exact = torch.load(META / "consolidated.00.pth", weights_only=True)["text_model.norm.weight"]
    assert torch.equal(model.decoder.norm.weight, exact.to(wanted))
    assert not model.training and processor.tokenizer is None


def test_the_checkpoints_own_dtype_and_progress(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    model, _ = lmm.load(META, progress=lambda done, total: calls.append((done, total)))
    assert model.dtype == torch.bfloat16
    assert calls == sorted(calls) and calls[-1] == (2 * sum(p.numel() for p in model.parameters()),) * 2
    convert(META, tmp_path, "hf")
    assert lmm.load(str(tmp_path))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype, format", [("bf16", "bf16"), ("fp32", None)])
def test_automatic_packing_loses_nothing(tmp_path: Path, dtype: str, format: str | None) -> None:
    model, _ = lmm.load(META, dtype=dtype, pack="auto")
    assert getattr(model.decoder.lm_head, "format", None) == format
    packed, _ = lmm.load(META, dtype="bf16", pack=Packing("int8", 16))
    save_checkpoint(packed, tmp_path)
    again, _ = lmm.load(tmp_path, dtype=dtype, pack="auto")
    assert again.decoder.lm_head.format == "int8"


def test_the_meta_device_reads_nothing() -> None:
    model, _ = lmm.load(META, device="meta")
    assert all(value.is_meta for value in model.parameters())


def test_text_and_picture_through_a_loaded_model() -> None:
    from PIL import Image

    model, processor = lmm.load(META, dtype=torch.float32)
    image = Image.new("RGB", (100, 60), "red")
    inputs = processor.encode_tokens([[1, 256, 5], [3]], images=[[image], []])
    assert model(inputs).logits.shape == (2, 3, 256)
    out = lmm.generate(model, inputs, lmm.SamplingParams(max_new_tokens=3, temperature=0.0))
    assert [len(ids) for ids in out.token_ids] == [3, 3] and out.texts is None


def test_a_vision_models_template_is_not_read(tmp_path: Path) -> None:
    """Its conversations are written as Meta's reference does; a text model's file would be an error."""
    convert(META, tmp_path, "hf")
    (tmp_path / "chat_template.json").write_text("{")
    assert lmm.load(tmp_path)[1].template is None


def test_end_tokens_come_from_the_tokenizer_where_no_file_states_them(tmp_path: Path) -> None:
    """Meta's params.json has none; the embedding has rows for the tokenizer's."""
    vocab = 512  # 256 bytes and 256 special tokens
    text = replace(CONFIG.text, vocab_size=vocab, bos_token_id=0, eos_token_ids=(), pad_token_id=0)
    model = random_model(replace(CONFIG, text=text, image_token_id=vocab))
    lmm_save(model, tmp_path)
    assert lmm.load(tmp_path)[0].config.text == text
    write_ranks(train_ranks(TEXT, 256), tmp_path / "tokenizer.model")
    found = lmm.load(tmp_path)[0].config.text
    assert (found.bos_token_id, found.eos_token_ids, found.pad_token_id) == (256, (257, 264, 265), 260)


def lmm_save(model: Any, folder: Path) -> None:
    from llama_multimodal.weights.save import save_checkpoint

    save_checkpoint(model, folder, "meta")


def test_an_original_folder_inside_a_repository(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    for file in META.iterdir():
        (tmp_path / "original" / file.name).symlink_to(file)
    assert lmm.load(tmp_path)[0].config.vision.hidden_size == 80


def test_a_padding_token_without_an_embedding_is_replaced(tmp_path: Path) -> None:
    convert(META, tmp_path, "hf")
    for file in ("config.json", "generation_config.json"):
        edit_json(tmp_path / file, lambda raw: raw.get("text_config", raw).update(pad_token_id=128004))
    assert lmm.load(tmp_path)[0].config.text.pad_token_id == 0


@pytest.mark.parametrize("device", ["cuda:77", "no-such-device", "npu", "", 3.5])
def test_devices_that_are_not_there(device: Any) -> None:
    with pytest.raises(DeviceError, match=r"is not there; this machine has cpu"):
        lmm.load(META, device=device)


@pytest.mark.parametrize("dtype", ["int8", torch.int8, torch.float64, "float8", torch.float8_e4m3fn, "x"])
def test_dtypes_that_are_not_there(dtype: Any) -> None:
    with pytest.raises(DeviceError, match="float32, bfloat16 or float16"):
        lmm.load(META, dtype=dtype)


def test_not_enough_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    from llama_multimodal.weights import checkpoint

    opened = checkpoint.open_checkpoint(META)
    model = checkpoint.build_on_meta(opened.config)
    monkeypatch.setattr(checkpoint, "build_on_meta", lambda config: model)
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(DeviceError, match=r"cpu has not enough memory for this model's 0\.0 GiB in torch.float32"):
        checkpoint.read_model(opened, torch.float32, torch.device("cpu"))


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tinny", 'did you mean "tiny"'),
        ("Llama-3.2-11B-Vision-Instrct", f'did you mean "{INSTRUCT}"'),
        ("qwertz", "known: tiny, meta-llama"),
        ("./nowhere", "no folder and no model"),
        ("/nowhere/at/all", "no folder and no model"),
        ("~nobody-of-that-name/x/y", "not a folder|no folder"),
        ("a/b/c", "no folder and no model"),
        ("", "no folder and no model|holds no checkpoint"),
        ("x" * 5000, "no folder|not a folder"),
        ("zero\0byte", "no folder|not a folder"),
        (Path("no/where"), "no folder and no model"),
    ],
)
def test_unknown_names(name: Any, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=hint) as caught:
        lmm.load(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_file_instead_of_a_folder() -> None:
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        lmm.load(META / "params.json")


def test_the_embedded_model_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "EMBEDDED_FOLDER", tmp_path / "tiny")
    with pytest.raises(CheckpointError, match="the embedded model is not in this copy; install"):
        lmm.load("tiny")
    convert(META, tmp_path / "tiny", "hf")
    assert lmm.load("tiny")[0].config.vision.hidden_size == 80


# --- the hub, by what its client raises ------------------------------------------------------------------------------


class Response:
    """As much of an HTTP answer as the client's errors look at."""

    def __init__(self, status_code: int) -> None:
        self.status_code, self.headers, self.request = status_code, {}, None


def hub_error(name: str, status: int) -> Exception:
    import huggingface_hub.errors as errors

    error = getattr(errors, name).__new__(getattr(errors, name))
    Exception.__init__(error, f"{status} Client Error.\n\nmany\nlines")
    error.response = Response(status)
    return error


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    import huggingface_hub

    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def chained() -> Exception:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as cause:
            raise RuntimeError("Data processing error: CAS service error") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: hub_error("GatedRepoError", 401), rf"gated: accept its licence on https://huggingface.co/{INSTRUCT}"),
        (lambda: hub_error("GatedRepoError", 403), r"`hf auth login` or set HF_TOKEN"),
        (lambda: hub_error("RepositoryNotFoundError", 401), r"neither a folder .* nor a public repository"),
        (lambda: hub_error("HfHubHTTPError", 401), r"access to .* was refused \(401\).*HF_TOKEN"),
        (lambda: hub_error("HfHubHTTPError", 503), r"answered 503 .*; try again later"),
        (lambda: hub_error("HFValidationError", 0), r"nor a valid hub id"),
        (lambda: ConnectionError("no route"), r"cannot be reached; check the network"),
        (lambda: __import__("huggingface_hub").errors.LocalEntryNotFoundError("x"), r"cannot be reached; check the"),
        (lambda: __import__("huggingface_hub").errors.OfflineModeIsEnabled("x"), r"cannot be reached; check the"),
        (lambda: TimeoutError(), r"cannot be reached"),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), r"disk is full while downloading"),
        (chained, r"disk is full while downloading"),
        (lambda: RuntimeError("IO Error: No space left on device (os error 28)"), r"disk is full while downloading"),
        (lambda: PermissionError(13, "Permission denied"), r"set HF_HOME to a folder that can"),
    ],
)
def test_hub_errors(error: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, error())
    with pytest.raises(CheckpointError, match=message) as caught:
        lmm.load(INSTRUCT)
    assert "\n" not in str(caught.value)


def test_a_misspelt_id_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, hub_error("RepositoryNotFoundError", 401))
    with pytest.raises(CheckpointError, match=f'did you mean "{INSTRUCT}"'):
        lmm.load("meta-lama/Llama-3.2-11B-Vision-Instruct")


def test_a_download_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    convert(META, tmp_path, "hf")
    asked = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert lmm.load(INSTRUCT)[0].config.vision.hidden_size == 80
    assert asked["repo_id"] == INSTRUCT and asked["ignore_patterns"] == ["*/*"]  # not Meta's copy, 21 GB more


def test_a_config_of_another_model(tmp_path: Path) -> None:
    convert(META, tmp_path, "hf")
    write_json(tmp_path / "config.json", {**config_to_hf(CONFIG), "model_type": "qwen2_vl"})
    with pytest.raises(lmm.UserError, match='model_type "qwen2_vl"; supported: mllama, llama, llava, llava_next'):
        lmm.load(tmp_path)
