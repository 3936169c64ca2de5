"""The process behind a Loader: fills slots in order and reports each one. No torch, so that it starts at once."""

import contextlib
import faulthandler
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from multiprocessing.connection import Connection, Pipe

from m3i_large.data.producer import LoaderJob, Pending, Producer
from m3i_large.data.slots import SharedMemory
from m3i_large.errors import OutageError, UserError

# Gets the connection's and the memory's descriptors, the memory's size, and the path for imports.
PROGRAM = """
import sys
connection, descriptor, num_bytes, *sys.path = sys.argv[1:]
from multiprocessing.connection import Connection
from m3i_large.data.loader_process import serve
from m3i_large.data.slots import SharedMemory
serve(Connection(int(connection)), SharedMemory(int(num_bytes), descriptor=int(descriptor)))
"""


def start_process(memory: SharedMemory, job: LoaderJob, first: int) -> "tuple[subprocess.Popen[bytes], Connection]":
    """Starts a process that fills slots of `memory` with micro-batches from index `first` on.

    A plain child rather than multiprocessing's: that would import the program that was started once more, torch with
    it, and would wait at exit for a process that heeds no SIGTERM.

    Returns:
        The process, and the connection to it: send it the numbers of free slots; receive (slot, index, bad samples,
        retries) for each micro-batch in order, or the exception that ended it. It ends when the connection closes.
    """
    ours, theirs = Pipe()
    descriptors = (theirs.fileno(), memory.descriptor)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, descriptors), str(memory.num_bytes), *sys.path],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
    )
    theirs.close()
    ours.send((job, first))
    return process, ours


def serve(connection: Connection, memory: SharedMemory) -> None:
    """What the process does: runs until the other end of `connection` closes, however that comes about."""
    # Signals to the whole group are the trainer's to answer: it may still need batches for a last checkpoint.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    begun: queue.Queue[tuple[int, Pending]] = queue.Queue()
    try:
        job, index = connection.recv()
        producer = Producer(job)
        threading.Thread(target=_send, args=(connection, producer, begun), daemon=True).start()
        layout = job.layout
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
