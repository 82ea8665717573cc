"""The one exception for mistakes a user can repair."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave; its text is one sentence that says what to do.

    The command line prints the text without a traceback and exits with status 1.
    """
