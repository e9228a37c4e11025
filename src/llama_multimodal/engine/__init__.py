"""Continuous batching over a cache in blocks."""

from .config import CachePlan, EngineConfig, plan_cache
from .engine import Engine
from .metrics import EngineMetrics, Histogram
from .request import Answer, Event, Request, RequestMetrics

__all__ = [
    "Answer",
    "CachePlan",
    "Engine",
    "EngineConfig",
    "EngineMetrics",
    "Event",
    "Histogram",
    "Request",
    "RequestMetrics",
    "plan_cache",
]
