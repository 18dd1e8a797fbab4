# What `native` takes from C, and the layout of what it handles without Python's lock.

from cpython.object cimport PyObject
from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport uint8_t, uint32_t

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void* iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    cdef struct msghdr:
        iovec* msg_iov
        size_t msg_iovlen
    ssize_t sendmsg(int, const msghdr*, int)
    ssize_t recv(int, void*, size_t, int)
    int shutdown(int, int)
    int MSG_NOSIGNAL
    int MSG_WAITALL
    int SHUT_RDWR

cdef enum:  # of the wire's headers: bytes, and words of 4 bytes
    HEADER = 48
    ID = 2
    LENGTH = 3
    RESULT = 4

cdef enum:  # what the channel is told
    STALLS
    SILENCE
    BREAK

cdef enum:
    BATCH = 32  # requests that one call sends
    PARTS = 64  # of so many

# A request until its answer; on the stack of the thread that asks. From `number` on it is the table's.
cdef struct Waiter:
    uint8_t* header
    uint8_t* payload
    size_t payload_length
    uint8_t* into
    size_t into_length
    double since  # monotonic seconds
    PyThread_type_lock gate  # opened to say: look again, it is over, or the post is free
    uint32_t number
    uint32_t result
    uint32_t length
    PyObject* error  # a reference of its own
    bint over
    bint waits  # its thread: it sends nothing any more
    bint in_hand  # its memory is being sent by some thread
    Waiter* before  # in flight, in order of sending
    Waiter* after  # the same, or in the queue

cdef class Role:
    cdef PyThread_type_lock lock
    cdef bint take(self, bint wait) noexcept nogil
    cdef void give_back(self) noexcept nogil

cdef class Exchange:
    cdef readonly Role sending
    cdef readonly Role receiving
    cdef public bint answered
    cdef public double check_at
    cdef object policy
    cdef Role table  # around the queue, the flight and what says so above; never held by a thread that waits for Python
    cdef int descriptor  # -1: no connection
    cdef uint32_t last_number
    cdef Waiter* queue_first
    cdef Waiter* queue_last
    cdef Waiter* first
    cdef Waiter* last
    cdef uint8_t* buffer
    cdef size_t end  # bytes of an incomplete header that begin the buffer
    cdef PyThread_type_lock* gates  # made ever
    cdef size_t gates_made
    cdef PyThread_type_lock* free_gates
    cdef size_t gates_free
    cdef PyThread_type_lock take_gate(self) except NULL
    cdef void run(self, Waiter* own) noexcept nogil
    cdef void send_all(self) noexcept nogil
    cdef void send_batch(self) noexcept nogil
    cdef bint transmit(self, iovec* parts, size_t count) noexcept nogil
    cdef void receive(self, Waiter* own) noexcept nogil
    cdef int hand_out(self, size_t end) noexcept nogil
    cdef int fill(self, Waiter* waiter, size_t have) noexcept nogil
    cdef Waiter* find(self, uint32_t number) noexcept nogil
    cdef void link(self, Waiter* waiter) noexcept nogil
    cdef void unlink(self, Waiter* waiter) noexcept nogil
    cdef void pass_on(self) noexcept nogil
    cdef void find_connection(self) noexcept with gil
    cdef void tell(self, int what, int number) noexcept with gil
