"""Continuous batching over a cache in blocks."""

from .async_engine import AsyncEngine
from .config import CachePlan, DraftModel, EngineConfig, PromptLookup, Speculation, plan_cache
from .constrained import Grammars
from .engine import Engine
from .metrics import EngineMetrics, Histogram
from .request import Answer, Constraint, Event, Request, RequestMetrics

__all__ = [
    "Answer",
    "AsyncEngine",
    "CachePlan",
    "Constraint",
    "DraftModel",
    "Engine",
    "EngineConfig",
    "EngineMetrics",
    "Event",
    "Grammars",
    "Histogram",
    "PromptLookup",
    "Request",
    "RequestMetrics",
    "Speculation",
    "plan_cache",
]
