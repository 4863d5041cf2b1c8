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

    def run(self) -> contextlib.AbstractContextManager[None]:
        """Waits while another thread captures."""
        return self._turn(captures=False)

    def capture(self) -> contextlib.AbstractContextManager[None]:
        """Waits while other threads run modules, or one captures."""
        return self._turn(captures=True)

    @contextlib.contextmanager
    def _turn(self, captures: bool) -> Iterator[None]:
        with Turns._free:
            Turns._free.wait_for(lambda: not Turns._captures and not (captures and Turns._running))
            Turns._captures = captures
            Turns._running += not captures
        self.inside = True
        try:
            yield
        finally:
            self.inside = False
            with Turns._free:
                Turns._captures = False
                Turns._running -= not captures
                Turns._free.notify_all()


turns = Turns()
