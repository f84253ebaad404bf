"""Ctrl-C waits until a checkpoint can be written."""

import os
import signal
import threading

import pytest

from maskset.errors import Terminated
from maskset.training.interruption import Interruption


def press(number=signal.SIGINT):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_the_flag(number):
    with Interruption() as interruption:
        assert not interruption.requested
        press(number)
        assert interruption.requested


def test_the_second_one_stops_at_once_and_says_how_to_go_on():
    with Interruption():
        press()
        with pytest.raises(KeyboardInterrupt, match="--resume continues from the last checkpoint"):
            press()


def test_where_nothing_would_be_lost_the_first_one_stops_at_once():
    with (
        Interruption() as interruption,
        pytest.raises(KeyboardInterrupt, match="so you know"),
        interruption.raise_immediately("so you know"),
    ):
        press()


def test_a_signal_from_before_counts_there_too():
    with Interruption() as interruption:
        press()
        with pytest.raises(KeyboardInterrupt, match="so you know"), interruption.raise_immediately("so you know"):
            pytest.fail("goes on")


def test_afterwards_signals_wait_again():
    with Interruption() as interruption:
        with interruption.raise_immediately(""):
            pass
        press()
        assert interruption.requested


def test_outside_signals_do_what_they_did():
    before = signal.getsignal(signal.SIGINT)
    with Interruption():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_in_another_thread_signals_are_left_alone():
    before, states = signal.getsignal(signal.SIGINT), []

    def work():
        with Interruption() as interruption:
            states.append((signal.getsignal(signal.SIGINT), interruption.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert states == [(before, False)]


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_the_error_says_which_signal_it_was(number, error):
    with Interruption() as interruption:
        press(number)
        assert interruption.error is error
        with pytest.raises(error, match="stopped"), interruption.raise_immediately("stopped"):
            pytest.fail("goes on")


def test_sigterm_twice_is_one_request():
    with Interruption() as interruption:  # timeout and schedulers send it to the process and to its group
        press(signal.SIGTERM)
        press(signal.SIGTERM)
        assert interruption.requested


def test_a_process_that_reads_images_ignores_signals_until_training_has_ended():
    with Interruption() as interruption:
        interruption._process += 1  # as it is in a forked worker
        press()
        press(signal.SIGTERM)
        assert not interruption.requested
        interruption._ended[0] = 1
        with pytest.raises(SystemExit):
            press(signal.SIGTERM)
