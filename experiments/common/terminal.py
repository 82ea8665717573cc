"""What a person at the terminal sees: one console for results, one for warnings and errors."""

from __future__ import annotations

from rich.console import Console

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print a line; square brackets in it are text, not markup."""
    console.print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning line to standard error."""
    error_console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)
