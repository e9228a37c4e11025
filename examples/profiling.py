"""Where the time goes: torch.profiler's table of operators for reading a prompt and for one token after another.

On an NVIDIA GPU the two phases are NVTX ranges as well, for a timeline: nsys profile python examples/profiling.py

python examples/profiling.py
python examples/profiling.py --rows 20 --trace trace.json   # open the trace in chrome://tracing or ui.perfetto.dev
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import llama_multimodal as lmm

IMAGES = Path(__file__).parent / "images"


@contextlib.contextmanager
def phase(name: str, device: str) -> Iterator[None]:
    """A named range in the profiler's table, and in NVTX where there is a GPU to trace."""
    on_gpu = torch.device(device).type == "cuda"
    with record_function(name), torch.cuda.nvtx.range(name) if on_gpu else contextlib.nullcontext():
        yield
        if on_gpu:
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default=str(IMAGES / "shelf.png"))
    parser.add_argument("--prompt", default="Describe the picture.")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--rows", type=int, default=12, help="of the table")
    parser.add_argument("--trace", help="a file for the timeline")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model, processor = lmm.load(args.model, device=args.device)
    content = [{"type": "image", "image": args.image}, {"type": "text", "text": args.prompt}]
    inputs = processor([{"role": "user", "content": content}])
    params = lmm.SamplingParams(args.max_new_tokens)
    lmm.generate(model, inputs, lmm.SamplingParams(2))  # what is only done once is not measured

    on_gpu = torch.device(args.device).type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as profiler:
        with torch.inference_mode(), phase("read the picture", args.device):
            read = model.read_images(inputs)
        events = lmm.generate(model, inputs, params, stream=True, images=read)
        with phase("read the prompt", args.device):  # up to the first token
            tokens = [next(events).token_id]
        with phase("write the answer", args.device):
            tokens += [event.token_id for event in events]

    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages()
    print(table.table(sort_by=order, row_limit=args.rows, max_name_column_width=40))
    for name in ("read the picture", "read the prompt", "write the answer"):
        found = next(row for row in table if row.key == name)
        print(f"{name}: {found.cpu_time_total / 1000:.1f} ms")
    print(f"{len(tokens)} tokens: {processor.decode(tokens)}")
    if args.trace:
        profiler.export_chrome_trace(args.trace)


if __name__ == "__main__":
    main()
