"""Gradient checkpointing (Chen et al. 2016): a block's inner values are computed again in the backward pass.

It takes about a third more arithmetic, and leaves one state a block in memory in the place of all that is inside.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(model: nn.Module) -> nn.Module:
    """Make every transformer block of a built model, text and vision, forget its inner values; returns the model.

    Blocks keep their names and types. Only passes that will be followed by a backward pass are changed.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.forward = types.MethodType(_forgetful, block)  # a copy of the model gets its own
    return model


def _forgetful(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    plain = type(block).forward
    if not torch.is_grad_enabled():
        return plain(block, *args, **kwargs)
    return checkpoint(plain, block, *args, use_reentrant=False, **kwargs)
