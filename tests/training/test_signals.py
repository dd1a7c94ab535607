"""A signal ends a run after the current step, with a checkpoint from which it can resume."""

import os
import signal

import chex
import orbax.checkpoint as ocp
import pytest

from .test_loop import run, values


def test_sigterm_stops_after_the_step_with_a_checkpoint(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    whole = run(tmp_path / "whole", 12)

    def log(count, metrics):
        if count == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = run(tmp_path / "parts", 12, log=log, log_every=1, save_every=100)
    assert (stopped.step, stopped.preempted) == (6, True)
    assert signal.getsignal(signal.SIGTERM) == before
    made = []
    resumed = run(tmp_path / "parts", 12, log=lambda count, _: made.append(count), log_every=1)
    assert (resumed.step, resumed.preempted, made) == (12, False, list(range(7, 13)))
    chex.assert_trees_all_equal(values(resumed.carry), values(whole.carry))


@pytest.fixture
def ctrl_c():
    """Installs the default handler of an ordinary program, since parallel test workers ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_after_the_step_with_a_checkpoint(ctrl_c, tmp_path):
    # BUG: the steps since the last checkpoint were lost: in a run shorter than `save_every`, all of them.
    before = signal.getsignal(signal.SIGINT)
    whole = run(tmp_path / "whole", 12)
    log = lambda count, metrics: os.kill(os.getpid(), signal.SIGINT) if count == 5 else None
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 12, log=log, log_every=1, save_every=100)
    assert signal.getsignal(signal.SIGINT) == before
    made = []
    resumed = run(tmp_path / "parts", 12, log=lambda count, _: made.append(count), log_every=1)
    assert made == list(range(7, 13))
    chex.assert_trees_all_equal(values(resumed.carry), values(whole.carry))


def test_a_second_ctrl_c_ends_a_run_at_once(ctrl_c, tmp_path):
    def log(count, metrics):
        if count == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 12, log=log, log_every=1)


def test_a_signal_during_the_last_checkpoint_is_reported(tmp_path, monkeypatch):
    # BUG: the signal was swallowed, and the process continued.
    close = ocp.CheckpointManager.close

    def closed(manager):
        os.kill(os.getpid(), signal.SIGTERM)
        close(manager)

    monkeypatch.setattr(ocp.CheckpointManager, "close", closed)
    ended = run(tmp_path, 4)
    assert (ended.step, ended.preempted) == (4, True)
