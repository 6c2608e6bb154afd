"""mix-cd: prior samples are rehearsed where fine-tuning damages most (Bai et al., NAACL 2025, arXiv 2402.08096)."""

from flowstream.rehearsal.spec import Rehearsal

__all__ = ["Rehearsal"]
