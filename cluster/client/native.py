"""`exchange` compiled by Cython (packaging/compile-native): a request holds Python's lock only to begin and to end.

The roles are the same: one thread sends for all, one receives for all. What goes wrong is told to the channel, with
Python's lock.

Nothing interrupts a wait here: for threads that take no signals.
"""

import os

import cython
from cython.cimports.cpython.buffer import PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cython.cimports.cpython.memoryview import PyMemoryView_FromMemory
from cython.cimports.cpython.object import PyObject
from cython.cimports.cpython.pythread import (
    NOWAIT_LOCK,
    WAIT_LOCK,
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_release_lock,
    PyThread_type_lock,
)
from cython.cimports.cpython.ref import Py_DECREF, Py_INCREF
from cython.cimports.libc.errno import EAGAIN, ECONNRESET, EINTR, EPROTO, errno
from cython.cimports.libc.stdint import uint8_t, uint32_t
from cython.cimports.libc.stdlib import free, malloc, realloc
from cython.cimports.libc.string import memcpy, memmove, memset
from cython.cimports.posix.time import CLOCK_MONOTONIC, clock_gettime, timespec

from sheepdog.cluster.client.connection import Broken
from sheepdog.cluster.client.exchange import LARGE_BYTES, RECEIVE_BYTES, UNASKED

LARGE = cython.declare(cython.size_t, LARGE_BYTES)
ROOM = cython.declare(cython.size_t, RECEIVE_BYTES)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def now() -> cython.double:
    time: timespec
    clock_gettime(CLOCK_MONOTONIC, cython.address(time))
    return time.tv_sec + time.tv_nsec * 1e-9


@cython.cclass
class Role:
    """A lock that is taken with and without Python's."""

    def __cinit__(self):
        self.lock = PyThread_allocate_lock()
        if self.lock == cython.NULL:
            raise MemoryError

    def __dealloc__(self):
        PyThread_free_lock(self.lock)

    def __enter__(self):
        with cython.nogil:
            self.take(True)

    def __exit__(self, *_):
        self.give_back()

    def take(self, wait):
        return PyThread_acquire_lock(self.lock, WAIT_LOCK if wait else NOWAIT_LOCK) == 1

    def give_back(self):
        PyThread_release_lock(self.lock)


@cython.cclass
class Exchange:
    """As `exchange.Exchange`."""

    def __cinit__(self, policy):
        self.policy = policy
        self.sending, self.receiving, self.table = Role(), Role(), Role()
        self.descriptor = -1
        self.buffer = cython.cast(cython.pointer(uint8_t), malloc(ROOM))
        if self.buffer == cython.NULL:
            raise MemoryError

    def __dealloc__(self):
        place: cython.size_t
        for place in range(self.gates_made):
            PyThread_free_lock(self.gates[place])
        free(self.gates)
        free(self.free_gates)
        free(self.buffer)

    def use(self, sock):
        number: cython.int = -1 if sock is None else sock.fileno()
        with self.table:
            self.descriptor = number
            self.end = 0
            self.answered = False

    def ask(self, header: bytearray, payload=b"", into=None):
        own: Waiter
        head: cython.Py_buffer
        body: cython.Py_buffer
        space: cython.Py_buffer
        memset(cython.address(own), 0, cython.sizeof(Waiter))
        memset(cython.address(body), 0, cython.sizeof(cython.Py_buffer))
        memset(cython.address(space), 0, cython.sizeof(cython.Py_buffer))
        PyObject_GetBuffer(header, cython.address(head), PyBUF_SIMPLE)
        try:
            own.header = cython.cast(cython.pointer(uint8_t), head.buf)
            if payload:
                PyObject_GetBuffer(payload, cython.address(body), PyBUF_SIMPLE)
                own.payload, own.payload_length = cython.cast(cython.pointer(uint8_t), body.buf), body.len
            if into is not None:
                PyObject_GetBuffer(into, cython.address(space), PyBUF_WRITABLE)
                own.into, own.into_length = cython.cast(cython.pointer(uint8_t), space.buf), space.len
            own.gate = self.take_gate()
            with cython.nogil:
                self.run(cython.address(own))
            self.free_gates[self.gates_free] = own.gate
            self.gates_free += 1
        finally:
            PyBuffer_Release(cython.address(head))
            PyBuffer_Release(cython.address(body))
            PyBuffer_Release(cython.address(space))
        if own.error != cython.NULL:
            error = cython.cast(object, own.error)
            Py_DECREF(error)
            raise error
        return own.result, own.length

    def take_gate(self):
        """A gate, perhaps open. None is ever given back to the system: a late hand may still open it."""
        if self.gates_free == 0:
            room: cython.size_t = (self.gates_made + 1) * cython.sizeof(PyThread_type_lock)
            gates = cython.cast(cython.pointer(PyThread_type_lock), realloc(self.gates, room))
            if gates == cython.NULL:
                raise MemoryError
            self.gates = gates
            gates = cython.cast(cython.pointer(PyThread_type_lock), realloc(self.free_gates, room))
            if gates == cython.NULL:
                raise MemoryError
            self.free_gates = gates
            gate: PyThread_type_lock = PyThread_allocate_lock()
            if gate == cython.NULL:
                raise MemoryError
            PyThread_acquire_lock(gate, WAIT_LOCK)
            self.gates[self.gates_made] = gate
            self.gates_made += 1
            return gate
        self.gates_free -= 1
        return self.free_gates[self.gates_free]

    # -- for the channel

    def parts(self):
        found = []
        with self.table:
            one: cython.pointer(Waiter) = self.first
            while one != cython.NULL:
                found.append(PyMemoryView_FromMemory(cython.cast(cython.p_char, one.header), HEADER, 0x100))
                if one.payload_length:
                    found.append(
                        PyMemoryView_FromMemory(cython.cast(cython.p_char, one.payload), one.payload_length, 0x100)
                    )
                one = one.after
        return found

    def oldest(self):
        since: cython.double = -1
        with self.table:
            if self.first != cython.NULL:
                since = self.first.since
        return since if since >= 0 else None

    def fail(self, error, made_before=None):
        everything: cython.bint = made_before is None
        limit: cython.double = 0 if everything else made_before
        following: cython.pointer(Waiter)
        with self.table:
            one: cython.pointer(Waiter) = self.first
            while one != cython.NULL:
                following = one.after
                if everything or one.since <= limit:
                    self.unlink(one)
                    finish_with(one, error)
                one = following

    def send_queued(self):
        with cython.nogil:
            self.send_all()

    def find_connection(self):
        """One for the queue, or an end to what is in it."""
        try:
            self.policy.connection()
        except BaseException as error:
            with self.table:
                one: cython.pointer(Waiter) = self.queue_first
                self.queue_first = self.queue_last = cython.NULL
                following: cython.pointer(Waiter)
                while one != cython.NULL:
                    following = one.after
                    finish_with(one, error)
                    one = following

    def tell(self, what, number):
        """Afterwards there is a connection, or nothing is in flight."""
        try:
            try:
                if what == STALLS:
                    self.policy.look_for_stalls()
                elif what == SILENCE:
                    self.policy.look_for_life()
                elif number == EPROTO:
                    raise Broken(number, UNASKED)
                else:
                    raise OSError(number, os.strerror(number))
            except OSError as error:
                self.policy.broken(error)
        except BaseException as error:  # no thread may be left waiting
            self.fail(error)

    # -- without Python's lock from here on

    def run(self, own):
        """Until its answer, or its failure, has come."""
        own.since = now()
        self.table.take(True)
        if self.queue_last == cython.NULL:
            self.queue_first = own
        else:
            self.queue_last.after = own
        self.queue_last = own
        self.table.give_back()
        self.send_all()
        self.table.take(True)
        own.waits = True
        while not own.over or own.in_hand:
            if not own.over and self.descriptor >= 0 and self.receiving.take(False):
                while not own.over:
                    self.table.give_back()
                    self.receive(own)
                    self.table.take(True)
                self.receiving.give_back()
            else:
                self.table.give_back()
                PyThread_acquire_lock(own.gate, WAIT_LOCK)
                self.table.take(True)
        if self.receiving.take(False):
            self.receiving.give_back()
            self.pass_on()
        self.table.give_back()

    def pass_on(self):
        """The post is free: wakes one that waits for it. Those that send look for themselves. Holds the table."""
        one: cython.pointer(Waiter) = self.first
        while one != cython.NULL and not one.waits:
            one = one.after
        if one != cython.NULL:
            PyThread_release_lock(one.gate)

    # -- sending

    def send_all(self):
        """Unless somebody else is sending, who looks into the queue again afterwards."""
        while True:
            self.table.take(True)
            empty: cython.bint = self.queue_first == cython.NULL
            self.table.give_back()
            if empty or not self.sending.take(False):
                return
            self.send_batch()
            self.sending.give_back()

    def send_batch(self):
        """What is queued is in flight afterwards, or over. Holds `sending`."""
        parts: iovec[PARTS]
        batch: cython.pointer(Waiter)[BATCH]
        count: cython.size_t = 0
        taken: cython.size_t = 0
        place: cython.size_t
        one: cython.pointer(Waiter)
        connected: cython.bint = self.descriptor >= 0
        if not connected:
            self.find_connection()
            if self.descriptor < 0:
                return
        self.table.take(True)
        while self.queue_first != cython.NULL and taken < BATCH:
            one = self.queue_first
            self.queue_first = one.after
            if self.queue_first == cython.NULL:
                self.queue_last = cython.NULL
            self.last_number += 1
            one.number = self.last_number
            cython.cast(cython.pointer(uint32_t), one.header)[ID] = one.number
            one.in_hand = True
            self.link(one)
            batch[taken] = one
            taken += 1
            parts[count].iov_base, parts[count].iov_len = one.header, HEADER
            count += 1
            if one.payload_length:
                parts[count].iov_base, parts[count].iov_len = one.payload, one.payload_length
                count += 1
        if not connected:  # those who wait have left the post alone
            self.pass_on()
        self.table.give_back()
        if count and not self.transmit(parts, count):
            shutdown(self.descriptor, SHUT_RDWR)  # whoever receives sees it, connects again and sends everything
        self.table.take(True)
        for place in range(taken):
            batch[place].in_hand = False
            if batch[place].over:
                PyThread_release_lock(batch[place].gate)
        self.table.give_back()

    def transmit(self, parts, count):
        """All of it; False if the connection is no good."""
        message: msghdr
        sent: cython.Py_ssize_t
        rest: cython.size_t
        memset(cython.address(message), 0, cython.sizeof(msghdr))
        message.msg_iov, message.msg_iovlen = parts, count
        while message.msg_iovlen:
            sent = sendmsg(self.descriptor, cython.address(message), MSG_NOSIGNAL)
            if sent < 0:
                if errno != EINTR:
                    return False
                continue
            rest = sent
            while message.msg_iovlen and rest >= message.msg_iov.iov_len:
                rest -= message.msg_iov.iov_len
                message.msg_iov += 1
                message.msg_iovlen -= 1
            if rest:
                message.msg_iov.iov_base = cython.cast(cython.pointer(uint8_t), message.msg_iov.iov_base) + rest
                message.msg_iov.iov_len -= rest
        return True

    # -- receiving: the post's holder only

    def receive(self, own):
        """Once; `own` is the request of the thread that does it."""
        got: cython.Py_ssize_t
        number: cython.int
        if self.descriptor < 0:
            self.tell(BREAK, ECONNRESET)
            return
        got = recv(
            self.descriptor, self.buffer + self.end, (HEADER if own.into_length >= LARGE else ROOM) - self.end, 0
        )
        if got < 0:
            number = errno
            if number == EAGAIN:
                self.tell(SILENCE, number)
            elif number != EINTR:
                self.tell(BREAK, number)
            return
        number = self.hand_out(self.end + got) if got else ECONNRESET
        if number:
            self.tell(BREAK, number)
        elif now() >= self.check_at:
            self.tell(STALLS, 0)

    def hand_out(self, end):
        """What is in the buffer; the number of an error, or 0."""
        woken: PyThread_type_lock[BATCH]
        count: cython.size_t = 0
        place: cython.size_t
        start: cython.size_t = 0
        have: cython.size_t
        head: cython.pointer(uint32_t)
        one: cython.pointer(Waiter)
        number: cython.int = 0
        self.table.take(True)
        while end - start >= HEADER and number == 0:
            head = cython.cast(cython.pointer(uint32_t), self.buffer + start)
            one = self.find(head[ID])
            if one == cython.NULL or head[LENGTH] > one.into_length:
                number = EPROTO
                break
            start += HEADER
            one.result, one.length = head[RESULT], head[LENGTH]
            have = min(end - start, cython.cast(cython.size_t, one.length))
            if have:
                memcpy(one.into, self.buffer + start, have)
                start += have
            if have < one.length:
                self.table.give_back()
                number = self.fill(one, have)
                self.table.take(True)
            if number == 0:
                self.unlink(one)
                self.answered = True
                one.over = True
                if one.waits and not one.in_hand:
                    woken[count] = one.gate
                    count += 1
            if count == BATCH or (count and number):
                for place in range(count):
                    PyThread_release_lock(woken[place])
                count = 0
        self.table.give_back()
        for place in range(count):  # without the table, which is the first thing that they take
            PyThread_release_lock(woken[place])
        self.end = end - start
        if start and self.end:
            memmove(self.buffer, self.buffer + start, self.end)
        return number

    def fill(self, waiter, have):
        """Receives the rest of its data where it belongs; the number of an error, or 0."""
        got: cython.Py_ssize_t
        while have < waiter.length:
            got = recv(self.descriptor, waiter.into + have, waiter.length - have, MSG_WAITALL)
            if got == 0:
                return ECONNRESET
            if got < 0 and errno != EINTR:
                return errno
            have += max(got, 0)
        return 0

    # -- what is in flight: holding the table

    def find(self, number):
        one: cython.pointer(Waiter) = self.first
        while one != cython.NULL and one.number != number:
            one = one.after
        return one

    def link(self, waiter):
        waiter.before, waiter.after = self.last, cython.NULL
        if self.last == cython.NULL:
            self.first = waiter
        else:
            self.last.after = waiter
        self.last = waiter

    def unlink(self, waiter):
        if waiter.before == cython.NULL:
            self.first = waiter.after
        else:
            waiter.before.after = waiter.after
        if waiter.after == cython.NULL:
            self.last = waiter.before
        else:
            waiter.after.before = waiter.before


@cython.cfunc
@cython.exceptval(check=False)
def finish_with(waiter: cython.pointer(Waiter), error: object) -> cython.void:
    """It is in no list any more. Holds the table."""
    Py_INCREF(error)
    waiter.error = cython.cast(cython.pointer(PyObject), error)
    waiter.over = True
    PyThread_release_lock(waiter.gate)
