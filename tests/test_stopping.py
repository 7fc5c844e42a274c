"""A run that is asked to stop ends soon, with everything saved."""

import os
import signal
import threading
import time

import pytest

from basis_jax.runs.stopping import Stopper, StopRequested
from basis_jax.verify import make_verifier
from basis_jax.verify.pool import Stopped

ENDLESS = "9^{9^{9^{9^{9}}}}"  # takes all the time that the grader has


def ask(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_droppable_work_is_dropped_at_once(number):
    with Stopper() as stopper, pytest.raises(StopRequested):
        with stopper.droppable():
            ask(number)
            time.sleep(10)
    assert stopper.requested == number
    stopped = stopper.stopped_after(3)
    assert stopped.exit_code == 128 + number
    assert str(stopped) == (
        f"stopped by {number.name} with everything up to step 3 saved; the same command goes on "
        "there"
    )
    assert str(stopper.stopped_after(None)) == (
        f"stopped by {number.name} before a step was saved; the same command starts the run again"
    )


def test_other_work_is_finished_and_the_next_is_not_begun():
    finished = []
    with Stopper() as stopper:
        ask()
        finished.append("update")
        with pytest.raises(StopRequested), stopper.droppable():
            finished.append("the next sampling")
    assert finished == ["update"]


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_is_the_usual_one(interruptible):
    with Stopper(), pytest.raises(KeyboardInterrupt):
        ask(signal.SIGINT)
        ask(signal.SIGINT)


def test_afterwards_signals_do_what_they_did():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stopper():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.slow
def test_grading_that_is_stuck_is_given_up():
    """Hours of grading are asked for; stop ends the call within seconds."""
    seconds = []

    def grade(verifier):
        started = time.monotonic()
        with pytest.raises(Stopped):
            verifier.grade([f"\\boxed{{{i}+{ENDLESS}}}" for i in range(10_000)], ["x+1"] * 10_000)
        seconds.append(time.monotonic() - started)

    with make_verifier("math") as verifier:
        thread = threading.Thread(target=grade, args=(verifier,))
        thread.start()
        time.sleep(3)
        asked = time.monotonic()
        verifier.stop()
        thread.join(30)
        assert seconds and time.monotonic() - asked < 10
