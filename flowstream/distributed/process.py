"""A process as another one on its host can look it up, to see whether it has died or was stopped."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Process"]


@dataclass(frozen=True)
class Process:
    """A process, as it tells others of itself."""

    host: str
    """Equal only where a pid means the same: the machine, since its last boot, and the namespace of pids."""
    pid: int
    born: str
    """When it began, so that another one with its pid is not taken for it; empty where the system does not tell."""

    @classmethod
    def own(cls) -> Process:
        boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        host = platform.node()
        with contextlib.suppress(OSError):
            host = f"{host} {boot.read_text().strip()} {namespace.stat().st_ino}"
        return cls(host, os.getpid(), _state_and_birth(os.getpid())[1])

    def fate(self) -> str | None:
        """What is wrong with a process of this host, in words; nothing, as far as can be seen, if `None`."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return "has died"
        except OSError:
            return None
        state, born = _state_and_birth(self.pid)
        if born != self.born or state in ("Z", "X"):
            return "has died"
        return "was stopped (by SIGSTOP or a debugger)" if state in ("T", "t") else None


def _state_and_birth(pid: int) -> tuple[str, str]:
    """As Linux tells; empty elsewhere, and of a process that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # its name may hold anything
    except OSError:
        return "", ""
    return fields[0], fields[19]
