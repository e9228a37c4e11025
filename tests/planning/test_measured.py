"""Plans against what runs take: memory of whole processes, and the tensors that are alive.

The first is what counts, and slow to measure; the second sees every allocation but those inside a library's product,
and full-size models on the meta device besides. docs/memory.md has a table of the first for all cases.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from live_tensors import LiveTensors
from measure import CASES, run

from llama_multimodal.cache import SelfAttentionCache
from llama_multimodal.config import AnyModelConfig, ModelConfig
from llama_multimodal.inputs import ImageLayout, ModelInputs
from llama_multimodal.models import build_model
from llama_multimodal.planning import PlanOptions, inference, plan
from llama_multimodal.zoo.configs import find_config

SCRIPT = Path(__file__).parent / "measure.py"
IN_PROCESSES = ("text", "pictures", "training")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
@pytest.mark.parametrize("name", IN_PROCESSES)
def test_memory_of_a_process(name: str) -> None:
    source = str(Path(sys.modules["llama_multimodal"].__path__[0]).parent)
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), name], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["measured"] > 1.5 * result["weights"], "the weights alone would fit any plan"
    assert result["planned"] == pytest.approx(result["measured"], rel=0.1)


@pytest.mark.parametrize("name", ["text, int8", "spliced pictures", "training, checkpointed"])
def test_tensors_that_are_alive(name: str) -> None:
    config, options = CASES[name]
    with LiveTensors() as live:
        run(config, options)
    assert plan(config, options).total == pytest.approx(live.peak, rel=0.1)


def phases(config: AnyModelConfig, options: PlanOptions) -> dict[str, int]:
    """The most that is alive in each phase of an answer, on the meta device: beside the weights and the cache."""
    load = plan(config, options).load
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    with torch.device("meta"):
        model = build_model(config).to(dtype).eval()
    places = config.num_tokens(*load.tile_size) if isinstance(config, ModelConfig) and config.fusion == "splice" else 1
    of_picture, of_row = load.tiles // max(1, load.images), load.images // load.rows
    grid = (2, 2) if of_picture == 4 else (1, of_picture)
    layouts = tuple(
        ImageLayout(*grid, row=row, num_tokens=of_picture * places) for row in range(load.rows) for _ in range(of_row)
    )
    shape = (load.rows, load.prompt)
    visible = torch.zeros(*shape, 2, dtype=torch.int64)
    visible[..., 1] = bool(layouts) and places == 1
    found = {}
    with torch.inference_mode(), torch.device("meta"):
        tokens, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        tiles = torch.zeros(load.tiles, 3, *load.tile_size)
        inputs = ModelInputs(tokens, positions, (load.prompt,) * load.rows, tiles, layouts, visible)
        with LiveTensors() as live:
            cache = SelfAttentionCache.allocate(config.text, load.rows, load.context, dtype, "meta")
            found["self-attention cache"] = live.now
            images = model.read_images(inputs)
            found["pictures"], live.peak = live.peak - found["self-attention cache"], live.now
            found["read"] = live.now - found["self-attention cache"]
            model(inputs, images=images, self_cache=cache, last_token_of=[load.prompt - 1] * load.rows)
            found["text activations"] = live.peak - found["self-attention cache"] - found["read"]
    return found


@pytest.fixture(scope="module")
def alone() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: in one that ran other tests a state of a block has been seen to stay a little longer."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("11B", PlanOptions(context=8192, batch=4)),
        ("11B", PlanOptions(context=2048, batch=2, tiles=1)),
        ("meta-llama/Llama-3.2-1B-Instruct", PlanOptions(context=8192, batch=2)),
        ("llava-hf/llava-1.5-7b-hf", PlanOptions(context=4096, batch=2)),
        ("HuggingFaceTB/SmolVLM-Instruct", PlanOptions(context=8192)),
    ],
)
def test_full_size_models(name: str, options: PlanOptions, alone: ProcessPoolExecutor) -> None:
    config = find_config(name)
    assert config is not None
    options = replace(options, device="cpu")  # the meta device runs what a CPU without kernels would
    made, found = plan(config, options), alone.submit(phases, config, options).result()
    assert made.part("self-attention cache").bytes == found["self-attention cache"]
    read = made.part("cross-attention cache").bytes + made.part("image embeddings").bytes
    assert read == found["read"]
    assert made.part("text activations").bytes == pytest.approx(found["text activations"], rel=0.03)
    given = config, options, made.load
    pictures = max(inference.vision_peak(*given), read + inference.projection_peak(*given)) if made.load.tiles else 0
    assert pictures == pytest.approx(found["pictures"], rel=0.05)
