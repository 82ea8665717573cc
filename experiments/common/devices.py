"""What the results were measured on."""

from __future__ import annotations

import os

import jax


def device_name() -> str:
    """The default device as results should name it: "cpu (2 cores)", "NVIDIA H100 80GB HBM3"."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count()
    return f"cpu ({cores} cores)"
