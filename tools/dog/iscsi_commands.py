"""The commands of `dog iscsi`. Nothing here imports the code of a command."""

from __future__ import annotations

from sheepdog.tools.dog.options import Option
from sheepdog.tools.dog.table import JSON, LAST, NETWORK, RAW, Command

_HOST = Option("", "host", "the name under which this machine exports (default: its host name)", True)
_IQN = Option("", "iqn", "name of the target (default: made of the names of host and volume)", True)
_INITIATOR = Option("", "initiator", "names of the initiators that are let in, with commas between", True)
ISCSI = (
    Command(
        "export",
        (
            _INITIATOR,
            Option("", "portal", "addresses to listen at (default: 0.0.0.0:3260)", True),
            _IQN,
            Option("", "chap", "the user as which initiators prove themselves", True),
            Option(
                "", "secret-file", "file with that user's secret (root's, mode 600, at this path on each host)", True
            ),
            Option("", "mutual", "the user as which the target proves itself", True),
            Option("", "mutual-secret-file", "file with that user's secret", True),
            Option("", "discovery", "the user who may ask this host for its targets", True),
            Option("", "discovery-secret-file", "file with that user's secret", True),
            Option("", "readonly", "let nobody write"),
            Option("", "shared", "several hosts export it at a time, each through its own sheep (multipath)"),
            _HOST,
            *NETWORK,
            *LAST,
        ),
        "export an image to iSCSI initiators",
        "iscsi:export",
        "<vdiname>",
    ),
    Command("list", (_HOST, *NETWORK, RAW, *LAST, JSON), "list exported images", "iscsi:list_exports"),
    Command(
        "unexport",
        (
            Option("f", "force", "cut off initiators that are logged in"),
            _HOST,
            *NETWORK,
            *LAST,
        ),
        "end the export of an image by this host",
        "iscsi:unexport",
        "<vdiname>",
    ),
    Command(
        "apply",
        (_HOST, *NETWORK, *LAST),
        "export what this host shall, and nothing else",
        "iscsi:apply",
        "[vdiname...]",
    ),
    Command("clear", (_HOST, *NETWORK, *LAST), "take down what this host exports, until apply", "iscsi:clear"),
    Command(
        "tgt-config",
        (
            _INITIATOR,
            _IQN,
            Option("", "tid", "number of tgtd's target (default: 1)", True),
            _HOST,
            *NETWORK,
            *LAST,
            JSON,
        ),
        "show how tgtd exports an image",
        "iscsi:tgt_config",
        "<vdiname>",
    ),
)
