"""Conversations for fine-tuning: read from files, mixed, encoded by a checkpoint's own processor, step by step."""

from .config import ChatData, chat_data_from_dict
from .encode import Example, microbatch
from .skips import Skip, SkipLog
from .steps import ChatSteps, StepExamples

__all__ = ["ChatData", "ChatSteps", "Example", "Skip", "SkipLog", "StepExamples", "chat_data_from_dict", "microbatch"]
