"""Writing files so that a reader, or a crash, never meets half of one."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the path, then rename: the file is the old one or the new one, whole."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk it would be in the way
        raise


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; see `to_json` for what becomes of infinities."""
    write_atomically(path, (to_json(value, indent=2) + "\n").encode())


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON as the standard has it: NaN becomes null, an infinity a number beyond all doubles.

    Python's own encoder writes NaN and Infinity, which other readers refuse; every reader takes
    `1e999`, and most (Python's, too) read it as infinity.
    """
    marks = {math.inf: "\0+", -math.inf: "\0-"}

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return [plain(entry) for entry in item]
        if isinstance(item, float) and not math.isfinite(item):
            return marks.get(item)
        return item

    text = json.dumps(plain(value), indent=indent, allow_nan=False)
    return text.replace('"\\u0000+"', "1e999").replace('"\\u0000-"', "-1e999")
