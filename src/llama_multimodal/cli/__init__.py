"""The command line: `llama-mm describe`, `chat`, `doctor`, `zoo`, `plan`, `train`, `eval`, `convert`, `quantize`,
`data`.

torch is imported inside the commands only, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from ..errors import UserError
from . import chat, data, describe, doctor, evaluate, plan, train, zoo
from . import convert as convert_command
from . import quantize as quantize_command

EXIT_UNEXPECTED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="llama-mm",
    help="Llama 3.2 Vision in plain PyTorch: ask pictures questions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("describe")(describe.describe)
app.command("chat")(chat.chat)
app.command("doctor")(doctor.doctor)
app.command("zoo")(zoo.zoo)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("convert")(convert_command.convert)
app.add_typer(data.app)
app.command("quantize")(quantize_command.quantize)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"llama-mm {__version__}")
        raise typer.Exit()


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options are read elsewhere; they stand here for `--help`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 for what the user can mend, 130 interrupted, 1 for a defect of ours."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments, debug = _take_debug(arguments)
    try:
        app(arguments, prog_name="llama-mm")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        message = _what_the_user_can_mend(error)
        if message is not None:
            print(f"error: {message}", file=sys.stderr)
            sys.exit(EXIT_USER_ERROR)
        hint = "" if debug else "; run the same command with --debug to see where, and please report it"
        print(f"error: unexpected {type(error).__name__}: {_one_line(str(error))}{hint}", file=sys.stderr)
        sys.exit(EXIT_UNEXPECTED)


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """`--debug` counts wherever it stands: one adds it at the end of the command that failed."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = arguments[:end]
    return [a for a in options if a != "--debug"] + arguments[end:], "--debug" in options


def _what_the_user_can_mend(error: Exception) -> str | None:
    """A message for an error that is not a defect of ours; None for one that is."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{_named(error)}; free some space and run the command again"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write or read{_named(error)}; choose another place or change its permissions"
    if isinstance(error, OSError) and error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return f"{(error.strerror or 'wrong kind of file').lower()}{_named(error)}; choose another place"
    # torch's own classes, told by name: torch may not even be imported. On the CPU it raises a plain RuntimeError.
    no_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if no_memory or "can't allocate memory" in str(error):
        return (
            "out of memory; use --dtype bf16, a smaller model (llama-mm zoo lists what each needs), or smaller images"
        )
    return None


def _named(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
