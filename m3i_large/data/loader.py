"""One rank's stream of batches, made by a process of its own: decoding never competes with kernel launches for the GIL.

The process fills slots of shared memory; a batch's tensors are that memory, never copied on the way. Its loss, its
silence and its errors all end in one clear message here.
"""

import contextlib
import signal
import subprocess
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from m3i_large.data.bad_samples import BadSampleLedger
from m3i_large.data.batch import Batch
from m3i_large.data.loader_process import start_process
from m3i_large.data.producer import BadSample, LoaderJob, Producer, private_slot
from m3i_large.data.slots import SharedMemory, Slot
from m3i_large.errors import OutageError

# Told about every sample that was replaced, when its batch is handed out.
OnBad = Callable[[BadSample], None]
POLL_S, GRACE_S = 1.0, 2.0


class Loader(Iterator[Batch]):
    """One rank's endless stream of micro-batches, from `start_step` on.

    A batch is valid until the next one is asked for: its memory is filled again.

    Args:
        job: what to load.
        start_step: first step to give out.
        on_bad: told about every sample that was replaced.
        pinned: lock the memory for copies to a GPU.

    Raises:
        UserError: (here) a mix block does not fit a lane; (from next) a class is not below num_classes, a sample and
            all its substitutes cannot be used, or more samples were bad than data.bad_samples allows.
        OutageError: (from next) the storage failed for data.retry_s, or the process died or fell silent.
    """

    def __init__(
        self, job: LoaderJob, *, start_step: int = 0, on_bad: OnBad | None = None, pinned: bool = False
    ) -> None:
        self.job, self._on_bad = job, on_bad
        job.partners(np.zeros(job.mixture.slots, np.int64), 0)  # refuses a block that does not fit, before any work
        self._ledger = BadSampleLedger(job.config.bad_samples, [source.name for source in job.sources])
        first = start_step * job.accumulation
        self._maker = _Inline(job, first) if job.config.threads == 0 else _Process(job, first, pinned=pinned)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops what was prepared and ends the process."""
        self._maker.close()

    @property
    def retries(self) -> int:
        """Reads repeated so far because the storage failed."""
        return self._maker.retries

    def __next__(self) -> Batch:
        index, slot, bad = self._maker.next()
        self._ledger.count(slot["source_N"], slot["substitute_N"], bad)
        if self._on_bad:
            for sample in bad:
                self._on_bad(sample)
        self._ledger.check()
        return _batch(self.job, index, slot)

    def batch_at(self, step: int, micro_step: int) -> Batch:
        """The batch of one micro-step, whatever was given out before; made in this process."""
        maker = _Inline(self.job, step * self.job.accumulation + micro_step)
        index, slot, _ = maker.next()
        return _batch(self.job, index, slot)


def _batch(job: LoaderJob, index: int, slot: Slot) -> Batch:
    step, micro_step = divmod(index, job.accumulation)
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in slot.items()}
    return Batch(
        **tensors,
        step=step,
        micro_step=micro_step,
        text_rows=job.most_rows("image_text"),
        category_rows=job.most_rows("image_category"),
    )


class _Inline:
    """Makes each batch when it is asked for, in this process and thread, in memory of its own."""

    def __init__(self, job: LoaderJob, first: int) -> None:
        inline = job.config.model_copy(update={"threads": 0})
        self._producer = Producer(replace(job, config=inline))
        self._index = first

    def next(self) -> tuple[int, Slot, list[BadSample]]:
        """The next micro-batch."""
        slot = private_slot(self._producer.job.layout)
        pending = self._producer.start(self._index, slot)
        bad = self._producer.finish(pending)
        self._index += 1
        return pending.index, slot, bad

    @property
    def retries(self) -> int:
        """As Producer.retries."""
        return self._producer.retries

    def close(self) -> None:
        """Nothing to end."""


class _Process:
    """Takes batches from the loader's process in order, and gives slots back when their batch is done with."""

    def __init__(self, job: LoaderJob, first: int, *, pinned: bool) -> None:
        self._timeout = job.config.timeout_s
        self._pinned, self.retries, self._index = pinned, 0, first
        layout = job.layout
        # One slot is being used, one may still be on its way to the GPU.
        count = job.config.prefetch + 2
        memory = SharedMemory(count * layout.num_bytes)
        self._slots = [layout.slot(memory.buffer, index) for index in range(count)]
        if pinned:
            _pin(memory)
        self._process, self._connection = start_process(memory, job, first)
        memory.close_descriptor()
        self._finalize = weakref.finalize(self, _end, self._connection, self._process)  # at exit, too
        self._given: deque[tuple[int, Any]] = deque()
        for index in range(count):
            self._connection.send(index)

    def next(self) -> tuple[int, Slot, list[BadSample]]:
        """The next micro-batch; waits for it at most data.timeout_s."""
        self._release()
        number, index, bad, self.retries = self._receive()
        if index != self._index:
            raise RuntimeError(f"the loader's process gave micro-step {index}, needed {self._index}")
        self._index += 1
        self._given.append((number, None))
        return index, self._slots[number], bad

    def close(self) -> None:
        """Ends the process."""
        self._finalize()

    def _release(self) -> None:
        """Gives back the slot of the last batch; on a GPU when the copies made from it so far are done."""
        if self._given and self._pinned:
            number, event = self._given.pop()
            event = torch.cuda.Event()
            event.record()
            self._given.append((number, event))
        while self._given:
            number, event = self._given[0]
            if event is not None and not event.query():
                if len(self._given) < 2:
                    return
                event.synchronize()
            self._given.popleft()
            with contextlib.suppress(BrokenPipeError):  # its last message says why
                self._connection.send(number)

    def _receive(self) -> tuple[int, int, list[BadSample], int]:
        began = time.monotonic()
        while not self._connection.poll(POLL_S):
            if time.monotonic() - began > self._timeout:
                self._process.send_signal(signal.SIGUSR1)  # its threads' stacks go to standard error
                time.sleep(POLL_S)
                raise OutageError(
                    f"the loader gave no batch for {self._timeout:.0f} s (data.timeout_s); its stacks are above"
                )
        try:
            message = self._connection.recv()
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            why = f"signal {-code}" if code < 0 else f"status {code}"
            raise OutageError(f"the loader's process died ({why}); if it was killed, by lack of memory?") from None
        if isinstance(message, BaseException):
            raise message
        return message


def _end(connection: Connection, process: "subprocess.Popen[bytes]") -> None:
    connection.close()  # the process ends when nobody listens
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _pin(memory: SharedMemory) -> None:
    """Locks the slots' pages, so that copies to the GPU run beside everything else."""
    address = np.frombuffer(memory.buffer, np.uint8).ctypes.data
    error = torch.cuda.cudart().cudaHostRegister(address, memory.num_bytes, 0)
    if int(error):
        raise OutageError(f"cudaHostRegister: error {int(error)} for {memory.num_bytes} bytes of batches")
