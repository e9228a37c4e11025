"""Continuous batching over a cache in blocks."""

from .async_engine import AsyncEngine
from .config import CachePlan, EngineConfig, plan_cache
from .engine import Engine
from .metrics import EngineMetrics, Histogram
from .request import Answer, Event, Request, RequestMetrics

__all__ = [
    "Answer",
    "AsyncEngine",
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
