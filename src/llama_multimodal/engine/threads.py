"""OpenMP's threads, where more than one thread of a process computes."""

from __future__ import annotations

import ctypes
import os

_SOFT = 1  # omp_pause_soft of the OpenMP specification, 5.0: settings stay as they are


def release_threads() -> None:
    """End the helpers that OpenMP has started for the calling thread; it starts others when it needs them.

    Each thread that computes has helpers of its own, and keeps them. Where a process has more of them than cores,
    libgomp lets all of them fall asleep at each barrier, and a decoding step has hundreds: SmolLM2 135M in int4 said 90
    tokens a second in a second thread on two cores, and 216 once the first thread had let its helpers go. With another
    OpenMP than torch's usual one nothing happens.
    """
    try:  # torch has loaded it, or it is not the one that computes
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | getattr(os, "RTLD_NOLOAD", 0))
        pause = library.omp_pause_resource_all
    except (OSError, AttributeError):
        return
    pause(_SOFT)
