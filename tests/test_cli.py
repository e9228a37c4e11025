"""The command line, driven in-process through `main`, with a small random model where one is needed."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from llama_multimodal import cli
from llama_multimodal.cli import common, doctor
from llama_multimodal.errors import CheckpointError, PromptError
from llama_multimodal.zoo import registry

QUESTION = "How many red circles are there?"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random model of a few thousand parameters, in Hugging Face's layout, with a tokenizer."""
    import torch

    from llama_multimodal.config import ModelConfig, TextConfig, TiledVisionConfig
    from llama_multimodal.models import VisionLanguageModel
    from llama_multimodal.processing.tokenizer import Tokenizer
    from llama_multimodal.weights.save import save_checkpoint
    from llama_multimodal.zoo.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    build_tokenizer([QUESTION, "There are 3 red circles."], 20).save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_json(folder / "tokenizer.json")
    config = ModelConfig(
        vision=TiledVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_global_layers=1, num_attention_heads=2,
            image_size=32, patch_size=8, max_num_tiles=4, intermediate_layers_indices=(1,),
        ),
        text=TextConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, cross_attention_layers=(0,), max_position_embeddings=256,
            rope_scaling=None, bos_token_id=tokenizer.special("<|begin_of_text|>"),
            eos_token_ids=(tokenizer.special("<|eot_id|>"),),
            pad_token_id=tokenizer.special("<|finetune_right_pad_id|>"),
        ),
        image_token_id=tokenizer.special("<|image|>"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = VisionLanguageModel(config)
    for name, parameter in model.named_parameters():
        if "tile_" not in name:  # Meta's layout cannot store any values there; zeros it can
            torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint(model, folder / "model", tokenizer_from=folder)
    return folder / "model"


@pytest.fixture
def photo(tmp_path) -> str:
    path = tmp_path / "photo.png"
    Image.new("RGB", (80, 40), "red").save(path)
    return str(path)


@pytest.fixture
def llama_mm(monkeypatch, capsys, tmp_path):
    """Run a command; gives exit code, stdout, stderr. `lines` is what is typed."""
    for name in ("bind_threads", "free_threads"):  # what they do would outlive the test
        monkeypatch.setattr(common, name, lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, lines: str = "") -> SimpleNamespace:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(code=exit.value.code or 0, out=captured.out, err=captured.err)

    return run


# --- the entry point -------------------------------------------------------------------------------------------------


def test_version(llama_mm):
    done = llama_mm("--version")
    assert (done.code, done.out) == (0, "llama-mm 0.1.0\n")


BAD = {
    "missing file": (["describe", "nope.png", "What?"], "nope.png does not exist"),
    "a folder": (["describe", "{folder}", "What?"], "is a folder"),
    "not an image": (["describe", "{text}", "What?"], "is not an image"),
    "empty file": (["describe", "{empty}", "What?"], "is empty"),
    "second image": (["describe", "{photo}", "What?", "--image", "nope.png"], "nope.png does not exist"),
    "address": (["describe", "https://example.com/a.png"], "is an address, not a file"),
    "empty question": (["describe", "{photo}", "  "], "the question is empty"),
    "empty model": (["describe", "{photo}", "--model", ""], "the model's name is empty"),
    "unknown dtype": (["describe", "{photo}", "--dtype", "bf61"], 'not in "bf61"'),
    "unknown packing": (["describe", "{photo}", "--pack", "int5"], 'not as "int5"'),
    "8-bit activations alone": (
        ["describe", "{photo}", "--model", "{checkpoint}", "--int8-activations"],
        "8-bit activations go with int8 or int4 weights",
    ),
    "unknown device": (["describe", "{photo}", "--device", "cdua"], 'the device "cdua" is not there'),
    "unsupported device": (["describe", "{photo}", "--device", "xla"], 'the device "xla" is not there'),
    "absent device": (["describe", "{photo}", "--device", "cuda:97"], 'the device "cuda:97" is not there'),
    "device without numbers": (["describe", "{photo}", "--device", "meta"], "holds no weights"),
    "temperature": (["describe", "{photo}", "--temperature", "-1"], "temperature must be 0 or more"),
    "not a number": (["describe", "{photo}", "--temperature", "nan"], "temperature must be"),
    "no tokens": (["describe", "{photo}", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
    "empty stop": (["describe", "{photo}", "--stop", ""], "stop must be made of strings that are not empty"),
    "seed": (["describe", "{photo}", "--seed", "99999999999999999999"], "seed must fit 64 bits"),
    "unknown model": (["describe", "{photo}", "--model", "nobody/nothing-at-all"], "nobody/nothing-at-all"),
    "empty model folder": (["describe", "{photo}", "--model", "{folder}"], "{folder}"),
    "long prompt": (["describe", "{photo}", "word " * 400, "--model", "{checkpoint}"], "context"),
    "chat image": (["chat", "--image", "nope.png"], "nope.png does not exist"),
    "no recipe": (["train", "nope.yaml"], "cannot read the recipe nope.yaml"),
    "not a recipe": (["train", "{text}"], "must be a table of settings"),
    "nothing to convert": (["convert", "nope", "{folder}/new", "--layout", "hf"], "nope"),
    "onto itself": (["convert", "{checkpoint}", "{checkpoint}", "--layout", "meta"], "is the source itself"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, llama_mm, tmp_path, photo, checkpoint):
    (tmp_path / "text.png").write_text("hello\n")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    places = {
        "photo": photo, "checkpoint": checkpoint, "folder": tmp_path / "folder", "text": tmp_path / "text.png",
        "empty": tmp_path / "empty.png",
    }  # fmt: skip
    arguments, message = BAD[case]
    done = llama_mm(*(argument.format(**places) for argument in arguments))
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert message.format(**places) in done.err


@pytest.mark.parametrize(
    "arguments", [["describe"], ["describe", "a.png", "--bogus"], ["nothing"], ["convert", "a", "b"]]
)
def test_wrong_usage(arguments, llama_mm):
    done = llama_mm(*arguments)
    assert done.code == 2 and done.out == "" and "Usage" in done.err


def test_debug_shows_where(llama_mm):
    assert "Traceback" not in llama_mm("describe", "nope.png").err
    for arguments in (["--debug", "describe", "nope.png"], ["describe", "nope.png", "--debug"]):
        done = llama_mm(*arguments)
        assert done.code == 2 and "Traceback" in done.err and done.err.endswith("check the path\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PromptError("too long"), 2, "error: too long\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "error: the disk is full (/x/y)"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: no permission to write or read (/x)"),
        (MemoryError(), 2, "error: out of memory; use --dtype bf16"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …"), 2, "error: out of memory"),
        (KeyError("a\nb"), 1, "error: unexpected KeyError: 'a\\nb'; run the same command with --debug"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(error, code, message, llama_mm, monkeypatch):
    def fail() -> None:
        raise error

    monkeypatch.setattr("llama_multimodal.cli.zoo.checkpoints", fail)
    done = llama_mm("zoo")
    assert done.code == code and done.out == ""
    assert done.err.startswith(message) and done.err.count("\n") <= 1
    assert message or not done.err


def test_threads_are_bound_where_each_has_a_core(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(common, "num_cores", lambda: 4)
    for threads, bound in ((None, True), ("4", True), ("8", False)):
        monkeypatch.delenv("OMP_PROC_BIND", raising=False)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if threads:
            monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert common.bind_threads() is bound
        assert os.environ.get("OMP_PROC_BIND") == ("true" if bound else None)
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    assert common.bind_threads() is None and os.environ["OMP_PROC_BIND"] == "close"


@pytest.mark.parametrize(
    ("bind", "places", "bound"),
    [
        (None, None, False),
        ("false", "cores", False),
        ("true", None, True),
        ("close", None, True),
        (None, "cores", True),
    ],
)
def test_threads_of_a_run_are_not_bound(monkeypatch, bind, places, bound):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name, value in (("OMP_PROC_BIND", bind), ("OMP_PLACES", places)):
        monkeypatch.setenv(name, value or "")  # so that it is put back
        if not value:
            monkeypatch.delenv(name)
    assert common.free_threads() is bound
    assert os.environ["OMP_PROC_BIND"] == "false"


# --- describe --------------------------------------------------------------------------------------------------------


def test_describe_json(llama_mm, photo, checkpoint):
    arguments = ["describe", photo, QUESTION, "--image", photo, "--model", checkpoint, "--max-new-tokens", 5, "--json"]
    done = llama_mm(*arguments)
    assert done.code == 0, done.err
    result = json.loads(done.out)  # nothing else on stdout
    assert set(result) == {
        "answer", "token_ids", "finish_reason", "prompt_tokens", "tiles", "timings", "question", "images", "model",
        "dtype", "device", "versions",
    }  # fmt: skip
    assert 1 <= len(result["token_ids"]) <= 5
    assert result["finish_reason"] in ("stop", "length")
    assert result["question"] == QUESTION and result["images"] == [photo, photo]
    assert len(result["tiles"]) == 2 and result["device"] == "cpu"
    assert set(result["versions"]) == {"llama_multimodal", "torch", "python"}
    assert {"load_seconds", "prepare_seconds", "first_token_seconds", "total_seconds", "tokens_per_second"} == set(
        result["timings"]
    )
    assert json.loads(llama_mm(*arguments).out)["token_ids"] == result["token_ids"]


def test_describe_streams_the_answer(llama_mm, photo, checkpoint):
    options = ["--model", checkpoint, "--max-new-tokens", "6", "--dtype", "fp32", "--temperature", "1", "--seed", "3"]
    plain = llama_mm("describe", photo, QUESTION, *options)
    answer = json.loads(llama_mm("describe", photo, QUESTION, *options, "--json").out)
    assert plain.code == 0 and plain.out == common.printable(answer["answer"]) + "\n"
    assert ("(cut after 6 tokens" in plain.err) == (answer["finish_reason"] == "length")


@pytest.mark.parametrize("command", ["describe", "chat", "eval"])
def test_8_bit_activations(command, llama_mm, monkeypatch, photo, checkpoint):
    from llama_multimodal import loading
    from llama_multimodal.eval import harness

    chosen = []

    def use(model):
        chosen.append(model.decoder.lm_head.format)
        return use_int8_activations(model)

    use_int8_activations = loading.use_int8_activations
    monkeypatch.setattr(loading, "use_int8_activations", use)
    monkeypatch.setattr(harness, "evaluate", lambda *_, **__: harness.Report({"color": harness.Score(1, 2)}))
    answering = ["--max-new-tokens", "3"]
    arguments = {
        "describe": ["describe", photo, QUESTION, "--model", checkpoint, *answering],
        "chat": ["chat", "--image", photo, "--model", checkpoint, *answering],
        "eval": ["eval", checkpoint],
    }[command]
    for options, formats in (([], []), (["--int8-activations"], ["int8"])):  # the LM head is spared
        done = llama_mm(*arguments, "--pack", "int4", *options, lines="What?\n")
        assert done.code == 0 and done.out and "error" not in done.err, done.err
        assert chosen == formats


@pytest.mark.parametrize("command", ["describe", "chat"])
def test_an_adapter(command, llama_mm, monkeypatch, tmp_path, photo, checkpoint):
    """It answers as the model with the adapter does; a folder without one shows before the model is loaded."""
    import llama_multimodal as lmm
    from llama_multimodal import loading
    from llama_multimodal.adapters.lora import adapter_names, adapter_pairs

    model, processor = lmm.load(checkpoint, dtype="fp32")
    lmm.apply_lora(model, lmm.LoraConfig(rank=4, targets="self"))
    for pair in adapter_pairs(model, "default").values():
        pair.B.data.normal_()
    lmm.save_adapter(model, tmp_path / "adapter")
    given = (command, photo, "What?") if command == "describe" else (command, "--image", photo)
    options = ("--model", str(checkpoint), "--max-new-tokens", "5")
    answer = llama_mm(*given, *options, "--adapter", tmp_path / "adapter", lines="What?\n")
    assert answer.code == 0, answer.err
    content = [{"type": "image", "image": photo}, {"type": "text", "text": "What?"}]
    inputs = processor([{"role": "user", "content": content}])
    assert adapter_names(model) == ("default",)
    [expected] = lmm.generate(model, inputs, lmm.SamplingParams(max_new_tokens=5)).texts or []
    assert answer.out.strip() == common.printable(expected).strip()
    assert answer.out != llama_mm(*given, *options, lines="What?\n").out
    monkeypatch.setattr(loading, "load", None)
    wrong = llama_mm(*given, *options, "--adapter", tmp_path / "nowhere")
    assert wrong.code == 2 and "nowhere holds no adapter: there is no adapter_config.json" in wrong.err


def test_answers_cannot_steer_the_terminal():
    assert common.printable("a\x1b[2Jb\x9bc\r\x07d\ne\tü") == "a[2Jbcd\ne\tü"


# --- chat ------------------------------------------------------------------------------------------------------------


class Script:
    """Stands in for the engine's `stream`: says what it is told to, and keeps what it was asked."""

    def __init__(self, *answers: object) -> None:
        self.answers, self.prompts, self.images = list(answers), [], []

    def __call__(self, engine, requests):
        [request] = requests
        inputs = engine.processor(request.messages)
        row = inputs.tokens[0, : inputs.lengths[0]].tolist()
        self.prompts.append(engine.processor.decode(row))
        self.images.append(len(inputs.images))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            yield SimpleNamespace(error=answer, text="", finish_reason="error")
            return
        for piece in answer:
            if piece is signal.SIGINT:
                signal.raise_signal(signal.SIGINT)
                continue
            yield SimpleNamespace(error=None, text=piece, finish_reason="stop" if piece is answer[-1] else None)

    def install(self, monkeypatch) -> Script:
        from llama_multimodal.engine import Engine

        monkeypatch.setattr(Engine, "stream", lambda engine, requests: self(engine, requests))
        return self


def test_chat_remembers_words_and_pictures(llama_mm, monkeypatch, photo, checkpoint):
    script = Script(["Red", "."], ["Two."], ["Hello."]).install(monkeypatch)
    lines = f'What?\n/image "{photo}"\n\nAnd this?\n/clear\nHi\n/quit\nnever read\n'
    done = llama_mm("chat", "--image", photo, "--model", checkpoint, "--system", "Be brief.", lines=lines)
    assert done.code == 0, done.err
    assert done.out == "Red.\nTwo.\nHello.\n"
    assert script.images == [1, 2, 0]
    assert script.prompts[1] == (
        "system\n\nBe brief.user\n\nWhat?assistant\n\nRed.user\n\nAnd this?assistant\n\n"
    )  # fmt: skip
    assert script.prompts[2] == "system\n\nBe brief.user\n\nHiassistant\n\n"
    assert "photo.png, 80 x 40: 1 picture with your next message" in done.err


def test_chat_encodes_a_picture_once(llama_mm, monkeypatch, photo, checkpoint, tmp_path):
    from llama_multimodal.engine import Engine

    engines = []
    stream = Engine.stream
    monkeypatch.setattr(Engine, "stream", lambda engine, asked: (engines.append(engine), stream(engine, asked))[1])
    other = tmp_path / "other.png"
    Image.new("RGB", (60, 60), "blue").save(other)
    lines = f"What?\nAnd?\n/image {other}\nThis?\n/image {photo}\nAgain?\n/clear\n/image {photo}\nHi\n"
    done = llama_mm("chat", "--image", photo, "--model", checkpoint, "--max-new-tokens", "3", lines=lines)
    assert done.code == 0 and "error" not in done.err, done.err
    assert len(engines) == 5 and len(set(engines)) == 1
    metrics = engines[0].metrics
    assert metrics.encoded_images == 2  # two different ones, in five turns
    assert metrics.cached_tokens > metrics.prompt_tokens / 4  # earlier turns are read once


def test_chat_looks_up_what_was_said(llama_mm, monkeypatch, photo, checkpoint):
    """The same answers, some of whose tokens were guessed ahead."""
    from llama_multimodal.engine import Engine

    engines = []
    stream = Engine.stream
    monkeypatch.setattr(Engine, "stream", lambda engine, asked: (engines.append(engine), stream(engine, asked))[1])
    asked = ("chat", "--image", photo, "--model", checkpoint, "--max-new-tokens", "40")
    plain, ahead = (llama_mm(*asked, *more, lines="What?\nAnd?\n") for more in ((), ("--lookup",)))
    assert ahead.code == 0 and ahead.out == plain.out
    assert engines[0].metrics.proposed_tokens == 0 < engines[-1].metrics.proposed_tokens


def test_chat_ctrl_c_stops_the_answer_only(llama_mm, monkeypatch, photo, checkpoint):
    script = Script(["One", signal.SIGINT, "two"], [signal.SIGINT, "x"], ["Yes."]).install(monkeypatch)
    lines = f"Count\n/image {photo}\nLook\nAgain\n"  # the end of the input is Ctrl-D
    done = llama_mm("chat", "--model", checkpoint, lines=lines)
    assert done.code == 0 and done.err.count("(stopped)") == 2
    assert "Yes." in done.out and "two" not in done.out
    # What was read stays; a message without an answer is taken back, and its picture waits for the next one.
    assert script.prompts[2] == "user\n\nCount" + "assistant\n\nOne" + "user\n\nAgain" + "assistant\n\n"
    assert script.images == [0, 1, 1]


def test_chat_goes_on_after_mistakes(llama_mm, monkeypatch, photo, checkpoint):
    script = Script(CheckpointError("broken"), ["Fine."]).install(monkeypatch)
    lines = f"/image nope.png\n/image\n/imgae x\n/help\n{'long ' * 400}\nWhat?\nAnd now?\n"
    done = llama_mm("chat", "--model", checkpoint, lines=lines)
    assert done.code == 0 and done.out == "Fine.\n\n"
    for message in (
        "error: nope.png does not exist", "error: /image needs the path", 'did you mean "/image"?', "/clear", "context",
        "error: broken",
    ):  # fmt: skip
        assert message in done.err
    assert "Traceback" not in done.err
    assert script.prompts[-1] == "user\n\nAnd now?assistant\n\n"


def test_chat_with_a_real_model(llama_mm, photo, checkpoint):
    done = llama_mm("chat", "--image", photo, "--model", checkpoint, "--max-new-tokens", "4", lines="What?\nAnd?\n")
    assert done.code == 0 and "error" not in done.err and done.out.count("\n") >= 2


# --- zoo and doctor --------------------------------------------------------------------------------------------------


def test_zoo(llama_mm, monkeypatch):
    table = llama_mm("zoo")
    assert table.code == 0 and "meta-llama/Llama-3.2-90B-Vision-Instruct" in table.out and "165 GiB" in table.out
    monkeypatch.setenv("COLUMNS", "80")
    assert "meta-llama/Llama-3.2-90B-Vision-Instruct" in llama_mm("zoo").out  # whole, also where it is narrow
    known = {entry["name"]: entry for entry in json.loads(llama_mm("zoo", "--json").out)}
    assert known["tiny"]["embedded"] and not known["tiny"]["gated"]
    large = known["meta-llama/Llama-3.2-11B-Vision"]
    assert large["gated"] and large["bytes_bf16"] == 2 * large["parameters"] and large["tile_size"] == 560


def test_registry_reads_the_embedded_model(monkeypatch, checkpoint):
    from safetensors import safe_open

    monkeypatch.setattr(registry, "EMBEDDED_FOLDER", checkpoint)
    tiny = registry.checkpoints()[0]
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert tiny.parameters == sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert tiny.available and (tiny.tile_size, tiny.context) == (32, 256)
    monkeypatch.setattr(registry, "EMBEDDED_FOLDER", checkpoint / "nowhere")
    assert not registry.checkpoints()[0].available


def test_registry_guesses_names():
    assert registry.nearest_name("llama-3.2-11b-vision-instruct") == "meta-llama/Llama-3.2-11B-Vision-Instruct"
    assert registry.nearest_name("Tinny") == "tiny"
    assert registry.nearest_name("gpt-17") is None


def test_doctor(llama_mm, monkeypatch):
    text = llama_mm("doctor")
    assert text.code == 0
    for part in ("Versions", "Devices", "Backends", "rms_norm", "What is missing"):
        assert part in text.out
    monkeypatch.setattr(doctor, "_EXTRAS", {"train": ("a-package-that-is-not-there",)})
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    report = json.loads(llama_mm("doctor", "--json").out)
    assert report["devices"][0]["name"] == "cpu"
    assert report["hub"]["token"] is False
    wanted = {'pip install -e ".[train]"', "accept the licence, then: hf auth login"}
    assert wanted <= {problem["mend"] for problem in report["problems"]}


@pytest.fixture
def kernels(monkeypatch):
    """Two backends with kernels of their own, one that cannot be used and one that has none at all."""
    from llama_multimodal.ops import _dispatch
    from llama_multimodal.ops.backends import native

    missing = {
        "cuda": "its library is not built: there is no nvcc; install the CUDA toolkit",
        "triton": "triton cannot be imported (no module); pip install triton",
    }
    held = {("rms_norm", "cuda"): None, ("swiglu", "cuda"): None, ("linear", "cpu"): None, ("swiglu", "cpu"): None}
    built = {
        "cuda": {"built": False, "why": "no nvcc"},
        "cpu": {"built": True, "compiler": "g++ 12", "archs": ["avx2"]},
    }
    monkeypatch.setattr(_dispatch, "_kernels", held)
    monkeypatch.setattr(_dispatch, "why_missing", missing.get)
    monkeypatch.setattr(native, "build_report", built.get)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("LLAMA_MM_BACKEND", raising=False)
    return SimpleNamespace(missing=missing, held=held)


def test_doctor_says_what_each_backend_is_to_an_op(llama_mm, kernels, monkeypatch):
    backends = json.loads(llama_mm("doctor", "--json").out)["backends"]
    used, nothing, no_triton = ("in use", "left to torch", "cannot be imported")
    assert backends["ops"]["linear"] == {"cuda": nothing, "triton": no_triton, "cpu": used, "torch": "available"}
    assert backends["ops"]["rms_norm"] == {"cuda": "not built", "triton": no_triton, "cpu": nothing, "torch": used}
    assert backends["missing"] == kernels.missing and backends["device"] == "cpu" and backends["requested"] is None
    monkeypatch.setenv("LLAMA_MM_BACKEND", "torch")
    forced = json.loads(llama_mm("doctor", "--json").out)["backends"]
    assert forced["ops"]["linear"]["cpu"] == "available" and forced["ops"]["linear"]["torch"] == "in use"
    monkeypatch.setenv("LLAMA_MM_BACKEND", "cuda")
    text = llama_mm("doctor").out
    for line in (
        "Backends, for tensors on cpu (-: left to torch)",
        "triton: triton cannot be imported (no module); pip install triton",
        "cpu library: built by g++ 12 for avx2",
        "LLAMA_MM_BACKEND asks for cuda, which cannot be used here: its library is not built: there is no nvcc",
    ):
        assert line in text, text
    assert text.count("there is no nvcc") == 2  # once as the reason, once for what was asked


def test_doctor_on_a_machine_with_a_gpu(llama_mm, kernels, monkeypatch):
    kernels.missing.clear()
    kernels.held["swiglu", "triton"] = None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    ops = json.loads(llama_mm("doctor", "--json").out)["backends"]["ops"]
    assert ops["swiglu"] == {"cuda": "in use", "triton": "available", "cpu": "available", "torch": "available"}
    assert ops["linear"] == {"cuda": "left to torch", "triton": "left to torch", "cpu": "available", "torch": "in use"}


@pytest.mark.parametrize(
    "reason, short",
    [
        ("there is no CUDA device", "no CUDA device"),
        ("there is no GPU, and TRITON_INTERPRET=1 is not set", "no GPU"),
        ("its library is not built: NO_CUDA is set", "not built"),
        ("its library does not run on this sm_61 (it is built for sm_90; x)", "does not run on this sm_61"),
        ("this version has no such kernels", "this version has no such kernels"),
    ],
)
def test_doctor_shortens_reasons(reason, short):
    assert doctor._short(reason) == short


def test_doctor_knows_every_op():
    """Those that dispatch, by the calls in their files."""
    import re

    from llama_multimodal import ops

    calls = [re.findall(r'call\(\s*"(\w+)"', file.read_text()) for file in Path(ops.__file__).parent.glob("[a-z]*.py")]
    assert sorted(name for names in calls for name in names) == sorted(doctor.OPS)


def test_doctor_without_torch(llama_mm, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it now raises ImportError
    done = llama_mm("doctor")
    assert done.code == 1 and "torch cannot be imported" in done.out


# --- train, eval, convert --------------------------------------------------------------------------------------------


def test_train_exports_and_draws(llama_mm, monkeypatch, tmp_path, checkpoint):
    pytest.importorskip("matplotlib")
    from llama_multimodal import loading
    from llama_multimodal.train import loop
    from llama_multimodal.train.config import Progress
    from llama_multimodal.train.watch import line

    output = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(
        f"task: world\noutput: {output}\nsteps: 40\nvision_steps: 10\nsave_every: 20\n"
        "vision: {hidden_size: 64, num_attention_heads: 4}\ntext: {hidden_size: 64, num_hidden_layers: 4,"
        " cross_attention_layers: [1, 3]}\n"
    )

    def train(recipe, report):
        output.mkdir()
        with open(output / "metrics.jsonl", "w") as log:
            for step in range(1, recipe.steps + 1):
                values = {"answer_loss": 0.0 if step <= 10 else 3 / step, "auxiliary_loss": 1 / step}
                progress = Progress(step, {**values, "token_accuracy": 0.5, "samples_per_second": 12.0})
                log.write(line(progress))
                report(progress)
        return output

    def export(recipe):
        model, processor = loading.load(checkpoint)
        loading.save(model, processor, output / "model")
        return output / "model"

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(loop, "export", export)
    done = llama_mm("train", tmp_path / "recipe.yaml")
    assert done.code == 0, done.err
    assert "step 40 of 40  loss " in done.err and "12.0 pictures/s" in done.err
    assert str(output / "model") in done.out
    with Image.open(output / "loss.png") as curve:
        assert curve.size == (960, 720)
    _, processor = loading.load(output / "model")
    assert processor.tokenizer is not None

    def stopped(recipe, report):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", stopped)
    done = llama_mm("train", tmp_path / "recipe.yaml")
    assert done.code == 130 and "to go on from the last saved step: llama-mm train" in done.err
    assert llama_mm("train", tmp_path / "recipe.yaml", "--export-only").code == 0


def test_eval(llama_mm, monkeypatch, checkpoint):
    from llama_multimodal.eval import harness

    asked = {}

    def evaluate(model, processor, **options):
        asked.update(options)
        options["progress"](1, 2)
        return harness.Report({"count_all": harness.Score(19, 20), "color": harness.Score(0, 20)})

    monkeypatch.setattr(harness, "evaluate", evaluate)
    done = llama_mm("eval", checkpoint, "--per-kind", "20")
    assert done.code == 0, done.err
    assert asked["per_kind"] == 20
    assert "95.0" in done.out and "reached" in done.out and "missed" in done.out
    report = json.loads(llama_mm("eval", checkpoint, "--json").out)
    assert report["kinds"]["count_all"]["right"] == 19 and report["pooled"]["count"]["target"] == 95


def test_convert_there_and_back(llama_mm, tmp_path, checkpoint):
    assert llama_mm("convert", checkpoint, tmp_path / "meta", "--layout", "meta").code == 0
    done = llama_mm("convert", tmp_path / "meta", tmp_path / "hf", "--layout", "hf")
    assert done.code == 0, done.err
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


# --- quantize --------------------------------------------------------------------------------------------------------


def test_quantize(llama_mm, checkpoint, photo, tmp_path):
    done = llama_mm("quantize", checkpoint, "--int4", tmp_path / "small", "--asymmetric", "--keep", "down_proj")
    assert done.code == 0 and str(tmp_path / "small") in done.out and "%" in done.out
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert not config["config_groups"]["group_0"]["weights"]["symmetric"]
    assert any("down_proj" in ignored for ignored in config["ignore"])
    answer = llama_mm("describe", photo, QUESTION, "--model", tmp_path / "small", "--max-new-tokens", "3", "--json")
    assert answer.code == 0 and len(json.loads(answer.out)["token_ids"]) >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "choose one of --int8, --int4, --fp8 and --nf4"),
        (("--int4", "--int8"), "choose one of --int8, --int4, --fp8 and --nf4"),
        (("--fp8", "--group", "32"), "--fp8 has a scale a row and no groups"),
        (("--int4", "--fp8-activations"), "fp8 activations go with fp8 weights, not with int4"),
        (("--int4", "--lm-head", "int8", "--keep", "lm_head"), "the LM head is to be kept and to become int8"),
        (("--nf4", "--int4"), "choose one of"),
        (("--nf4", "--asymmetric"), "--nf4 goes with --group (of 64 unless given), --keep and --device alone"),
        (("--nf4", "--group", "48"), "block_size must be one of"),
        (("--nf4", "--keep", "*"), "no linear layer is left to quantize"),
        (("--int4", "--group", "48"), "groups of 48 do not divide the 32 inputs of"),
        (("--int4", "--keep", "lm_haed"), 'no layer is called "lm_haed"'),
        (("--int4", "--method", "awq"), 'unknown method "awq"'),
        (("--int4", "--method", "gptq"), "give it calibration rows"),
        (("--int4", "--method", "gptq", "--calibration", "missing.jsonl"), "missing.jsonl is not there"),
    ],
)
def test_quantize_with_wrong_options(llama_mm, checkpoint, tmp_path, options, message):
    done = llama_mm("quantize", checkpoint, tmp_path / "small", *options)
    assert done.code == 2 and done.err.count("\n") == 1 and message in done.err
    assert not (tmp_path / "small").exists()
