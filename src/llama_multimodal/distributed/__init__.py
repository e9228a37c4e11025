"""One model on several processes: replicas, shards and tensor parts. Built models are transformed; none knows of it."""

from .checkpoint import (
    full_model,
    full_state,
    is_saved_run,
    latest_run,
    load_full_state,
    load_run,
    read_extra,
    save_run,
)
from .fsdp import alike, clip_gradients, gather_for, gradient_norm, match_images, scale_gradients, shard_model, sync_gradients
from .mesh import ParallelConfig, fill_parameter, local_part, make_mesh, max_over_readers, num_readers, reader, sum_over_readers, worker
from .tensor_parallel import DECODER, VISION, Plan, Style, default_plan, parallelize

__all__ = [
    "DECODER",
    "VISION",
    "ParallelConfig",
    "Plan",
    "Style",
    "alike",
    "clip_gradients",
    "default_plan",
    "fill_parameter",
    "full_model",
    "full_state",
    "gather_for",
    "gradient_norm",
    "is_saved_run",
    "latest_run",
    "load_full_state",
    "load_run",
    "local_part",
    "make_mesh",
    "match_images",
    "max_over_readers",
    "num_readers",
    "parallelize",
    "read_extra",
    "reader",
    "save_run",
    "scale_gradients",
    "shard_model",
    "sum_over_readers",
    "sync_gradients",
    "worker",
]
