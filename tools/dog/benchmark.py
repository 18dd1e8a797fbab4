"""`dog benchmark io`: overwrites whole objects of a volume as fast as it goes (cli.md 2.10). Use with -T."""

from __future__ import annotations

import itertools
import os
import threading

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.ids import data_oid
from sheepdog.tools.dog.context import Context, dial
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import confirm, text
from sheepdog.tools.dog.values import positive
from sheepdog.tools.dog.volumes import Opened, name_of, open_volume

QUEUES = ("ordered", "dynamic", "fixed")
DEFAULT_REQUESTS = 1000
DYNAMIC_THREADS = 2 * (os.cpu_count() or 1)  # what a queue that grows with its work comes to
_QUESTION = """\
Caution! benchmark io command will erase all data of target VDI.
 Are you sure you want to continue? [yes/no]"""


def io(context: Context) -> None:
    """Prints nothing; a failed request ends it."""
    queue = context.value("workqueue", "ordered")
    if queue not in QUEUES:
        raise Failure(f"unknown workqueue type: {queue}\nassumed workqueue types: ordered, dynamic", 2)
    threads = positive(context, "nr_threads", "number of threads", 1)
    total = positive(context, "total", "number of requests", DEFAULT_REQUESTS)
    if queue == "ordered":
        threads = 1
    elif queue == "dynamic":
        threads = max(threads, DYNAMIC_THREADS)
    word = context.argument(0)
    context.nodes()
    volume = open_volume(context.gateway(), name_of(word), code=2)
    count = volume.inode.object_count
    if not count or any(volume.owner(index) != volume.vid for index in range(count)):
        raise Failure(f"VDI {word} has unallocated data", 2)
    if not context.flag("force"):
        confirm(_QUESTION)
    failures: list[OSError] = []
    numbers = itertools.count()
    workers = [
        threading.Thread(target=_write, args=(context, volume, numbers, total, failures)) for _ in range(threads)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        error = failures[0]
        raise Failure(text(error.result) if isinstance(error, SheepError) else str(error), 2)


def _write(
    context: Context, volume: Opened, numbers: itertools.count[int], total: int, failures: list[OSError]
) -> None:
    """One thread: the next request of all, until there is none left or one has failed."""
    data = os.urandom(volume.inode.object_size)
    try:
        connection = dial((context.host, context.port))
        while not failures and (number := next(numbers)) < total:
            admin.write_object(connection, data_oid(volume.vid, number % volume.inode.object_count), 0, data)
        connection.close()
    except OSError as error:
        failures.append(error)
    except Failure:
        failures.append(ConnectionError("no connection"))
