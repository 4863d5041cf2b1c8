"""Who may run modules. While torch.export captures a network, stand-ins are in the place of its tensors, and torch says
that it is compiling: in all threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Turns(threading.local):
    """Threads run modules together, or one of them captures a graph by itself.

    inside: is this thread doing either?
    """

    inside = False
    _free = threading.Condition()
    _running = 0
    _captures = False

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Waits while another thread captures."""
        with Turns._free:
            Turns._free.wait_for(lambda: not Turns._captures)
            Turns._running += 1
        self.inside = True
        try:
            yield
        finally:
            self.inside = False
            with Turns._free:
                Turns._running -= 1
                Turns._free.notify_all()

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Waits while other threads run modules, or one captures."""
        with Turns._free:
            Turns._free.wait_for(lambda: not Turns._captures and not Turns._running)
            Turns._captures = True
        self.inside = True
        try:
            yield
        finally:
            self.inside = False
            with Turns._free:
                Turns._captures = False
                Turns._free.notify_all()


turns = Turns()
