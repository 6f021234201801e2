"""One runner: the engine of one epoch, its tasks, its deadlines, and its clean-up.

Everything here is driven by events and never waits, but for the clean-up: that belongs to this runner alone, happens
once, and whoever asks for it again awaits the same end.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from mlx_operator_api.conditions import Reason, Retry
from mlx_operator_api.names import ring_port
from mlx_operator_api.runner import RunnerState, TaskName
from mlx_operator_api.status import LastFailure
from mlx_operator_api.tasks import ConnectToGroup, CreateRunner, Sharding
from mlx_runner import channel, sockets
from mlx_runner.progress import Phase

from . import diagnosis, evidence
from .blame import verdict
from .config import Config
from .diagnosis import Diagnosis
from .engine_process import EngineProcess
from .engines import spare_bytes
from .machine import Machine, utc_now
from .requests import Broker
from .tickets import ServedModel
from .tuning import Tuning

log = logging.getLogger(__name__)

MAX_DIAGNOSTICS = 8
MAX_NOTE = 1024
_LAST_WORDS_SECONDS = 1.5
"""For an engine that has said why it fails, or was told goodbye by force, to end itself."""
_RING_POLL_SECONDS = 0.1
_ANSWERS: dict[type, TaskName] = {
    channel.Connected: TaskName.CONNECT_TO_GROUP,
    channel.Loaded: TaskName.LOAD_MODEL,
    channel.WarmedUp: TaskName.START_WARMUP,
}


class Runner:
    """The runner of `epoch`. `on_ready` is called once its engine serves, `on_gone` once it is dead and reaped."""

    def __init__(
        self,
        epoch: int,
        facts: CreateRunner,
        *,
        config: Config,
        machine: Machine,
        broker: Broker,
        tuning: Tuning,
        on_ready: Callable[[], None] = lambda: None,
        on_gone: Callable[[], None] = lambda: None,
    ) -> None:
        self.epoch = epoch
        self.facts = facts
        self.engine: EngineProcess | None = None
        self.model_path: Path | None = None
        """Where the model is, once DownloadModel is done: LoadModel is accepted only then."""
        self.adapter_path: Path | None = None
        self._config = config
        self._machine = machine
        self._broker = broker
        self._tuning = tuning
        self._on_ready = on_ready
        self._on_gone = on_gone
        self._to_load: str | None = None
        self._loading: channel.Load | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._cleanup: asyncio.Task[None] | None = None
        self._ring: asyncio.Task[None] | None = None
        self._download: asyncio.Task[None] | None = None
        self._ending = False
        self._ended = False

    # -- tasks
    def attach(self, engine: EngineProcess) -> None:
        """The engine of this runner is there."""
        self.engine = engine
        engine.on_event = self._on_event
        engine.on_exit = self._on_exit

    def connect(self, task: ConnectToGroup) -> None:
        """Form the group; answered by `Connected`."""
        seconds = self.facts.deadlines.connect
        self._command(
            channel.Connect(
                epoch=self.epoch,
                rank=self._config.rank,
                world_size=self.facts.world_size,
                sharding=self.facts.sharding,
                peers=task.peers,
                listen_host=self._config.listen_host,
                token=self._config.token,
                model_digest=self._machine.report.model.digest if self._machine.report.model else None,
                deadline=seconds,
            ),
            seconds,
            Reason.CONNECT_TIMEOUT,
        )
        if self.facts.sharding is Sharding.TENSOR:
            self._ring = asyncio.create_task(self._watch_ring(), name="ring-port")

    def track(self, download: "asyncio.Task[None]") -> None:
        """A download of this runner: it ends with it."""
        self._download = download

    def load(self, path: str) -> None:
        """Load the shard from a directory; answered by `Loaded`."""
        self._to_load = path
        self._start_deadline(self.facts.deadlines.load, Reason.LOAD_TIMEOUT)
        self._send_load()

    def _send_load(self) -> None:
        """Once the engine has done its imports: only then is known what a spare beside it would take."""
        if self.engine is None or not self.engine.started or self._to_load is None:
            return
        path, self._to_load = self._to_load, None
        serving = self.facts.serving
        limit = self._machine.report.memory_limit_bytes
        self._loading = channel.Load(
            path=path,
            adapter=str(self.adapter_path) if self.adapter_path is not None else None,
            served_name=self.facts.served_name,
            rank=self._config.rank,
            world_size=self.facts.world_size,
            sharding=self.facts.sharding,
            max_concurrent_requests=serving.max_concurrent_requests,
            max_tokens=serving.max_tokens,
            context_length=serving.context_length,
            prompt_cache_bytes=serving.prompt_cache_bytes,
            memory_limit_bytes=limit,
            spare_bytes=self._reserve(self.engine, limit),
            memory_limits=self.facts.memory_limits,
        )
        self.engine.send(self._loading)

    @staticmethod
    def _reserve(engine: EngineProcess, limit: int | None) -> int:
        engine.reserved_bytes = spare_bytes(limit, engine.bare_bytes)
        return engine.reserved_bytes

    def warm_up(self) -> None:
        """Run the first forward passes; answered by `WarmedUp`."""
        known = self._tuning.known(self._loading) if self._loading is not None else None
        self._command(channel.Warmup(second_lane_rows=known), self.facts.deadlines.warmup, Reason.WARMUP_TIMEOUT)

    async def shut_down(self, grace_seconds: float) -> None:
        """End in good order: requests finish within the grace, the engine is told goodbye, or killed; → Shutdown."""
        self._ending = True
        self._cancel_deadline()
        self._broker.pause()
        grace = min(grace_seconds, self.facts.deadlines.shutdown)
        if grace > 0 and self.engine is not None and self.engine.alive:
            try:
                async with asyncio.timeout(grace):
                    await self._broker.idle.wait()
            except TimeoutError:
                log.info("requests still run after the grace of %g s", grace)
            await self._say_goodbye()
        self._broker.lose("the runner was shut down")
        await self.clean_up()
        self._machine.ended(self.epoch)

    async def _say_goodbye(self) -> None:
        """The engine ends itself; rank 0's tells the others by a frame."""
        if self.engine is None:
            return
        self.engine.send(channel.Goodbye())
        try:
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await self.engine.wait()
        except TimeoutError:
            log.info("the engine did not end within %g s of its goodbye: killed", _LAST_WORDS_SECONDS)

    async def clean_up(self) -> None:
        """Kill and reap this runner's engine. Idempotent: whoever asks again awaits the same end."""
        await asyncio.shield(self.retire())

    def retire(self, after: float = 0.0) -> "asyncio.Task[None]":
        """Start the clean-up and say nothing any more; `after`: seconds for the engine to end itself."""
        if self._cleanup is None:
            self._ended = True
            self._cancel_deadline()
            if self._ring is not None:
                self._ring.cancel()
            self._cleanup = asyncio.create_task(self._clean_up(after), name=f"clean-up-{self.epoch}")
        return self._cleanup

    async def _clean_up(self, after: float) -> None:
        if self._download is not None:
            self._download.cancel()
            await asyncio.gather(self._download, return_exceptions=True)
        if self.engine is not None:
            try:
                async with asyncio.timeout(after):
                    await self.engine.wait()
            except TimeoutError:
                self.engine.kill()
                await self.engine.wait()
        self._on_gone()

    # -- failure
    def fail(
        self,
        reason: Reason,
        message: str,
        *,
        exit_: evidence.Exit | None = None,
        peer: int | None = None,
        diagnostics: tuple[str, ...] = (),
        last_words: float = 0.0,
        blamed: bool | None = False,
    ) -> None:
        """This runner failed: tell it, hold its requests, kill the engine. Only the first failure counts.

        `blamed`: the engine did it by itself, perhaps because of a request. None: that is not known yet.
        """
        if self._ended:
            return
        self._ended = True
        failure = LastFailure(
            epoch=self.epoch,
            time=utc_now(),
            state=self.true_state(),
            reason=reason,
            message=message[:4096],
            exit_code=exit_.code if exit_ else None,
            signal=exit_.signal if exit_ else None,
            diagnostics=tuple(line[: evidence.MAX_LINE] for line in (*self._where(), *diagnostics))[:MAX_DIAGNOSTICS],
        )
        log.error(f"runner failed: reason={reason} epoch={self.epoch} state={failure.state} peer={peer}: {message}")
        if self._machine.fail(self.epoch, failure, peer):
            self._broker.lose(message, own_doing=blamed)
            if reason.retry is Retry.NEVER:
                self._broker.give_up(message)
        self.retire(last_words)

    def true_state(self) -> RunnerState:
        """The state at this moment: a worker knows of no requests, but its engine has rows to compute."""
        state = self._machine.state
        if state is RunnerState.READY and self.engine is not None and self.engine.progress.phase is not Phase.IDLE:
            return RunnerState.RUNNING
        return state

    def _where(self) -> tuple[str, ...]:
        """Where the engine was, as one line of evidence; none of one that never began."""
        last = self.engine.progress if self.engine else None
        if last is None or not last.changed:
            return ()
        return (f"engine at step {last.steps}, last progress {max(0.0, time.monotonic() - last.changed):.1f} s ago",)

    def _on_exit(self, exit_: evidence.Exit) -> None:
        if self._ended:
            return
        if self._ending or (exit_.code == 0 and self._machine.report.draining):
            self._broker.lose("the engine ended while the runner was shutting down")
            return
        report = self._machine.report.model_copy(update={"state": self.true_state()})
        self._blame(diagnosis.of_exit(exit_, report), exit_)

    def _blame(self, found: Diagnosis, exit_: evidence.Exit | None = None) -> None:
        lines = exit_.stderr[1 - MAX_DIAGNOSTICS :] if exit_ else ()
        blamed = exit_ is not None and verdict(
            found.reason, signal=exit_.signal, abandoned=exit_.killed_for is not None
        )
        self.fail(found.reason, found.message, exit_=exit_, peer=found.peer, diagnostics=lines, blamed=blamed)

    # -- events of the engine
    def _on_event(self, event: channel.Event) -> None:
        if self._ended:
            return
        match event:
            case channel.Failure() if self._ending:
                log.info("failure during the shutdown, a consequence of it: %s", event.message)
            case channel.Failure():
                self.fail(
                    event.reason,
                    event.message,
                    peer=event.peer,
                    diagnostics=event.diagnostics,
                    last_words=_LAST_WORDS_SECONDS,
                    blamed=verdict(event.reason),
                )
            case channel.Accepted() | channel.Refused() | channel.Delta() | channel.Finished():
                self._broker.deliver(event)
            case channel.Tokenized() | channel.Detokenized():
                self._broker.questions.deliver(event)
            case channel.WaitingFor():
                self._machine.note(waiting_for=event.ranks)
            case channel.LayerLoaded():
                self._machine.note(layers=event.layers, layers_loaded=event.loaded, layers_total=event.total)
            case channel.Connected() | channel.Loaded() | channel.WarmedUp():
                self._answered(event)
            case channel.Started():
                self._send_load()
            case channel.Notice():
                pass

    def _answered(self, event: channel.Connected | channel.Loaded | channel.WarmedUp) -> None:
        name = _ANSWERS[type(event)]
        if self._machine.running(name) is None:
            log.warning("the engine answered %s, which is not under way: ignored", name)
            return
        self._cancel_deadline()
        match event:
            case channel.Connected():
                if self._ring is not None:
                    self._ring.cancel()
                self._machine.complete(self.epoch, name, group="present", waiting_for=())
            case channel.Loaded():
                if event.note:
                    log.info("loaded: %s", event.note)
                total, note = event.layers_total, event.note[:MAX_NOTE] if event.note else None
                facts = {"layers": event.layers, "layers_loaded": total, "layers_total": total, "note": note}
                self._machine.complete(self.epoch, name, **facts)
            case channel.WarmedUp():
                if self._loading is not None:
                    self._tuning.learn(self._loading, event.second_lane_rows)
                self._machine.complete(self.epoch, name)
                if self.engine is not None and self._config.rank == 0:
                    self._broker.open(
                        self.engine.send,
                        self.facts.serving,
                        model=self._served(),
                        resume_seconds=self.facts.deadlines.resume,
                    )
                self._on_ready()

    def _served(self) -> ServedModel:
        model = self._machine.report.model
        facts = self.facts
        return ServedModel(facts.served_name, facts.source, facts.adapter, model.digest if model else None)

    # -- deadlines
    def _command(self, command: channel.Command, seconds: float, reason: Reason) -> None:
        if self.engine is None:
            return
        self.engine.send(command)
        self._start_deadline(seconds, reason)

    def _start_deadline(self, seconds: float, reason: Reason) -> None:
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._missed, reason, seconds)

    def _missed(self, reason: Reason, seconds: float) -> None:
        last, started = (self.engine.progress, self.engine.started) if self.engine else (None, False)
        self._blame(
            diagnosis.of_deadline(
                reason,
                seconds,
                self._machine.report,
                self.facts.sharding,
                steps=last.steps if last else 0,
                started=started,
                waiting_for=last.waiting_for
                if last and last.phase is Phase.WAITING and last.waiting_for >= 0
                else None,
            )
        )

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    async def _watch_ring(self) -> None:
        """The ring closes its listening socket after the first peer, so what was seen once stays true."""
        # Only the kernel's table tells: there is no event to wait for.
        while not sockets.listens(ring_port(self.epoch), self._config.listen_host):  # noqa: ASYNC110
            await asyncio.sleep(_RING_POLL_SECONDS)
        self._machine.note(ring_listening=True)
