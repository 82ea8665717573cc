"""Measures of quality against their definitions."""

from __future__ import annotations

import math

import pytest

from experiments.common.metrics import psnr


def test_psnr_of_known_errors():
    assert psnr(1.0) == 0
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(0.25) == pytest.approx(6.0206, abs=1e-4)
    assert psnr(0) == math.inf
