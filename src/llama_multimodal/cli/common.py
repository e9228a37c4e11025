"""What several commands share: options, loading with a progress bar, and output that is safe for a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DeviceError, PromptError
from ..zoo.registry import find

if TYPE_CHECKING:
    from ..models import VisionLanguageModel
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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
System = Annotated[str | None, typer.Option(help="A system message, before the first question.")]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; 1 draws as the model was trained.")]
TopP = Annotated[float, typer.Option(help="Draw among the likeliest tokens that make up this probability.")]
TopK = Annotated[int, typer.Option(help="Draw among this many tokens; 0 is all.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens less likely than this share of the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens that were there before become less likely.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text. May be repeated.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]

_SMALL = 2 * 2**30  # bytes of weights


def sampling_params(
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    stop: list[str] | None,
    seed: int | None,
) -> SamplingParams:
    """Raises:
    PromptError: a value out of range.
    """
    from ..sampling import SamplingParams

    if seed is not None and not -(2**63) <= seed < 2**63:
        raise PromptError(f"seed must fit 64 bits, not {seed}")
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )


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
    two threads on one core for good; so it is done only where every thread can have a core of its own. It is not for
    commands that start worker processes: they would inherit the one core of the thread that started them.

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


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_model(model: str, dtype: str, device: str) -> tuple[VisionLanguageModel, Processor]:
    """Load with a progress bar on stderr, which goes away when it is done.

    Raises:
        UserError: the model, dtype or device is not there or does not fit.
    """
    if not model.strip():
        raise PromptError("the model's name is empty; use tiny, a folder or a repository, see llama-mm zoo")
    from .. import loading

    device = choose_device(device)
    with progress_bar(f"loading {Path(model).name[:32]}", bytes_=True) as progress:
        return loading.load(model, dtype=choose_dtype(dtype, model, device), device=device, progress=progress)


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
