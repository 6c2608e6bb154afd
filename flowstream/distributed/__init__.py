"""Many ranks: which of them share τ and keep in step, how they meet once a window, and what of one that is lost."""

from flowstream.distributed.world import World

__all__ = ["World"]
