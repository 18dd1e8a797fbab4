"""A record of every command line, for clusters with several administrators: SHEEPDOG_DOG_LOG (cli.md 2.1)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

_ONE_LINE = {ord("\n"): "\\n", ord("\r"): "\\r"}  # nobody writes lines that look like another command's


def record(words: Sequence[str]) -> None:
    """Appends the words to the file SHEEPDOG_DOG_LOG_PATH, or sends them to syslog. Never fails the command."""
    line = " ".join(["dog", *words]).translate(_ONE_LINE)
    path = os.environ.get("SHEEPDOG_DOG_LOG_PATH")
    if not path:
        import syslog

        syslog.openlog("sheepdog admin operation", 0, syslog.LOG_USER)
        syslog.syslog(syslog.LOG_INFO, line)
        return
    try:
        with open(path, "a", encoding="utf-8", errors="surrogateescape") as log:
            log.write(f"{time.strftime('%Y %b %d %H:%M:%S')} : {line}\n")
    except OSError:
        return
