"""How much memory a model takes, from its configuration alone: `plan(config, PlanOptions(…))`."""

from .gpus import GPUS, Gpu
from .options import Packed, PlanOptions
from .plan import MemoryPlan, Part, plan

__all__ = ["GPUS", "Gpu", "MemoryPlan", "Packed", "Part", "PlanOptions", "plan"]
