"""`sheep`: reads the command line, then hands over to the daemon. Nothing large is imported before it is checked."""

from __future__ import annotations

import sys

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.host.options import Options, Refused, parse
from sheepdog.streams import open_streams, show


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 after help, version, a start as daemon or an orderly end in the foreground; else 1."""
    from sheepdog.cluster.drivers import registry

    open_streams()
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
        return show("sheep", options)
    from sheepdog.cluster.host.daemon import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
