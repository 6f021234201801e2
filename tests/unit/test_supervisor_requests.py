"""The broker: requests of clients before, while and after an engine is there."""

import asyncio

import pytest

from mlx_operator_api.tasks import ServingOptions
from mlx_runner import channel
from mlx_runner.supervisor.requests import Broker, Lost, QueueFullError, UnavailableError


class Engine:
    """What the broker sent."""

    def __init__(self) -> None:
        self.sent: list[channel.Command] = []
        self.active: list[int] = []

    def send(self, command: channel.Command) -> None:
        self.sent.append(command)

    @property
    def ids(self) -> list[str]:
        return [c.id for c in self.sent if isinstance(c, channel.Generate)]


def generate(number: int) -> channel.Generate:
    return channel.Generate(id=str(number), prompt="x")


def accepted(number: int) -> channel.Accepted:
    return channel.Accepted(id=str(number), prompt_tokens=1)


def finished(number: int) -> channel.Finished:
    return channel.Finished(id=str(number), finish_reason="stop", prompt_tokens=1, completion_tokens=1)


@pytest.fixture
async def engine() -> Engine:
    return Engine()


@pytest.fixture
async def broker(engine: Engine) -> Broker:
    return Broker(engine.active.append)


async def test_requests_are_refused_before_the_first_ready(broker: Broker) -> None:
    assert broker.refusal() == "the model is not ready yet"
    with pytest.raises(UnavailableError):
        broker.enter(generate(1))


async def test_requests_go_to_the_engine_in_order_and_no_more_than_it_takes(broker: Broker, engine: Engine) -> None:
    broker.open(engine.send, ServingOptions(max_concurrent_requests=2, max_queue=2))
    tickets = [broker.enter(generate(n)) for n in range(4)]
    assert (engine.ids, broker.active, broker.waiting) == (["0", "1"], 2, 2)
    with pytest.raises(QueueFullError, match=r"serving.maxConcurrentRequests=2, serving.maxQueue=2"):
        broker.enter(generate(4))
    broker.deliver(finished(1))
    assert engine.ids == ["0", "1", "2"]
    assert tickets[1].answers.get_nowait() == finished(1)
    broker.leave(tickets[3])
    for n in (0, 2):
        broker.deliver(finished(n))
    assert (engine.ids, broker.active, engine.active[-1]) == (["0", "1", "2"], 0, 0)
    assert broker.idle.is_set()


async def test_a_queue_of_zero_still_serves_what_the_engine_takes(broker: Broker, engine: Engine) -> None:
    broker.open(engine.send, ServingOptions(max_concurrent_requests=1, max_queue=0))
    broker.enter(generate(0))
    with pytest.raises(QueueFullError):
        broker.enter(generate(1))


async def test_the_place_of_a_client_that_left_is_free_when_the_engine_says_so(broker: Broker, engine: Engine) -> None:
    broker.open(engine.send, ServingOptions(max_concurrent_requests=1))
    gone, next_one = broker.enter(generate(0)), broker.enter(generate(1))
    broker.leave(gone)
    broker.leave(gone)
    assert engine.sent[1:] == [channel.Cancel(id="0")]
    assert (broker.active, next_one.dispatched.done()) == (1, False)
    broker.deliver(finished(0))
    assert (engine.ids, next_one.dispatched.done()) == (["0", "1"], True)


async def test_a_lost_engine_fails_what_ran_and_the_next_epoch_serves_what_waited(
    broker: Broker, engine: Engine
) -> None:
    broker.open(engine.send, ServingOptions(max_concurrent_requests=1))
    ran, waited = broker.enter(generate(0)), broker.enter(generate(1))
    broker.deliver(accepted(0))
    broker.lose("engine killed")
    assert [ran.answers.get_nowait() for _ in range(2)] == [accepted(0), Lost("engine killed")]
    assert broker.refusal() is None
    held = broker.enter(generate(2))
    broker.deliver(channel.Delta(id="0", text="late", tokens=(1,)))
    assert ran.answers.empty()

    successor = Engine()
    broker.open(successor.send, ServingOptions(max_concurrent_requests=2))
    assert (successor.ids, engine.ids) == (["1", "2"], ["0"])
    assert waited.dispatched.done()
    assert held.dispatched.done()


async def test_what_a_lost_engine_had_not_accepted_goes_first_to_the_next_one(broker: Broker, engine: Engine) -> None:
    broker.open(engine.send, ServingOptions(max_concurrent_requests=4))
    tickets = [broker.enter(generate(n)) for n in range(5)]
    broker.deliver(accepted(1))
    broker.leave(tickets[2])
    broker.lose("engine killed")
    assert (broker.active, broker.waiting, broker.idle.is_set()) == (0, 3, True)
    successor = Engine()
    broker.open(successor.send, ServingOptions(max_concurrent_requests=4))
    assert successor.ids == ["0", "3", "4"]
    broker.deliver(accepted(0))
    broker.deliver(finished(0))
    assert [tickets[0].answers.get_nowait() for _ in range(2)] == [accepted(0), finished(0)]


async def test_a_request_that_two_engines_died_of_is_not_given_to_a_third(broker: Broker, engine: Engine) -> None:
    broker.open(engine.send, ServingOptions())
    deadly = broker.enter(generate(0))
    for _ in range(2):
        assert deadly.answers.empty()
        broker.lose("engine killed")
        broker.open(engine.send, ServingOptions())
    assert (engine.ids, broker.active) == (["0", "0"], 0)
    assert deadly.answers.get_nowait() == Lost("engine killed")


async def test_a_request_given_back_is_answered_when_no_epoch_comes_in_time(engine: Engine) -> None:
    broker = Broker(engine.active.append, hold_seconds=0.2)
    broker.open(engine.send, ServingOptions())
    returned = broker.enter(generate(0))
    broker.lose("engine killed")
    answer = await asyncio.wait_for(returned.answers.get(), 30)
    assert isinstance(answer, channel.Refused)
    assert (answer.status, answer.code) == (503, "not_ready")
    assert "did not become ready again in time" in answer.message
    broker.leave(returned)
    assert broker.waiting == 0


async def test_while_draining_nothing_is_given_back(broker: Broker, engine: Engine) -> None:
    broker.open(engine.send, ServingOptions())
    running = broker.enter(generate(0))
    broker.close("shutting down")
    broker.lose("engine killed")
    assert (running.answers.get_nowait(), broker.waiting) == (Lost("engine killed"), 0)


async def test_after_a_final_failure_nobody_is_held_until_the_group_is_ready_again(
    broker: Broker, engine: Engine
) -> None:
    broker.open(engine.send, ServingOptions(max_concurrent_requests=1))
    returned, waits = broker.enter(generate(0)), broker.enter(generate(1))
    broker.lose("no memory")
    broker.give_up("no memory")
    words = "the model has failed and is not started again by itself: no memory"
    answer = returned.answers.get_nowait()
    assert isinstance(answer, channel.Refused)
    assert (answer.status, answer.message) == (503, words)
    with pytest.raises(UnavailableError, match=words):
        await waits.dispatched
    assert (broker.refusal(), broker.waiting) == (words, 0)
    broker.lose("epoch 2 of the group starts")
    assert broker.refusal() == words
    broker.open(engine.send, ServingOptions())
    broker.lose("engine killed")
    assert broker.refusal() is None


async def test_held_requests_are_refused_when_no_epoch_comes_in_time(engine: Engine) -> None:
    broker = Broker(engine.active.append, hold_seconds=0.2)
    broker.open(engine.send, ServingOptions())
    broker.lose("engine killed")
    held = broker.enter(generate(1))
    with pytest.raises(UnavailableError, match="did not become ready again in time"):
        await asyncio.wait_for(held.dispatched, 30)
    assert broker.refusal() == "the model has not been ready for more than 0.2 s"
    with pytest.raises(UnavailableError):
        broker.enter(generate(2))
    broker.open(engine.send, ServingOptions())
    assert broker.refusal() is None


async def test_a_draining_broker_refuses_what_waits_and_lets_run_what_runs(broker: Broker, engine: Engine) -> None:
    broker.open(engine.send, ServingOptions(max_concurrent_requests=1))
    ran, waits = broker.enter(generate(0)), broker.enter(generate(1))
    broker.close("shutting down")
    with pytest.raises(UnavailableError, match="shutting down"):
        await waits.dispatched
    assert broker.refusal() == "shutting down"
    broker.deliver(finished(0))
    assert ran.answers.get_nowait() == finished(0)
    assert broker.idle.is_set()
