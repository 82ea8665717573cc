"""Measures of quality."""

from __future__ import annotations

import math


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]: `-10 log10(MSE)`.

    Args:
        mean_squared_error: Mean over all pixels, channels and images together, so that it is not
            the mean of the images' own ratios; at least 0.
    """
    return math.inf if mean_squared_error == 0 else -10 * math.log10(mean_squared_error)
