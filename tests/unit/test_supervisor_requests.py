"""The broker: requests of clients before, while and after an engine is there."""

import asyncio
import gc

import pytest

from mlx_operator_api.tasks import ServingOptions
from mlx_runner import channel
from mlx_runner.supervisor.answers import dispatched
from mlx_runner.supervisor.requests import Broker, QueueFullError, UnavailableError
from mlx_runner.supervisor.tickets import Observer, Outcome, Ticket
from tests.unit.brokered import EncodingEngine, Engine, accepted, everything, finished, generate, last


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


UNSAYABLE = {"description": "half a \ud83d pair"}


def unsayable(number: int) -> channel.Generate:
    return channel.Generate(id=str(number), prompt="x", json_schema=UNSAYABLE)


async def test_a_request_that_no_engine_can_be_told_ends_by_itself_and_takes_no_place(broker: Broker) -> None:
    engine = EncodingEngine()
    broker.open(engine.send, ServingOptions(max_concurrent_requests=1))
    alone = broker.enter(unsayable(0))
    assert (broker.active, broker.idle.is_set(), alone.done) == (0, True, True)
    (answer,) = everything(alone)
    assert isinstance(answer, channel.Refused)
    assert (answer.status, answer.code) == (500, "internal_error")
    await dispatched(broker, alone)
    # Also when its turn comes with a word of the engine, or with the next engine.
    broker.enter(generate(1))
    waits, behind = broker.enter(unsayable(2)), broker.enter(generate(3))
    broker.deliver(finished(1))
    assert (waits.done, behind.dispatched.done(), engine.ids) == (True, True, ["1", "3"])
    broker.lose("engine killed")
    held = broker.enter(unsayable(4))
    broker.open(engine.send, ServingOptions(max_concurrent_requests=2))
    assert (held.done, engine.ids) == (True, ["1", "3", "3"])


async def test_a_question_that_no_engine_can_be_told_is_answered_at_once(broker: Broker) -> None:
    broker.open(EncodingEngine().send, ServingOptions())
    question = channel.Tokenize(id="q", prompt="x", template_options=UNSAYABLE)
    async with asyncio.timeout(5):
        answer = await broker.questions.ask(question)
    assert isinstance(answer, channel.Refused)
    assert (answer.status, answer.code) == (500, "internal_error")


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


async def test_while_draining_nothing_is_held_and_what_waits_for_an_epoch_ends_at_once(
    broker: Broker, engine: Engine
) -> None:
    broker.open(engine.send, ServingOptions())
    waits = broker.enter(generate(0))
    broker.deliver(accepted(0))
    broker.lose("engine killed")
    broker.close("shutting down")
    assert (await last(waits)).message.endswith("engine killed; shutting down")


async def test_an_engine_that_is_lost_while_draining_breaks_the_answer_off_at_once(
    broker: Broker, engine: Engine
) -> None:
    broker.open(engine.send, ServingOptions())
    running = broker.enter(generate(0))
    broker.close("shutting down")
    broker.lose("engine killed")
    assert (await last(running)).code == "runner_failed"
    assert broker.waiting == 0


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


class Counted(Observer):
    """What the metrics would count."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def resumed(self, ticket: Ticket) -> None:
        self.told.append("resumed")

    def queued(self, ticket: Ticket, seconds: float) -> None:
        self.told.append("queued")

    def ended(self, ticket: Ticket, outcome: Outcome, seconds: float, finished: channel.Finished | None) -> None:
        self.told.append(outcome)


async def test_a_client_that_leaves_the_queue_as_its_place_comes_free_is_counted_as_what_it_was() -> None:
    broker, engine = Broker(lambda active: None), Engine()
    broker.open(engine.send, ServingOptions(max_concurrent_requests=1))
    running = broker.enter(generate(1))
    broker.observer = counted = Counted()
    ticket = broker.enter(generate(2))

    async def client() -> None:
        try:
            await dispatched(broker, ticket)
        finally:
            broker.leave(ticket)

    waiting = asyncio.create_task(client())
    await asyncio.sleep(0)
    waiting.cancel()
    broker.deliver(finished(1))  # before the client's task has run
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert running.done
    assert counted.told == ["finished", "queued", "cancelled"]
    assert engine.sent[-1] == channel.Cancel(id="2")


async def test_choices_that_nobody_waits_for_any_more_leave_no_lost_exception() -> None:
    broker, engine = Broker(lambda active: None), Engine()
    broker.open(engine.send, ServingOptions(max_concurrent_requests=1))
    broker.enter(generate(1))
    lost: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: lost.append(context))
    tickets = [broker.enter(generate(number)) for number in (2, 3)]
    broker.give_up("no memory")
    with pytest.raises(UnavailableError):
        await tickets[0].dispatched
    tickets.clear()
    gc.collect()
    assert lost == []
