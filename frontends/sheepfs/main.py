"""The command `sheepfs`: mounts, goes into the background, serves until unmounted.

The mount happens before the fork, so that its failure is the command's exit status; the command returns when the
daemon serves. Whatever ends the daemon, it leaves no dead mount behind.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import stat
import sys

from sheepdog.cluster.client.memory import lock_memory, may_lock_all, write_back_for_the_kernel
from sheepdog.cluster.core.errors import UsageError
from sheepdog.frontends.sheepfs.daemon import Readiness, go_into_background, log_to_stderr, log_to_syslog
from sheepdog.frontends.sheepfs.files import Settings
from sheepdog.frontends.sheepfs.filesystem import FileSystem
from sheepdog.frontends.sheepfs.gateway import GatewayCluster
from sheepdog.frontends.sheepfs.options import USAGE, Options, parse
from sheepdog.frontends.sheepfs.transport import MountError, MountOptions, Transport, log
from sheepdog.streams import open_streams, show


def main() -> int:
    """Entry point; the exit status of cli.md 3: 0 mounted (or help), 1 anything else."""
    open_streams()
    try:
        options = parse(sys.argv[1:])
        if options.help:
            return show("sheepfs", USAGE)
        return run(options)
    except (UsageError, MountError) as problem:
        print(problem, file=sys.stderr)
        return 1


def run(options: Options) -> int:
    """Mount and serve. Returns (in the foreground or the daemon) when the file system is unmounted."""
    mountpoint = _checked(options.mountpoint)
    transport = chosen(options.transport)
    log_to_stderr(options.debug)
    transport.mount(MountOptions(mountpoint, options.debug))
    try:
        readiness = Readiness()
        if not options.foreground:
            readiness = go_into_background()
            log_to_syslog()
        asyncio.run(_serve(transport, options, readiness))
        return 0
    except Exception as problem:
        log.critical("sheepfs ends: %s", problem, exc_info=problem)
        return 1
    finally:
        transport.close()


async def _serve(transport: Transport, options: Options, readiness: Readiness) -> None:
    _stay_in_memory()
    settings = Settings(options.page_cache, options.object_cache)
    files = FileSystem(GatewayCluster(options.address), settings, options.may_remove)
    await serve_until_unmounted(transport, files, readiness)


def _stay_in_memory() -> None:
    """As far as it is permitted."""
    if may_lock_all():
        try:
            lock_memory()
        except OSError as problem:
            log.info("%s", problem.strerror)
    write_back_for_the_kernel(log.info)


async def serve_until_unmounted(transport: Transport, files: FileSystem, readiness: Readiness) -> None:
    """Serve until the kernel has unmounted or a signal says stop; then flush what is still mounted."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, transport.stop)
    readiness.announce()
    try:
        await transport.serve(files)
    finally:
        await files.close()


def _checked(mountpoint: str) -> str:
    """The mount point as an absolute path; `UsageError` in libfuse's words if it cannot be one."""
    try:
        if not stat.S_ISDIR(os.stat(mountpoint).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as problem:
        raise UsageError(f"fuse: bad mount point `{mountpoint}': {problem.strerror}") from None
    return os.path.realpath(mountpoint)


def chosen(name: str) -> Transport:
    """The transport of this name; `auto` is the direct one where permitted. Imported only when chosen."""
    if name == "direct" or (name == "auto" and os.geteuid() == 0):
        from sheepdog.frontends.sheepfs.direct_transport import DirectTransport

        return DirectTransport()
    try:
        from sheepdog.frontends.sheepfs.pyfuse3_transport import Pyfuse3Transport
    except ImportError as problem:
        raise UsageError(f"the pyfuse3 transport is not installed ({problem})") from None
    return Pyfuse3Transport()


if __name__ == "__main__":
    sys.exit(main())
