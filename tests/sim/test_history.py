"""The checker of histories against brute force on small histories, and on histories known to be right or wrong."""

from __future__ import annotations

from itertools import permutations
from random import Random

from sheepdog.cluster.sim.history import INITIAL, NEVER, Operation, check_register


def write(value: int, start: int, end: int = NEVER) -> Operation:
    return Operation(True, value, start, end, "w")


def read(value: int, start: int, end: int) -> Operation:
    return Operation(False, value, start, end, "r")


def linearizable(operations: list[Operation]) -> bool:
    """By trying all orders; unfinished writes may also be left out."""
    unfinished = [operation for operation in operations if operation.end_ns >= NEVER]
    finished = [operation for operation in operations if operation.end_ns < NEVER]
    for chosen in range(1 << len(unfinished)):
        taken = finished + [operation for bit, operation in enumerate(unfinished) if chosen >> bit & 1]
        if any(_legal(order) for order in permutations(taken)):
            return True
    return False


def _legal(order: tuple[Operation, ...]) -> bool:
    value = INITIAL
    for position, operation in enumerate(order):
        if any(later.end_ns < operation.start_ns for later in order[position + 1 :]):
            return False
        if operation.is_write:
            value = operation.value
        elif operation.value != value:
            return False
    return True


def test_agrees_with_brute_force() -> None:
    random = Random(1)
    verdicts = [0, 0]
    for _ in range(3000):
        times = random.sample(range(40), 40)
        operations = []
        values = [INITIAL]
        for _ in range(random.randint(1, 3)):
            start, end = sorted((times.pop(), times.pop()))
            values.append(len(values))
            operations.append(write(values[-1], start, NEVER if random.random() < 0.2 else end))
        for _ in range(random.randint(1, 3)):
            start, end = sorted((times.pop(), times.pop()))
            operations.append(read(random.choice(values), start, end))
        expected = linearizable(operations)
        verdicts[expected] += 1
        assert (check_register(operations) is None) == expected, operations
    assert min(verdicts) > 500, "the histories were not mixed"


def test_a_lost_write_is_found() -> None:
    assert check_register([write(1, 0, 1), write(2, 2, 3), read(1, 4, 5)]) is not None


def test_a_read_that_flips_back_is_found() -> None:
    assert check_register([write(1, 0, 1), write(2, 2), read(2, 4, 5), read(1, 6, 7)]) is not None


def test_a_value_from_nowhere_is_found() -> None:
    assert check_register([write(1, 0, 1), read(9, 4, 5)]) is not None


def test_an_unanswered_write_may_come_late_or_never() -> None:
    assert check_register([write(1, 0, 1), write(2, 2), read(1, 4, 5), read(2, 6, 7), read(2, 8, 9)]) is None
    assert check_register([write(1, 0, 1), write(2, 2), read(1, 4, 5)]) is None
