"""What a person at the terminal sees: one console for results, one for warnings and errors."""

from __future__ import annotations

from rich.console import Console

from experiments.common import hosts

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print a line, on process 0 alone; square brackets in it are text, not markup."""
    if hosts.is_first():
        console.print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning line to standard error, on process 0 alone."""
    if hosts.is_first():
        error_console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)
