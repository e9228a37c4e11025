"""What several commands share: options, loading with a progress bar, and output that is safe for a terminal."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ..errors import DeviceError, PromptError
from ..zoo.registry import find

if TYPE_CHECKING:
    from ..models import LanguageModel
    from ..processing import Processor
    from ..sampling import SamplingParams

# --- options ---------------------------------------------------------------------------------------------------------

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="tiny, a folder with a checkpoint, or a repository of the Hugging Face hub."),
]
DType = Annotated[
    str, typer.Option(help="auto, fp32, bf16 or fp16. auto: the checkpoint's own; fp32 for a small one on a CPU.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps. auto: a GPU where there is one.")]
Pack = Annotated[
    str,
    typer.Option(
        help="bf16, int8, int4 or fp8: pack the weights while they load, for faster answers. auto: bf16 for a bf16"
        " model on a CPU, which loses nothing; none: never."
    ),
]
Int8Activations = Annotated[
    bool,
    typer.Option("--int8-activations", help="With int8 or int4 weights on a CPU: round activations to 8 bits too."),
]
Adapter = Annotated[str | None, typer.Option(help="A folder with a LoRA adapter, as PEFT or save_adapter writes it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

_SMALL = 2 * 2**30  # bytes of weights


@dataclass(frozen=True)
class AnswerOptions:
    """The options of every command that answers questions; `answer_options` declares them."""

    model: Model = "tiny"
    dtype: DType = "auto"
    device: Device = "auto"
    pack: Pack = "auto"
    int8_activations: Int8Activations = False
    adapter: Adapter = None
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; 1 draws as the model was trained.")
    ] = 0.0
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens that make up this probability.")] = 1.0
    top_k: Annotated[int, typer.Option(help="Draw among this many tokens; 0 is all.")] = 0
    min_p: Annotated[float, typer.Option(help="Leave out tokens less likely than this share of the likeliest.")] = 0.0
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that were there before become less likely.")
    ] = 1.0
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text. May be repeated.")] = None
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None
    system: Annotated[str | None, typer.Option(help="A system message, before the first question.")] = None

    def sampling_params(self) -> SamplingParams:
        """Raises:
        PromptError: a value out of range.
        """
        from ..sampling import SamplingParams

        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise PromptError(f"seed must fit 64 bits, not {self.seed}")
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(self.stop or ()),
            seed=self.seed,
        )


def answer_options(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: a command's keyword `options: AnswerOptions` becomes one option of typer's for each field.

    defaults: the command's own, by field
    """

    def declare(command: Callable[..., None]) -> Callable[..., None]:
        annotations = get_type_hints(AnswerOptions, include_extras=True)
        shared = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(field.name, field.default),
                annotation=annotations[field.name],
            )
            for field in fields(AnswerOptions)
        ]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = AnswerOptions(**{parameter.name: given.pop(parameter.name) for parameter in shared})
            command(**given, options=options)

        parameters = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            parameters += shared if parameter.name == "options" else [parameter]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        return run

    return declare


def choose_device(name: str) -> str:
    """`auto` as a device's name; whether any other is there, `load` finds out.

    Raises:
        DeviceError: a device that holds no numbers.
    """
    import torch

    name = name.strip().lower()
    if name.partition(":")[0] == "meta":
        raise DeviceError("the device meta holds no weights and cannot answer; use auto, cpu or cuda")
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_dtype(name: str, model: str, device: str) -> str | None:
    """A dtype's name, or None for the checkpoint's own."""
    name = name.strip().lower()
    if name != "auto":
        return name
    # Few CPUs compute in bf16; a small model is faster in fp32 there, while a large one would not fit in memory.
    return "fp32" if device == "cpu" and _is_small(model) else None


def _is_small(model: str) -> bool:
    """Whether the weights are here and fit in memory twice over."""
    known = find(model)
    if known is not None and known.embedded:
        return True
    files = [file for end in ("safetensors", "pth") for file in expand(model).glob(f"*.{end}")]
    return bool(files) and sum(file.stat().st_size for file in files) < _SMALL


# --- loading ---------------------------------------------------------------------------------------------------------


def bind_threads() -> bool | None:
    """Ask OpenMP to keep each thread on one core. Call it before torch is imported; later it does nothing.

    Threads that wander between cores find cold caches after each move, and a decoding step has hundreds of short
    parallel regions: all threads wait for the one that moved. But with more threads than cores, binding would stack
    two threads on one core for good; so it is done only where every thread can have a core of its own. Commands that
    start other processes call `free_threads` instead.

    Returns whether threads are bound; None where the user's own `OMP_PROC_BIND` decides.
    """
    if "OMP_PROC_BIND" in os.environ:
        return None
    if "torch" in sys.modules:
        return False
    cores = num_cores()
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    threads = int(asked) if asked.isdigit() else cores  # without the variable, OpenMP starts a thread for each core
    if cores >= threads:
        os.environ.setdefault("OMP_PROC_BIND", "true")
        return True
    return False


def free_threads() -> bool:
    """Let threads move between cores, whatever the environment says. Call it before torch is imported.

    Where threads are bound, every process that this one starts inherits the one core of the thread that starts it.

    Returns whether the environment said otherwise.
    """
    if "torch" in sys.modules:
        return False
    asked = os.environ.get("OMP_PROC_BIND", str("OMP_PLACES" in os.environ)).lower()  # places alone bind too
    os.environ["OMP_PROC_BIND"] = "false"
    return asked != "false"


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_model(
    model: str, dtype: str, device: str, pack: str, int8_activations: bool, adapter: str | None = None
) -> tuple[LanguageModel, Processor]:
    """Load with a progress bar on stderr, which goes away when it is done; adapter: a folder

    Raises:
        UserError: the model, dtype, device or adapter is not there or does not fit.
    """
    if not model.strip():
        raise PromptError("the model's name is empty; use tiny, a folder or a repository, see llama-mm zoo")
    from .. import loading
    from ..adapters.peft_format import load_adapter, read_adapter_config

    if adapter is not None:
        read_adapter_config(expand(adapter))  # loading a model may take minutes, and a wrong folder shows at once
    device = choose_device(device)
    with progress_bar(f"loading {Path(model).name[:32]}", bytes_=True) as progress:
        kind = choose_dtype(dtype, model, device)
        loaded, processor = loading.load(
            model, dtype=kind, device=device, pack=None if pack == "none" else pack,
            int8_activations=int8_activations, progress=progress,
        )  # fmt: skip
    if adapter is not None:
        load_adapter(loaded, expand(adapter))
    return loaded, processor


@contextlib.contextmanager
def progress_bar(title: str, bytes_: bool = False) -> Iterator[Any]:
    """A bar on stderr as a function of (done, total); nothing where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = DownloadColumn() if bytes_ else MofNCompleteColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


# --- text ------------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A note for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Without control characters: no answer and no file name moves the cursor or recolours the terminal."""
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0))


def expand(path: str) -> Path:
    """A path as a shell would have read it: `~` is the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user
        return Path(path)
