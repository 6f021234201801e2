"""Hidden states between stages: the same bits arrive, and a message of another turn is noticed."""

import socket
from collections.abc import Iterator

import mlx.core as mx
import pytest

from mlx_runner.engine.connection import Connection
from mlx_runner.engine.hidden import HiddenError, HiddenIn, HiddenOut

Pair = tuple[HiddenOut, HiddenIn]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        below = socket.create_connection(server.getsockname())
        above, _ = server.accept()
    ends = [Connection(sock, peer, "hidden", lambda peer, why: None) for peer, sock in ((0, above), (1, below))]

    def waiting(peer: int) -> None:
        pass

    def computing() -> None:
        pass

    yield HiddenOut(ends[0], waiting, computing), HiddenIn(ends[1], waiting, computing)
    above.shutdown(socket.SHUT_RDWR)
    for end in ends:
        end.close()


@pytest.mark.parametrize("kind", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 1, 64), (2, 200, 1024)])
def test_the_same_bits_arrive(pair: Pair, kind: mx.Dtype, shape: tuple[int, int, int]) -> None:
    out, into = pair
    sent = mx.random.normal(shape, key=mx.random.key(1)).astype(kind)
    out.send(sent)
    # Not contiguous, as a slice of a larger array is.
    out.send(mx.concatenate([sent, sent], axis=-1)[..., : shape[-1]])
    for _ in range(2):
        got = into.receive(shape[0], shape[1])
        assert got.dtype == kind
        assert mx.array_equal(got, sent)


def test_another_shape_than_the_frames_is_an_error(pair: Pair) -> None:
    out, into = pair
    out.send(mx.zeros((2, 3, 8)))
    with pytest.raises(HiddenError, match="rank 1 sent hidden states 1 of 2x3, expected 1 of 2x4"):
        into.receive(2, 4)
