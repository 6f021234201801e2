"""The broker between two epochs: who goes on, who waits how long, who is to blame."""

import asyncio

import pytest

from mlx_operator_api.tasks import ServingOptions
from mlx_runner import channel
from mlx_runner.supervisor.requests import Broker, QueueFullError, UnavailableError
from mlx_runner.supervisor.tickets import Lost, Paused, ServedModel
from tests.unit.brokered import Engine, accepted, delta, everything, finished, generate, last


@pytest.fixture
async def engine() -> Engine:
    return Engine()


@pytest.fixture
async def broker(engine: Engine) -> Broker:
    return Broker(engine.active.append)


async def test_a_lost_engine_costs_nobody_the_answer_and_the_next_epoch_serves_all_in_their_order(
    broker: Broker, engine: Engine
) -> None:
    broker.open(engine.send, ServingOptions(max_concurrent_requests=2))
    tickets = [broker.enter(generate(n)) for n in range(4)]
    broker.deliver(accepted(1))
    broker.deliver(delta(1, 7))
    broker.deliver(delta(1, 8, 9))
    broker.lose("engine killed")
    assert broker.refusal() is None
    assert (broker.active, broker.waiting, broker.idle.is_set()) == (0, 4, True)
    broker.enter(generate(4))
    broker.deliver(delta(1, 10))

    successor = Engine()
    broker.open(successor.send, ServingOptions(max_concurrent_requests=5))
    assert (successor.ids, engine.ids) == (["0", "1", "2", "3", "4"], ["0", "1"])
    assert [command.resume for command in successor.commands] == [(), (7, 8, 9), (), (), ()]
    for event in (accepted(1), delta(1, 10), finished(1)):
        broker.deliver(event)
    assert everything(tickets[1]) == [
        accepted(1),
        delta(1, 7),
        delta(1, 8, 9),
        Paused(3),
        delta(1, 10),
        finished(1),
    ], "accepted is not told twice, a late word of the old engine not at all"
    assert everything(tickets[0]) == [Paused(0)]


async def test_the_next_engine_is_told_what_the_first_one_accepted(broker: Broker, engine: Engine) -> None:
    broker.open(engine.send, ServingOptions(max_concurrent_requests=3))
    for number in range(3):
        broker.enter(generate(number))
    for number in (1, 2):
        broker.deliver(accepted(number).model_copy(update={"max_tokens": 40 + number}))
    broker.deliver(delta(2, 7))
    for _ in range(2):
        broker.lose("killed from outside", own_doing=False)
        successor = Engine()
        broker.open(successor.send, ServingOptions(max_concurrent_requests=3))
        told = [(command.resume, command.max_tokens, command.accepted) for command in successor.commands]
        assert told == [((), None, False), ((), 41, True), ((7,), 42, True)]
        for number in (1, 2):
            broker.deliver(accepted(number).model_copy(update={"max_tokens": 5}))
    # Another model under the same name has limits of its own.
    broker.lose("killed from outside", own_doing=False)
    successor = Engine()
    broker.open(successor.send, ServingOptions(max_concurrent_requests=3), model=ServedModel("", "hf://other/one"))
    assert [(command.max_tokens, command.accepted) for command in successor.commands] == [(None, False)] * 2


async def test_a_request_goes_on_over_any_number_of_lost_engines(broker: Broker, engine: Engine) -> None:
    broker.open(engine.send, ServingOptions())
    ticket = broker.enter(generate(0))
    for number in range(5):
        broker.deliver(accepted(0))
        broker.deliver(delta(0, number))
        broker.lose("engine killed")
        broker.open(engine.send, ServingOptions())
    assert engine.commands[-1] == generate(0).model_copy(update={"resume": (0, 1, 2, 3, 4)})
    assert ticket.command == generate(0), "what was asked stays as it was"


async def test_a_client_that_left_is_not_gone_on_with(broker: Broker, engine: Engine) -> None:
    broker.open(engine.send, ServingOptions())
    gone, held = broker.enter(generate(0)), broker.enter(generate(1))
    broker.deliver(accepted(0))
    broker.leave(gone)
    broker.lose("engine killed")
    broker.leave(held)
    assert (broker.active, broker.waiting) == (0, 0)
    successor = Engine()
    broker.open(successor.send, ServingOptions())
    assert successor.sent == []


async def test_requests_that_go_on_take_no_place_in_the_queue_from_new_ones(broker: Broker, engine: Engine) -> None:
    broker.open(engine.send, ServingOptions(max_concurrent_requests=2, max_queue=1))
    for number in range(2):
        broker.enter(generate(number))
    broker.lose("engine killed")
    broker.enter(generate(2))
    with pytest.raises(QueueFullError):
        broker.enter(generate(3))


# -- the bound
async def test_what_no_epoch_goes_on_with_in_time_gets_an_honest_end(broker: Broker, engine: Engine) -> None:
    broker.open(engine.send, ServingOptions(), resume_seconds=0.2)
    begun, not_begun = broker.enter(generate(0)), broker.enter(generate(1))
    broker.deliver(accepted(0))
    broker.deliver(delta(0, 7))
    broker.lose("engine killed by signal 9 (SIGKILL)")
    end = await last(begun)
    assert (end.status, end.code) == (503, "runner_failed")
    assert end.message == (
        "the model's runner failed after 1 tokens of the answer: engine killed by signal 9 (SIGKILL); "
        "the model did not become ready again within 0.2 s"
    )
    end = await last(not_begun)
    assert (end.status, end.code) == (503, "not_ready")
    assert broker.waiting == 0
    broker.open(engine.send, ServingOptions())
    assert engine.ids == ["0", "1"]


async def test_the_time_counts_from_the_first_loss_until_a_token_comes(broker: Broker, engine: Engine) -> None:
    broker.open(engine.send, ServingOptions(), resume_seconds=30.0)
    stuck, moving = broker.enter(generate(0)), broker.enter(generate(1))
    broker.lose("engine killed")
    first = stuck.deadline, moving.deadline
    assert None not in first
    broker.open(engine.send, ServingOptions(), resume_seconds=30.0)
    assert (stuck.timer, stuck.deadline) == (None, first[0]), "in an engine it has all the time that it needs"
    broker.deliver(delta(1, 7))
    await asyncio.sleep(0.01)
    broker.lose("engine killed")
    assert stuck.deadline == first[0] and moving.deadline is not None and first[1] is not None
    assert moving.deadline > first[1]
    assert stuck.timer is not None and moving.timer is not None


async def test_an_answer_is_not_gone_on_with_by_another_model(broker: Broker, engine: Engine) -> None:
    small, large = ServedModel("tiny", "hf://a/small", digest="1"), ServedModel("tiny", "hf://a/large", digest="2")
    broker.open(engine.send, ServingOptions(), model=small)
    begun, not_begun = broker.enter(generate(0), "tiny"), broker.enter(generate(1), "tiny")
    broker.deliver(accepted(0))
    broker.deliver(delta(0, 7))
    broker.lose("the runner was shut down")
    held, renamed = broker.enter(generate(2), "tiny"), broker.enter(generate(3), "other")
    broker.open(engine.send, ServingOptions(), model=large)
    assert engine.ids == ["0", "1", "1", "2"]
    assert (await last(begun)).message.endswith("another model is served now")
    with pytest.raises(UnavailableError, match="another model is served now"):
        await renamed.dispatched
    assert not not_begun.done and not held.done


# -- who makes an engine die
async def test_a_request_that_two_engines_died_of_by_themselves_is_not_given_to_a_third(
    broker: Broker, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    broker.open(engine.send, ServingOptions())
    deadly = broker.enter(channel.Generate(id="0", prompt="a secret", stop=("secret",), seed=3))
    broker.deliver(accepted(0))
    for _ in range(2):
        broker.lose("engine killed by signal 11 (SIGSEGV)", own_doing=True)
        broker.open(engine.send, ServingOptions())
    assert (engine.ids, broker.active) == (["0", "0"], 0)
    end = await last(deadly)
    assert (end.status, end.code) == (500, "request_crashes_engine")
    assert "2 engines in a row died by themselves" in end.message and "SIGSEGV" in end.message
    assert "endpoint=completions prompt_tokens=1 tokens_given=0" in caplog.text
    assert "len(prompt)=8" in caplog.text and "seed=3" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("own_doing", [True, False])
async def test_a_request_whose_engine_only_lost_a_peer_is_judged_by_what_became_of_that(
    broker: Broker, engine: Engine, own_doing: bool
) -> None:
    broker.open(engine.send, ServingOptions())
    suspect, gone = broker.enter(generate(0)), broker.enter(generate(1))
    for _ in range(2):
        broker.lose("connection to rank 1 lost", own_doing=None)
        broker.lose("epoch 2 of the group starts")
        broker.leave(gone)
        broker.explain(own_doing=own_doing)
        broker.explain(own_doing=own_doing)
        broker.open(engine.send, ServingOptions())
    assert suspect.done == own_doing
    if own_doing:
        assert (await last(suspect)).code == "request_crashes_engine"
    assert (broker.active, broker.waiting) == (1 - own_doing, 0)


@pytest.mark.parametrize("between", ["a kill from outside", "a token"])
async def test_a_request_is_not_blamed_for(broker: Broker, engine: Engine, between: str) -> None:
    broker.open(engine.send, ServingOptions())
    innocent = broker.enter(generate(0))
    broker.lose("abort", own_doing=True)
    for _ in range(3):
        broker.open(engine.send, ServingOptions())
        if between == "a token":
            broker.deliver(delta(0, 7))
        broker.lose("died", own_doing=between == "a token")
    assert not innocent.done


async def test_the_request_that_kills_engines_takes_no_other_with_it(broker: Broker) -> None:
    """Of nine requests one makes every engine abort before its first token; the engine is the same each time."""
    waits_for, answered, deaths = 5, 3, 0
    engine = Engine()
    broker.open(engine.send, ServingOptions())
    tickets = [broker.enter(generate(n)) for n in range(9)]
    given = dict.fromkeys(range(9), 0)
    while not all(ticket.done for ticket in tickets):
        known = len(engine.sent)
        for command in engine.commands:
            number = int(command.id)
            if number == waits_for:
                deaths += 1
                broker.lose("abort", own_doing=True)
                engine = Engine()
                broker.open(engine.send, ServingOptions())
                break
            if given[number] < answered:
                broker.deliver(accepted(number))
                broker.deliver(delta(number, given[number]))
                given[number] += 1
            else:
                broker.deliver(finished(number))
        assert deaths < 5, "the budget of restarts would be spent"
        assert known or deaths
    assert deaths == 2
    assert (await last(tickets[waits_for])).code == "request_crashes_engine"
    for number, ticket in enumerate(tickets):
        if number != waits_for:
            told = everything(ticket)
            assert [token for event in told if isinstance(event, channel.Delta) for token in event.tokens] == [0, 1, 2]
            assert told[-1] == finished(number)


async def test_a_new_request_is_not_mistaken_for_the_cause_nor_takes_the_blame_of_another(
    broker: Broker, engine: Engine
) -> None:
    broker.open(engine.send, ServingOptions())
    suspect, other = broker.enter(generate(0)), broker.enter(generate(1))
    broker.lose("abort", own_doing=True)
    deadly = broker.enter(generate(2))
    broker.open(engine.send, ServingOptions())
    assert engine.ids[2:] == ["0"], "alone, until it is answered"
    broker.deliver(delta(0, 7))
    assert engine.ids[2:] == ["0", "1"]
    broker.leave(other)
    broker.deliver(finished(1))
    assert engine.ids[2:] == ["0", "1", "2"], "a client that left is nobody to wait for"
    broker.lose("abort", own_doing=True)
    assert not suspect.done and not deadly.done
    broker.open(engine.send, ServingOptions())
    broker.deliver(delta(0, 8))
    broker.lose("abort", own_doing=True)
    assert not suspect.done
    assert (await last(deadly)).code == "request_crashes_engine"


async def test_after_a_final_failure_nobody_is_held_until_the_group_is_ready_again(
    broker: Broker, engine: Engine
) -> None:
    broker.open(engine.send, ServingOptions(max_concurrent_requests=1))
    returned, waits = broker.enter(generate(0)), broker.enter(generate(1))
    broker.lose("no memory")
    broker.give_up("no memory")
    words = "the model has failed and is not started again by itself: no memory"
    assert await last(returned) == Lost(words, code="not_ready")
    with pytest.raises(UnavailableError, match=words):
        await waits.dispatched
    assert (broker.refusal(), broker.waiting) == (words, 0)
    broker.lose("epoch 2 of the group starts")
    assert broker.refusal() == words
    broker.open(engine.send, ServingOptions())
    broker.lose("engine killed")
    assert broker.refusal() is None


async def test_held_requests_are_refused_when_no_epoch_comes_in_time(broker: Broker, engine: Engine) -> None:
    broker.open(engine.send, ServingOptions(), resume_seconds=0.2)
    broker.lose("engine killed")
    held = broker.enter(generate(1))
    with pytest.raises(UnavailableError, match="did not become ready again in time"):
        await asyncio.wait_for(held.dispatched, 30)
    assert broker.refusal() == "the model has not been ready for more than 0.2 s"
    with pytest.raises(UnavailableError):
        broker.enter(generate(2))
    broker.open(engine.send, ServingOptions())
    assert broker.refusal() is None
