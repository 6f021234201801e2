"""Which port the way into a cluster listens on."""

import socket

import pytest

from tests.cluster.front import listen
from tests.cluster.prerequisites import PORTS


def test_of_a_range_a_port_that_is_free_is_taken() -> None:
    with listen(f"{PORTS[0]}-{PORTS[-1]}") as taken:
        port = taken.getsockname()[1]
        assert port in PORTS
        with listen(f"{port}-{PORTS[-1]}") as other:
            assert other.getsockname()[1] in PORTS
        with pytest.raises(OSError, match=rf"port {port}-{port} of 127.0.0.1: Address already in use"):
            listen(f"{port}-{port}")


def test_zero_is_any_free_port_and_a_taken_one_is_an_error() -> None:
    with listen("0") as taken:
        port = taken.getsockname()[1]
        assert port
        with pytest.raises(OSError, match="Address already in use"):
            listen(str(port))
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
