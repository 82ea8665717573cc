"""The devices that a run computes on, and what results name them."""

from __future__ import annotations

import contextlib
import os

import jax

_MOST_CPU_DEVICES = 8  # the parts of a batch become small, and a product with few rows slow


def device_name() -> str:
    """The default device as results should name it: "cpu (2 cores)", "NVIDIA H100 80GB HBM3"."""
    device = jax.devices()[0]
    return device.device_kind if device.platform != "cpu" else f"cpu ({_cores()} cores)"


def use_all_cores() -> None:
    """Make a CPU device of every core, so that each trains on its part of a batch.

    XLA's CPU backend runs a convolution on a single thread, and small operations of several threads
    spend their time handing over. Devices are at most eight and a power of two, by which batches
    divide. Their number is left as it is if it was given, in JAX_NUM_CPU_DEVICES or XLA_FLAGS, or
    if jax has been used already.
    """
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if given or jax.config.jax_num_cpu_devices != -1:  # type: ignore[attr-defined]
        return
    power = min(_cores(), _MOST_CPU_DEVICES).bit_length() - 1
    # jax refuses once it has been used, as it has where this runs inside other programs.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", 2**power)


def compile_quickly() -> None:
    """Have XLA compile quickly rather than well, unless XLA_FLAGS is set: for programs run once.

    jax reads it when it is first used.
    """
    # Later versions lack this flag, and would abort on it.
    early = "--xla_cpu_use_fusion_emitters=false " if jax.__version_info__ < (0, 11) else ""
    os.environ.setdefault("XLA_FLAGS", early + "--xla_backend_optimization_level=0")


def _cores() -> int:
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
