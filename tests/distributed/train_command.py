"""`llama-mm` with an accident: the second process cannot read the step that FAILS_AT names."""

from __future__ import annotations

import os

from llama_multimodal import cli
from llama_multimodal.errors import ImageError
from llama_multimodal.train.chat.steps import ChatSteps, StepExamples

plain = ChatSteps.__getitem__


def broken(self: ChatSteps, step: int) -> StepExamples:
    fails = os.environ["RANK"] == "1" and str(step) == os.environ["FAILS_AT"]
    if fails and self._listed is None:  # of training rows
        raise ImageError(f"picture {step} is damaged; leave it out")
    return plain(self, step)


if __name__ == "__main__":
    ChatSteps.__getitem__ = broken  # type: ignore[method-assign]
    cli.main()
