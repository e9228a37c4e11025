"""One model on several processes: replicas, shards and tensor parts. Built models are transformed; none knows of it."""

from .checkpoint import full_model, full_state, latest_run, load_full_state, load_run, save_run
from .fsdp import alike, clip_gradients, match_images, shard_model, sync_gradients
from .mesh import ParallelConfig, make_mesh, num_readers, reader, sum_over_readers, worker
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
    "full_model",
    "full_state",
    "latest_run",
    "load_full_state",
    "load_run",
    "make_mesh",
    "match_images",
    "num_readers",
    "parallelize",
    "reader",
    "save_run",
    "shard_model",
    "sum_over_readers",
    "sync_gradients",
    "worker",
]
