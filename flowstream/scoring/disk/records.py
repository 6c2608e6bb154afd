"""What a cache on disk knows of a namespace."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from flowstream.scoring.cache import Namespace


@dataclass(frozen=True)
class Record:
    """A namespace in words, and when it was created and last used (ISO, local time, "" where unknown)."""

    label: str = ""
    level: str = ""
    fingerprint: str = ""
    created: str = ""
    used: str = ""

    def touched(self, namespace: Namespace | None, now: str) -> Record:
        """This record, used now, with what is known of the namespace."""
        named = self if namespace is None else namespace
        return Record(named.label, named.level, named.fingerprint, self.created or now, now)

    @classmethod
    def read(cls, raw: bytes | None) -> Record:
        """That in `raw`; an empty one where this is damaged."""
        try:
            found = json.loads(raw or b"")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            return cls()
        return cls(**{field.name: str(found.get(field.name, "")) for field in fields(cls)})

    def write(self) -> bytes:
        return json.dumps(asdict(self)).encode()
