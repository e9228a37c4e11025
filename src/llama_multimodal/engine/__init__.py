"""Continuous batching over a cache in blocks."""

from .async_engine import AsyncEngine
from .config import CachePlan, EngineConfig, plan_cache
from .constrained import Grammars
from .engine import Engine
from .metrics import EngineMetrics, Histogram
from .request import Answer, Constraint, Event, Request, RequestMetrics

__all__ = [
    "Answer",
    "AsyncEngine",
    "CachePlan",
    "Constraint",
    "Engine",
    "EngineConfig",
    "EngineMetrics",
    "Event",
    "Grammars",
    "Histogram",
    "Request",
    "RequestMetrics",
    "plan_cache",
]
