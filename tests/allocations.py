"""What a step allocates, by the allocator's own account."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_of(step: Callable[[], Any]) -> int:
    """The most bytes of tensors alive at a time that `step` allocated on the CPU."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    assert peak > 0
    return peak
