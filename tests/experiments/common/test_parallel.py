"""Data parallelism on simulated devices, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# Trains a small generator for five steps on one device of two, then on both.
CODE = """
import json, sys
from dataclasses import replace
from pathlib import Path
import jax, numpy as np
from experiments.common import training
from experiments.common.data import ArrayImages, ImageData, Split
from experiments.common.errors import UserError
from experiments.common.parallel import DataParallel
from experiments.common.runs import RunRecord, read_metrics, start_run
from experiments.generative.config import PRESETS
from experiments.generative.train import train_joint

config = replace(PRESETS["smoke"], steps=5, hidden=16, decoder_hidden=16, latent_dim=3,
    batch_size=8, inner_steps=8, warm_starts=16, log_every=1, checkpoint_every=5)
pixels = np.random.default_rng(0).random((16, 4, 4, 1), np.float32)
split = Split(ArrayImages(pixels))
found = {}
for devices in (jax.devices()[:1], jax.devices()):
    training.DataParallel = lambda: DataParallel(devices)
    folder = Path(sys.argv[1]) / str(len(devices))
    run = start_run(folder, RunRecord.new("generative", "smoke", 0, config))
    train_joint(config, run, ImageData("random", split, split))
    found[len(devices)] = [row["loss"] for row in read_metrics(folder)]
both = DataParallel()
parts = both.spread({"image": pixels})["image"].addressable_shards
found["parts"] = [part.data.shape[0] for part in parts]
copies = both.replicate(np.ones(3)).addressable_shards
found["copies"] = [part.data.shape[0] for part in copies]
try:
    both.spread(pixels[:7])
except UserError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_devices_train_as_one_does_and_uneven_batches_are_refused(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        cwd=ROOT, env=os.environ | flags, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["2"] == pytest.approx(found["1"], rel=1e-4)
    assert found["parts"] == [8, 8]
    assert found["copies"] == [3, 3]
    assert "a batch of 7 cannot be spread evenly over 2 devices" in found["refused"]
