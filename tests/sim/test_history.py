"""The checker of histories against brute force on small histories, and on histories known to be right or wrong."""

from __future__ import annotations

from itertools import permutations
from random import Random

from sheepdog.cluster.sim.history import INITIAL, NEVER, Operation, check_eras, check_register


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


def _legal(order: tuple[Operation, ...], value: int = INITIAL) -> bool:
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


def survivors(operations: list[Operation], initial: int, flushed: int) -> set[int] | None:
    """What may be there after a power loss, by trying all orders; None for a history that is impossible."""
    unfinished = [operation for operation in operations if operation.end_ns >= NEVER]
    finished = [operation for operation in operations if operation.end_ns < NEVER]
    found: set[int] | None = None
    for chosen in range(1 << len(unfinished)):
        taken = finished + [operation for bit, operation in enumerate(unfinished) if chosen >> bit & 1]
        for order in permutations(taken):
            if _legal(order, initial):
                found = found or set()
                writes = [operation for operation in order if operation.is_write]
                kept = [
                    n for n, one in enumerate(writes) if one.end_ns < NEVER and (one.durable or one.end_ns <= flushed)
                ]
                found.update(one.value for one in writes[kept[-1] if kept else 0 :])
                if not kept:
                    found.add(initial)
    return found


def linearizable_over_blackouts(eras: list[list[Operation]], flushed: list[int]) -> bool:
    initial = {INITIAL}
    for era, flush in zip(eras, flushed, strict=True):
        left = [survivors(era, value, flush) for value in sorted(initial)]
        if all(one is None for one in left):
            return False
        initial = set().union(*(one for one in left if one is not None))
    return True


def random_era(random: Random, begin: int, values: list[int], writes: int, reads: int) -> list[Operation]:
    times = random.sample(range(begin, begin + 40), 40)
    operations = []
    for _ in range(writes):
        start, end = sorted((times.pop(), times.pop()))
        values.append(len(values))
        unfinished, durable = random.random() < 0.2, random.random() < 0.4
        operations.append(Operation(True, values[-1], start, NEVER if unfinished else end, "w", durable))
    for _ in range(reads):
        start, end = sorted((times.pop(), times.pop()))
        operations.append(read(random.choice(values), start, end))
    return operations


def test_agrees_with_brute_force_over_power_losses() -> None:
    """What was not flushed may be lost in any combination, and nothing else may."""
    random = Random(2)
    verdicts = [0, 0]
    for _ in range(2500):
        values = [INITIAL]
        eras = [random_era(random, 100 * era, values, random.randint(0, 2), random.randint(0, 2)) for era in range(3)]
        flushes = [random.choice((-1, 100 * era + random.randrange(40))) for era in range(3)]
        expected = linearizable_over_blackouts(eras, flushes)
        verdicts[expected] += 1
        marks = [(flush, 100 * era + 45) for era, flush in enumerate(flushes) if flush >= 0]
        operations = [operation for era in eras for operation in era]
        found = check_eras(operations, [50, 150], marks)
        assert (found is None) == expected, (operations, marks, found)
    assert min(verdicts) > 500, verdicts


def test_a_lost_write_is_found() -> None:
    assert check_register([write(1, 0, 1), write(2, 2, 3), read(1, 4, 5)]) is not None


def test_a_read_that_flips_back_is_found() -> None:
    assert check_register([write(1, 0, 1), write(2, 2), read(2, 4, 5), read(1, 6, 7)]) is not None


def test_a_value_from_nowhere_is_found() -> None:
    assert check_register([write(1, 0, 1), read(9, 4, 5)]) is not None


def test_an_unanswered_write_may_come_late_or_never() -> None:
    assert check_register([write(1, 0, 1), write(2, 2), read(1, 4, 5), read(2, 6, 7), read(2, 8, 9)]) is None
    assert check_register([write(1, 0, 1), write(2, 2), read(1, 4, 5)]) is None
