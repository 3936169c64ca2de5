"""The process behind a Loader: fills slots in order and reports each one. No torch, so that it starts at once."""

import contextlib
import faulthandler
import os
import queue
import signal
import threading
import traceback
from multiprocessing.connection import Connection

from m3i_large.data.producer import LoaderJob, Pending, Producer
from m3i_large.data.slots import SharedMemory
from m3i_large.errors import OutageError, UserError


def serve(connection: Connection, memory: SharedMemory, job: LoaderJob, first: int) -> None:
    """Runs until the other end of `connection` closes, however that comes about.

    Receives numbers of free slots; sends (slot, index, bad samples, retries) for each micro-batch in order, or the
    exception that ended it.
    """
    # Signals to the whole group are the trainer's to answer: it may still need batches for a last checkpoint.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    begun: queue.Queue[tuple[int, Pending]] = queue.Queue()
    try:
        producer = Producer(job)
        threading.Thread(target=_send, args=(connection, producer, begun), daemon=True).start()
        layout, index = job.layout, first
        while True:
            number = connection.recv()
            begun.put((number, producer.start(index, layout.slot(memory.buffer, number))))
            index += 1
    except EOFError:
        os._exit(0)
    except BaseException as error:
        _report(connection, error)
        os._exit(1)


def _send(connection: Connection, producer: Producer, begun: "queue.Queue[tuple[int, Pending]]") -> None:
    try:
        while True:
            number, pending = begun.get()
            bad = producer.finish(pending)
            connection.send((number, pending.index, bad, producer.retries))
    except BrokenPipeError:
        os._exit(0)
    except BaseException as error:
        _report(connection, error)
        os._exit(1)


def _report(connection: Connection, error: BaseException) -> None:
    """Sends an error to the trainer: as it is if it says what is wrong, else with its traceback."""
    known = isinstance(error, UserError | OutageError)
    message = (
        error if known else RuntimeError(f"in the loader's process:\n{''.join(traceback.format_exception(error))}")
    )
    with contextlib.suppress(OSError):
        connection.send(message)
