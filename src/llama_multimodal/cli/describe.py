"""`llama-mm describe`: one question about one or several pictures."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import PromptError
from . import common


@common.answer_options(max_new_tokens=256)
def describe(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture: PNG, JPEG, WebP, GIF, …")],
    question: Annotated[str, typer.Argument(metavar="QUESTION")] = "Describe the picture.",
    more: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="One more picture, after the first. May be repeated.")
    ] = None,
    *,
    options: common.AnswerOptions,
    as_json: common.AsJson = False,
) -> None:
    """Answer a question about a picture.

    With several pictures the question comes after all of them: llama-mm describe a.png "What changed?" --image b.png
    """
    if not question.strip():
        raise PromptError('the question is empty; leave it out for "Describe the picture."')
    common.bind_threads()
    from ..processing.images import open_image

    # Before the model is loaded, which may take minutes: a wrong path or a wrong option shows at once.
    pictures = [open_image(common.expand(path)) for path in (image, *(more or ()))]
    params = options.sampling_params()
    started = time.perf_counter()
    loaded, processor = common.load_model(
        options.model, options.dtype, options.device, options.pack, options.int8_activations, options.adapter
    )
    load_seconds = time.perf_counter() - started

    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    conversation: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if options.system is not None:
        conversation.insert(0, {"role": "system", "content": options.system})
    result = _answer(loaded, processor, conversation, params, None if as_json else _show)
    result["timings"]["load_seconds"] = round(load_seconds, 4)
    if as_json:
        import torch

        result |= {
            "question": question,
            "images": [image, *(more or ())],
            "model": options.model,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": str(loaded.device),
            "versions": {
                "llama_multimodal": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        }
        print(json.dumps(result, ensure_ascii=False))
        return
    if result["finish_reason"] == "length":
        common.say(f"(cut after {len(result['token_ids'])} tokens; --max-new-tokens allows more)")


def _show(text: str) -> None:
    sys.stdout.write(common.printable(text))
    sys.stdout.flush()


def _answer(
    model: Any, processor: Any, conversation: list[dict[str, Any]], params: Any, show: Callable[[str], None] | None
) -> dict[str, Any]:
    """The answer, its tokens and how long it took; `show` gets the text as it comes."""
    from ..generate import generate

    started = time.perf_counter()
    inputs = processor(conversation)
    prepared = time.perf_counter()
    pieces: list[str] = []
    tokens: list[int] = []
    reason, first = "length", prepared
    try:
        for event in generate(model, inputs, params, stream=True):
            if not tokens:
                first = time.perf_counter()
            tokens.append(event.token_id)
            pieces.append(event.text)
            reason = event.finish_reason or reason
            if show:
                show(event.text)
    finally:
        if show and tokens:
            show("\n")  # also where Ctrl-C cuts the answer off
    ended = time.perf_counter()
    later = len(tokens) - 1
    return {
        "answer": "".join(pieces),
        "token_ids": tokens,
        "finish_reason": reason,
        "prompt_tokens": inputs.lengths[0],
        "tiles": [[layout.rows, layout.columns] for layout in inputs.images],
        "timings": {
            "prepare_seconds": round(prepared - started, 4),
            "first_token_seconds": round(first - prepared, 4),
            "total_seconds": round(ended - started, 4),
            "tokens_per_second": round(later / (ended - first), 2) if later > 0 and ended > first else None,
        },
    }
