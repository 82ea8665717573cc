"""A directory that belongs to one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import weakref
from pathlib import Path

from experiments.common.errors import UserError, reason
from experiments.common.terminal import warn

LOCK = ".lock"
"""The file that is locked; it stays behind, and says nothing by being there."""


class DirectoryLock:
    """Keeps other processes from claiming the directory while this object, or one like it, lives.

    The kernel frees it when the process ends, however that happens. On network file systems other
    machines are kept out where the file system passes `flock` on (NFS since Linux 2.6.12, Lustre
    mounted with `flock`); where it refuses locks a warning says so, and nothing is kept out.
    """

    def __init__(self, directory: Path):
        path = directory / LOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._free = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{directory} is in use by {_holder(path)}; wait for its end, or choose another "
                "directory with --run-dir."
            ) from error
        except OSError as error:
            warn(
                f"{directory} cannot be locked ({reason(error)}): take care that no other process "
                "trains in it."
            )
        else:
            holder = {"process": os.getpid(), "host": socket.gethostname()}
            path.write_text(json.dumps(holder))


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['process']} on {holder['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"  # which has not written its name yet


_held: weakref.WeakValueDictionary[Path, DirectoryLock] = weakref.WeakValueDictionary()


def lock(directory: Path) -> DirectoryLock:
    """The directory's lock, which this process may hold already.

    Raises:
        UserError: Another process holds it.
    """
    path = directory.resolve()
    held = _held.get(path)
    if held is None:
        held = _held[path] = DirectoryLock(path)
    return held
