"""Free ports of this machine, for processes that are started now and listen seconds later."""

import random
import socket

# Above the ports of Ray's workers and below those that Linux gives out by itself (from 32768 on): no connection that is
# made meanwhile takes it.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """Return a TCP port that nobody listens on at this moment.

    Raises:
        OSError: None of a hundred ports drawn at random is free.
    """
    draw = random.SystemRandom()  # two jobs with one seed must not draw alike
    for _ in range(100):
        port = draw.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {_PORTS.start} and {_PORTS.stop}")
