"""Command lines of tasks, as a user gives them."""

from __future__ import annotations

import pytest

from experiments.common.cli import main


def run(task, *arguments):
    main(task, [str(argument) for argument in arguments])


def fail(task, capsys, *arguments):
    """The message of a command that ends with one sentence."""
    with pytest.raises(SystemExit) as caught:
        run(task, *arguments)
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message
