"""A run that torchrun starts: it goes on from its last saved step, and one of its processes fails twice."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from runs import make_model, step_batches, take_step

from llama_multimodal.distributed import (
    ParallelConfig,
    full_state,
    latest_run,
    load_run,
    make_mesh,
    save_run,
    shard_model,
    worker,
)
from llama_multimodal.errors import ImageError

STEPS = 4
FAILS_AT = 2


@worker
def main(folder: str) -> None:
    mesh = make_mesh(ParallelConfig(), "cpu")
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    model = shard_model(make_model("llama", seed=mesh.get_rank()), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = latest_run(folder)
    first = 0 if found is None else load_run(found, model, [optimizer])["steps"]
    for step in range(first, STEPS):
        if step == FAILS_AT and attempt == 0 and mesh.get_rank() == 1:
            raise ImageError("picture 7 is damaged; leave it out")
        loss, _ = take_step(model, step_batches("llama", step), optimizer, mesh)
        if mesh.get_rank() == 0:
            with open(Path(folder) / "log", "a") as log:
                log.write(f"{attempt} {step} {loss!r}\n")
        save_run(folder, step + 1, model, [optimizer], extra={"steps": step + 1})
    state = full_state(model)
    if mesh.get_rank() == 0:
        torch.save(state, Path(folder) / "state.pt")
    else:
        raise ImageError("picture 9 is damaged; leave it out")


if __name__ == "__main__":
    main(sys.argv[1])
