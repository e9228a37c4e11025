"""`llama-mm chat`: a conversation about pictures. Ctrl-C stops an answer, Ctrl-D ends the chat."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from . import common

if TYPE_CHECKING:
    from ..engine import Engine

_HELP = """\
/image PATH   add a picture to the next message
/clear        forget the conversation and its pictures
/help         this list
/quit         end the chat, as Ctrl-D does
Ctrl-C stops an answer."""
_COMMANDS = ("/image", "/clear", "/help", "/quit")


@common.answer_options(max_new_tokens=512)
def chat(
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="A picture for the first message. May be repeated.")
    ] = None,
    lookup: Annotated[
        bool,
        typer.Option("--lookup", help="Faster where answers repeat what was said: guess ahead from the chat so far."),
    ] = False,
    *,
    options: common.AnswerOptions,
) -> None:
    """Talk about pictures, in several turns.

    /image PATH adds a picture to the next message; /help lists the other commands.
    """
    common.bind_threads()
    # Python leaves Ctrl-C ignored where its parent did, as a script's background jobs do; a chat needs it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from ..engine import Engine, EngineConfig, PromptLookup
    from ..models import VisionLanguageModel
    from ..processing.images import open_image

    pictures = [open_image(common.expand(path)) for path in image or ()]
    params = options.sampling_params()
    loaded, processor = common.load_model(
        options.model, options.dtype, options.device, options.pack, options.int8_activations, options.adapter
    )
    speculation = PromptLookup() if lookup else None
    engine = Engine(loaded, processor, EngineConfig(max_requests=1, speculation=speculation))
    conversation = Conversation(engine, params, options.system, pictures)
    pictures_too = "/image PATH adds a picture, " if isinstance(loaded, VisionLanguageModel) else ""
    common.say(f"{options.model} is ready. {pictures_too}/help lists the commands, Ctrl-D ends the chat.")
    if pictures:
        common.say(f"({_pictures(len(pictures))} with your first message)")
    while True:
        try:
            line = _read_line()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # there is no answer to stop: the line is given up, the chat goes on
            common.say("\n(Ctrl-D ends the chat)")
            continue
        try:
            if not _act(conversation, line):
                return
        except UserError as error:
            common.say(f"error: {error}")
        except KeyboardInterrupt:
            print(flush=True)  # ends the line of the answer
            common.say("(stopped)")


@dataclass
class Conversation:
    """What was said so far, with its pictures, and the pictures that wait for the next message.

    The engine keeps what it has read: a turn computes what is new, and encodes no picture twice.
    """

    engine: Engine
    params: Any
    system: str | None
    waiting: list[Any] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.messages:
            self.clear(self.waiting)

    def clear(self, waiting: list[Any] | None = None) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.waiting = list(waiting or ())

    def ask(self, text: str) -> None:
        """Print the answer as it comes, and remember both.

        A message that gets no answer (an error, or Ctrl-C before the first word) is taken back, and its pictures wait
        again. An answer that was stopped stays as far as it came: it is what the person has read.
        """
        from ..engine import Request

        content = [*({"type": "image", "image": picture} for picture in self.waiting), {"type": "text", "text": text}]
        message = {"role": "user", "content": content}
        answer = ""
        reason = None
        try:
            request = Request([*self.messages, message], self.params)
            with contextlib.closing(self.engine.stream([request])) as events:
                for event in events:
                    if event.error is not None:
                        raise event.error
                    answer += event.text
                    reason = event.finish_reason
                    sys.stdout.write(common.printable(event.text))
                    sys.stdout.flush()
            print()
        finally:
            if answer or reason:
                self.messages += [message, {"role": "assistant", "content": answer}]
                self.waiting = []
        if reason == "length":
            common.say("(cut; --max-new-tokens allows more)")


def _read_line() -> str:
    if not sys.stdin.isatty():  # a script: no prompt among the answers
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history)
    return input("> ")


def _act(conversation: Conversation, line: str) -> bool:
    """Run a command or ask a question; False ends the chat."""
    line = line.strip()
    if not line:
        return True
    word, _, rest = line.partition(" ")
    # A path such as /home/me/a.png that was dropped in by mistake is no command either; the message says what is.
    if not line.startswith("/"):
        conversation.ask(line)
    elif word == "/quit":
        return False
    elif word == "/help":
        common.say(_HELP)
    elif word == "/clear":
        conversation.clear()
        common.say("(forgotten)")
    elif word == "/image":
        _add_picture(conversation, rest.strip())
    else:
        from ..config import nearest

        common.say(f"error: unknown command {common.printable(word)}{nearest(word, _COMMANDS)}; /help lists them")
    return True


def _add_picture(conversation: Conversation, given: str) -> None:
    from ..processing.images import open_image

    if not given:
        common.say("error: /image needs the path of a picture, for example /image photo.jpg")
        return
    path = _path(given)
    picture = open_image(path)
    conversation.waiting.append(picture)
    waiting = _pictures(len(conversation.waiting))
    common.say(f"({path.name}, {picture.width} x {picture.height}: {waiting} with your next message)")


def _path(given: str) -> Path:
    """The path as it is written, spaces and all; or else as a shell reads it, with quotes or backslashes."""
    path = common.expand(given)
    if not path.exists():
        try:
            words = shlex.split(given)
        except ValueError:  # an open quote
            return path
        if len(words) == 1:
            return common.expand(words[0])
    return path


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
