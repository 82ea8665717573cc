"""Metrics on disk: no gap, no repeat, whatever the clock and the disk do."""

from __future__ import annotations

import resource
import struct
import time

import pytest
from tensorboardX.proto.event_pb2 import Event

from experiments.common.errors import UserError
from experiments.common.metrics_log import MetricsLog, read_metrics


def events(path):
    """(step, name, value, wall time) of every number that TensorBoard would show."""
    (file,) = (path / "tensorboard").glob("events*")
    content, found = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        found += [(event.step, v.tag, v.simple_value, event.wall_time) for v in event.summary.value]
        content = content[16 + length :]
    return found


def log_rows(path, start, steps, scale):
    log = MetricsLog(path, start)
    for step in steps:
        log.write(step, {"loss": scale / step, "seconds": 2.0 * step})
    log.close()


def test_metrics_after_resuming_have_no_gap_and_no_repeat(tmp_path):
    log_rows(tmp_path, 0, (5, 10, 15, 20), 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "lo')  # killed while writing
    log_rows(tmp_path, 10, (15, 20, 25), 2)
    expected = [1 / 5, 1 / 10, 2 / 15, 2 / 20, 2 / 25]
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25]
    assert [row["loss"] for row in rows] == expected
    shown = [event for event in events(tmp_path) if event[1] == "loss"]
    assert [event[0] for event in shown] == [5, 10, 15, 20, 25]
    assert [event[2] for event in shown] == pytest.approx(expected)


def test_a_clock_that_jumps_back_disturbs_no_order(tmp_path, monkeypatch):
    log_rows(tmp_path, 0, (5, 10), 1)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    log_rows(tmp_path, 10, (15, 20), 1)
    shown = [event for event in events(tmp_path) if event[1] == "loss"]
    assert [event[0] for event in shown] == [5, 10, 15, 20]
    assert [event[3] for event in shown] == [1e9 - 10, 1e9, 1e9 + 10, 1e9 + 20]


def test_what_is_not_finite_is_left_out_of_the_picture(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(5, {"loss": float("nan"), "bound": 1.0})
    log.close()
    MetricsLog(tmp_path, 5).close()
    assert read_metrics(tmp_path) == [{"step": 5, "loss": None, "bound": 1.0}]
    assert [event[1] for event in events(tmp_path)] == ["bound"]


def test_a_full_disk_is_one_sentence_and_whole_rows_remain(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = MetricsLog(tmp_path, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))

    def train():
        for step in range(1, 100):
            log.write(step, {"loss": 1 / step})

    message = r"cannot be written .*File too large.*--resume"
    try:
        for action in (train, log.close):  # what is left in buffers does not fit either
            with pytest.raises(UserError, match=message):
                action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    rows = read_metrics(tmp_path)
    assert rows == [{"step": step, "loss": 1 / step} for step in range(1, len(rows) + 1)]
    assert len(rows) > 5
