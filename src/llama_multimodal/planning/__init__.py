"""How much memory a model takes, from its configuration alone: `plan(config, PlanOptions(…))`."""

from .gpus import CONTEXT_GIB, GPUS, Gpu
from .options import Packed, PlanOptions
from .plan import MemoryPlan, Part, plan

__all__ = ["CONTEXT_GIB", "GPUS", "Gpu", "MemoryPlan", "Packed", "Part", "PlanOptions", "plan"]
