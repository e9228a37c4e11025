"""`llama-mm` with accidents: the second process cannot read the steps that FAILS_AT names, one for each attempt."""

from __future__ import annotations

import os

from llama_multimodal import cli
from llama_multimodal.errors import ImageError
from llama_multimodal.train.chat.steps import ChatSteps, StepExamples

plain = ChatSteps.__getitem__


def broken(self: ChatSteps, step: int) -> StepExamples:
    fails = os.environ.get("FAILS_AT", "").split()[int(os.environ["TORCHELASTIC_RESTART_COUNT"]) :]
    if fails and os.environ["RANK"] == "1" and str(step) == fails[0] and self._listed is None:  # of training rows
        raise ImageError(f"picture {step} is damaged; leave it out")
    return plain(self, step)


if __name__ == "__main__":
    ChatSteps.__getitem__ = broken  # type: ignore[method-assign]
    cli.main()
