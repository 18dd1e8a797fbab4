"""Python's state of nbdkit's threads, kept from one request of a thread to the next.

nbdkit gives a thread a state when a request enters Python, and takes it away when the request leaves. Each new one maps
memory and clears it: a third of what a small read costs nbdkit in all. A state that is kept has to be ended, which its
own thread cannot do once it has left for good; a connection's threads have ended when nbdkit closes the connection.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Final

_api = ctypes.pythonapi
_api.PyThreadState_Get.restype = ctypes.c_void_p
_api.PyThreadState_Clear.argtypes = [ctypes.c_void_p]
_api.PyThreadState_Clear.restype = None
_api.PyThreadState_Delete.argtypes = [ctypes.c_void_p]
_api.PyThreadState_Delete.restype = None
_api.PyGILState_Release.argtypes = [ctypes.c_int]
_api.PyGILState_Release.restype = None
_LOCKED: Final = 0  # PyGILState_LOCKED: what `PyGILState_Ensure` says inside of Python


class ThreadStates:
    """Of one server; connections are told apart by their handles, which live as long as they."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._kept: dict[int, list[int]] = {}  # by connection: addresses of states

    def keep(self, connection: object) -> None:
        """Keeps the calling thread's state until its connection ends. To be called in each request."""
        if not getattr(self._here, "kept", False):
            self._here.kept = True
            _api.PyGILState_Ensure()  # one more than nbdkit's, which it will not give back
            self._kept.setdefault(id(connection), []).append(_api.PyThreadState_Get())

    def end(self, connection: object) -> None:
        """Ends what the connection's threads have left; they run no more, but perhaps the one that calls."""
        own = _api.PyThreadState_Get()
        for state in self._kept.pop(id(connection), ()):
            if state == own:  # a server with one thread for each connection
                del self._here.kept
                _api.PyGILState_Release(_LOCKED)
            else:
                _api.PyThreadState_Clear(state)
                _api.PyThreadState_Delete(state)
