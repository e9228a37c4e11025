"""Steps that workers prepare: in their order, and with their errors."""

from __future__ import annotations

import pytest
from torch.utils.data import Dataset

from llama_multimodal.errors import DataError, MissingExtraError
from llama_multimodal.train.loader import ahead


class Steps(Dataset[int]):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, step: int) -> int:
        if step == 3:
            raise self.error
        return 10 * step


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error", [DataError("rows.jsonl cannot be read; get it again"), MissingExtraError("data", "a stream")], ids=repr
)
def test_a_users_mistake_keeps_its_line(workers: int, error: Exception) -> None:
    seen = []
    with pytest.raises(type(error)) as caught:
        for step in ahead(Steps(error), 1, 6, workers):
            seen.append(step)
    assert seen == [10, 20] and str(caught.value) == str(error)


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match=r"(?s)in DataLoader worker.*__getitem__.*out of reach"):
        list(ahead(Steps(ValueError("out of reach")), 3, 4, 1))
