"""The one exception for mistakes a user can repair, and the words for those of the system."""

from __future__ import annotations

import errno
import os
import re

DISK_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
)
"""Numbers of an `OSError` that the user can repair: a full disk, a read-only directory."""

_TENSORSTORE_CODE = re.compile(r"os_error_code='(\d+)'")


class UserError(Exception):
    """A mistake in what the user gave; its text is one sentence that says what to do.

    The command line prints the text without a traceback and exits with status 1.
    """


def reason(error: BaseException) -> str:
    """What went wrong, in a few words, as part of a sentence: "No space left on device"."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = _TENSORSTORE_CODE.search(str(error))
    if code:
        return os.strerror(int(code[1]))
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]
