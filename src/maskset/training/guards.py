"""Context managers around a run: they restore process-wide settings, and explain errors for lack of memory."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.state import AcceleratorState

from maskset.data.loading import READER_KILLED
from maskset.errors import ResourceError

_OUT_OF_MEMORY = "out of memory", "can't allocate memory", "not enough memory", "Storage size calculation overflowed"


@contextmanager
def restore_process_settings() -> Iterator[None]:
    """Restore what a run sets for the whole process: random states, torch's threads, accelerate's state, the environment."""
    environment, accelerator = dict(os.environ), dict(AcceleratorState._shared_state)
    threads, states = torch.get_num_threads(), (random.getstate(), np.random.get_state(), torch.get_rng_state())
    device_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if device_states:
            torch.cuda.set_rng_state_all(device_states)
        torch.set_num_threads(threads)
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(accelerator)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextmanager
def explain_shortages() -> Iterator[None]:
    """Turn errors for lack of memory, or of a killed reader process, into a ResourceError that names a remedy.

    Raises:
        ResourceError: torch or NumPy could not allocate memory, or a process that reads images was killed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[-1][:200]  # an error in a reader process includes its traceback
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in reason for text in _OUT_OF_MEMORY):
            raise ResourceError(
                "not enough memory: use a smaller train.batch_size, a larger train.accumulate, "
                f"train.checkpoint_activations, smaller images (data.long_side), or a smaller model. {reason}"
            ) from error
        if "DataLoader worker (pid" in str(error):  # raised at any place by torch's handler of SIGCHLD
            raise ResourceError(READER_KILLED) from error
        raise
