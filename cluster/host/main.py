"""`sheep`: reads the command line, then hands over to the daemon. Nothing large is imported before it is checked."""

from __future__ import annotations

import os
import sys

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.host.options import Options, Refused, parse


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 after help, version, a start as daemon or an orderly end in the foreground; else 1."""
    from sheepdog.cluster.drivers import registry

    sys.set_int_max_str_digits(0)  # no number is too long to be refused in a line
    try:
        options = parse(
            sys.argv[0],
            sys.argv[1:] if arguments is None else arguments,
            registry.available(),
            registry.default,
            registry.absent(),
        )
    except UsageError as error:
        print(error, file=sys.stderr)
        if isinstance(error, Refused):
            print(error.output, end="")
        return 1
    if not isinstance(options, Options):
        try:
            print(options, end="", flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
            if not isinstance(error, BrokenPipeError):  # `sheep --help | head`
                print(f"sheep: cannot write the output: {error.strerror}", file=sys.stderr)
                return 1
        return 0
    from sheepdog.cluster.host.daemon import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
