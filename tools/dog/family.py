"""`dog vdi tree|graph`: how volumes descend from each other (cli.md 2.6)."""

from __future__ import annotations

import os
import sys

from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.output import human_size, minute, second
from sheepdog.tools.dog.vdi_list import headers

HERE = "(you are here)"
_BOLD, _NORMAL = "\033[1m", "\033[0m"


def tree(context: Context) -> None:
    """One root per name; a volume hangs on its parent only if that has the same name."""
    inodes = list(headers(context.gateway()))
    if context.json:
        _print_json(inodes)
        return
    names = {inode.vdi_id: inode.name for inode in inodes}
    children: dict[int, list[InodeHeader]] = {}
    roots: dict[bytes, list[InodeHeader]] = {}
    for inode in inodes:
        if names.get(inode.parent_vdi_id) == inode.name:
            children.setdefault(inode.parent_vdi_id, []).append(inode)
        else:
            roots.setdefault(inode.name, []).append(inode)
    bold = sys.stdout.isatty()
    for name, firsts in roots.items():
        title = os.fsdecode(name)
        for first in firsts:
            print("\n".join(_draw(title + "---", first, children, bold)))


def _print_json(inodes: list[InodeHeader]) -> None:
    """Flat: a tree of a thousand snapshots is deeper than JSON parsers go."""
    from sheepdog.tools.dog.records import print_json

    print_json(
        [
            {
                "vdi_id": f"{inode.vdi_id:x}",
                "parent": f"{inode.parent_vdi_id:x}",
                "name": os.fsdecode(inode.name),
                "tag": os.fsdecode(inode.tag),
                "snapshot": inode.is_snapshot,
                "created": inode.create_time >> 32,
            }
            for inode in inodes
        ]
    )


def _draw(prefix: str, inode: InodeHeader, children: dict[int, list[InodeHeader]], bold: bool) -> list[str]:
    """The lines of a subtree, the first one beginning with `prefix`."""
    lines: list[str] = []
    # Chains of snapshots are as long as people let them grow, so only branches recurse.
    width = len(prefix)
    line = prefix
    while True:
        label = f"[{minute(inode.create_time >> 32)}]" if inode.is_snapshot else HERE
        line += f"{_BOLD}{label}{_NORMAL}" if bold and label == HERE else label
        width += len(label)
        below = children.get(inode.vdi_id, [])
        if len(below) != 1:
            break
        line += "---"
        width += 3
        inode = below[0]
    if not below:
        return [line]
    for position, child in enumerate(below):
        if position == 0:
            start = line + "-+-"
        elif position < len(below) - 1:
            start = " " * width + " |-"
        else:
            start = " " * width + " `-"
        branch = _draw(" " * (width + 3), child, children, bold)
        lines.append(start + branch[0][width + 3 :])
        bar = " |" if position < len(below) - 1 else "  "
        lines += [" " * width + bar + row[width + 2 :] for row in branch[1:]]
    return lines


def graph(context: Context) -> None:
    """Graphviz text; arrows come from the parent's vid."""
    if context.json:
        _print_json(list(headers(context.gateway())))
        return
    connection = context.gateway()
    print('digraph G {\n  node [shape = "box", fontname = "Courier"];\n\n  "0" [shape = "ellipse", label = "root"];\n')
    for inode in headers(connection):
        print(_node(inode))
    print("}")


def _quoted(text: str) -> str:
    """Text between the quotes of a Graphviz file."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _node(inode: InodeHeader) -> str:
    name = os.fsdecode(inode.name)
    date, clock = second(inode.create_time >> 32).split(" ")
    tag = inode.snap_id if inode.is_snapshot else 0
    values = (
        ("Name:", name),
        ("Tag:", f"{tag:x}"),
        ("Size:", human_size(inode.vdi_size)),
        ("Date:", date),
        ("Time:", clock),
    )
    # Each line is 16 wide: the label, then its value right-aligned.
    label = "\\n".join(_quoted(f"{title}{value:>{16 - len(title)}}") for title, value in values)
    lines = [
        f'  "{inode.parent_vdi_id:x}" -> "{inode.vdi_id:x}";',
        f'  "{inode.vdi_id:x}" [',
        f'    group = "{_quoted(name)}",',
        f'    label = "{label}"' + ("" if inode.is_snapshot else ","),
    ]
    if not inode.is_snapshot:
        lines.append('    color="red"')
    lines += ["  ];", ""]
    return "\n".join(lines)
