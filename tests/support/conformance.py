"""libiscsi's test program: what an iSCSI target does against what the standard says, test by test."""

from __future__ import annotations

import re

SUITES = (
    "Inquiry", "Mandatory", "ModeSense6", "TestUnitReady", "ReadCapacity10", "ReadCapacity16", "Read6", "Read10",
    "Read12", "Read16", "Write10", "Write12", "Write16", "WriteSame10", "WriteSame16", "WriteVerify10", "WriteVerify12",
    "WriteVerify16", "Verify10", "Verify12", "Verify16", "Unmap",
)  # fmt: skip
SELECTED = "--test=" + ",".join(f"ALL.{suite}" for suite in SUITES)
_SUITE = re.compile(r"^Suite: (\w+)", re.MULTILINE)
# What is looked at after a test, such as reservations, may be remarked on behind its result.
_TEST = re.compile(r"^  Test: (\S+) \.\.\.(.*?)(passed|FAILED)(?=$|    \[SKIPPED\])", re.MULTILINE | re.DOTALL)


def outcomes(text: str) -> dict[str, str]:
    """`passed`, `skipped` or `failed` by `Suite.Test`. AssertionError if the program did not come to its end."""
    assert "Run Summary:" in text, text[-4000:]
    found = {}
    parts = _SUITE.split(text)
    for suite, tests in zip(parts[1::2], parts[2::2], strict=True):
        for name, remarks, end in _TEST.findall(tests):
            skipped = "[SKIPPED]" in remarks
            found[f"{suite}.{name}"] = "failed" if end == "FAILED" else "skipped" if skipped else "passed"
    return found


def failed(found: dict[str, str]) -> set[str]:
    return {name for name, outcome in found.items() if outcome == "failed"}


def passed(found: dict[str, str]) -> set[str]:
    return {name for name, outcome in found.items() if outcome == "passed"}


def summary(found: dict[str, str]) -> str:
    """How many suites and tests, with which outcome, and the names of the failures."""
    suites = {name.partition(".")[0] for name in found}
    counts = ", ".join(f"{list(found.values()).count(word)} {word}" for word in ("passed", "skipped", "failed"))
    return f"{len(found)} tests of {len(suites)} suites: {counts} {sorted(failed(found))}"
