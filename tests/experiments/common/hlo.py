"""What a compiled program does in its loops, read from its text."""

from __future__ import annotations

import re

COLLECTIVES = (
    "all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", re.MULTILINE)
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_LOOP = re.compile(r" while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_COLLECTIVE = re.compile(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(")


def computations(text: str) -> dict[str, str]:
    """The program's computations by their names."""
    starts = [(match.group(1), match.start()) for match in _HEADER.finditer(text)]
    ends = [start for _, start in starts[1:]] + [len(text)]
    return {name: text[start:end] for (name, start), end in zip(starts, ends, strict=True)}


def loops(text: str) -> list[str]:
    """All that each loop computes, its condition and what it calls included."""
    parts = computations(text)

    def reached(name: str, seen: set[str]) -> set[str]:
        if name in seen or name not in parts:
            return seen
        seen.add(name)
        for single, several in _CALLED.findall(parts[name]):
            for called in [single, *re.findall(r"[\w.\-]+", several)]:
                reached(called, seen)
        return seen

    names = [reached(body, reached(condition, set())) for condition, body in _LOOP.findall(text)]
    return ["\n".join(parts[name] for name in sorted(of)) for of in names]


def collectives(text: str) -> list[str]:
    """The communication between devices, one entry an operation."""
    return _COLLECTIVE.findall(text)
