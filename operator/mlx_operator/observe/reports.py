"""Report streams: one task per pod whose container runs, for as long as it does."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import datetime

import aiohttp
from pydantic import ValidationError

from mlx_operator.act.runner import RunnerError, RunnerPort, describe, first_error
from mlx_operator.decide.observed import RunnerView
from mlx_operator.logs import decision
from mlx_operator.metrics import Metrics
from mlx_operator.observe.runners import LastLine, Urgency, address, lean, receive, stranger
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from mlx_operator_api import names
from mlx_operator_api.tasks import RunnerReport

FIRST_RETRY_SECONDS = 0.2
LONGEST_RETRY_SECONDS = 2.0
_UNAUTHORIZED = 401
_REFUSALS = 3
"""So often in a row: an address that is used again may be answered by another instance's runner for a moment."""
Changed = Callable[[Key, Urgency], None]


class ReportStreams:
    """Keeps `Store.view` of every running pod up to date.

    Args:
        store: told of every report; says where the pods are.
        port: speaks to the supervisors.
        token_of: bearer token of an instance's uid.
        changed: called with each instance that has to be planned again.
        now: the wall clock.
        lost: called with the uid of each pod whose stream broke.
    """

    def __init__(
        self,
        store: Store,
        port: RunnerPort,
        *,
        token_of: Callable[[str], str],
        changed: Changed,
        now: Callable[[], datetime],
        metrics: Metrics,
        lost: Callable[[str], None] = lambda _uid: None,
    ) -> None:
        self._store = store
        self._port = port
        self._token_of = token_of
        self._changed = changed
        self._now = now
        self._metrics = metrics
        self._pod_lost = lost
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake: dict[str, asyncio.Event] = {}

    def pod_changed(self, uid: str) -> None:
        """Start, hurry or end the stream of a pod."""
        if address(self._store.pod(uid)) is None:
            self._end(uid, "the container does not run")
        elif self._store.owner(uid) is None:
            self._end(uid, "the pod belongs to no ModelInstance that is known")
        elif uid in self._tasks:
            self._wake[uid].set()
        else:
            self._wake[uid] = asyncio.Event()
            task = asyncio.create_task(self._follow(uid), name=f"reports of pod {uid}")
            task.add_done_callback(lambda done: self._ended(uid, done))
            self._tasks[uid] = task

    async def close(self) -> None:
        """End all streams."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        self._tasks.clear()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, uid: str, why: str) -> None:
        task = self._tasks.pop(uid, None)
        self._wake.pop(uid, None)
        if task is not None:
            task.cancel()
            self._lost(uid, why)

    def _ended(self, uid: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(uid) is task:
            del self._tasks[uid]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._metrics.bugs.inc()
            decision("bug in a report stream", level=logging.ERROR, error=error, traceback=True, pod_uid=uid)
            self._lost(uid, f"the operator failed to read its reports: {describe(error)}")

    async def _follow(self, uid: str) -> None:
        delay, refused = FIRST_RETRY_SECONDS, 0
        while (ip := address(self._store.pod(uid))) is not None and (owner := self._store.owner(uid)) is not None:
            try:
                why = await self._read(uid, ip, self._token_of(owner))
                refused = 0
            except RunnerError as error:
                refused = refused + 1 if error.status == _UNAUTHORIZED else 0
                why = str(error) if refused < _REFUSALS else f"{error}{self._wrong_token(uid, owner)}"
            delay = FIRST_RETRY_SECONDS if self._store.view(uid).connected else delay
            self._lost(uid, why)
            self._wake[uid].clear()
            # Jitter: the streams of a node that went away do not all come back at one instant.
            pause = delay * random.uniform(0.8, 1.2)  # noqa: S311 (jitter is no secret)
            try:
                async with asyncio.timeout(pause):  # not wait_for, which swallows a cancellation at that very moment
                    await self._wake[uid].wait()
            except TimeoutError:
                delay = min(delay * 2, LONGEST_RETRY_SECONDS)

    async def _read(self, uid: str, ip: str, token: str) -> str:
        """Read the stream until it ends; returns why.

        Raises:
            RunnerError: the supervisor says no.
        """
        try:
            async with self._port.reports(ip, token) as lines:
                self._metrics.streams.inc()
                try:
                    return await self._lines(uid, lines)
                finally:
                    self._metrics.streams.dec()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return describe(error)
        except ValueError as error:
            return f"the report stream cannot be read: {describe(error)}"

    def _wrong_token(self, uid: str, owner: str) -> str:
        """What helps against a token that stays refused: the Secret of that name was made by somebody else."""
        pod = self._store.pod(uid)
        if pod is None:
            return ""
        metadata, volumes = pod["metadata"], (pod.get("spec") or {}).get("volumes") or ()
        secret = names.secret_name(metadata["labels"][names.INSTANCE_LABEL], owner, self._store.settings.key_id)
        if not any((volume.get("secret") or {}).get("secretName") == secret for volume in volumes):
            return ""  # a pod of an earlier key, which is replaced anyway
        return (
            f"; Secret {metadata['namespace']}/{secret} does not hold the token that the operator made: "
            "delete it and the pods that use it"
        )

    async def _lines(self, uid: str, lines: AsyncIterator[bytes]) -> str:
        last = LastLine()
        async for line in lines:
            if (repeated := last.repeated(line, self._store.view(uid), self._now())) is not None:
                self._keep(uid, repeated, Urgency.NONE)
                continue
            try:
                report = lean(RunnerReport.model_validate_json(line))
            except ValidationError as error:
                self._undecodable(uid, first_error(error))
                continue
            pod = self._store.pod(uid)
            if pod is None:
                return "the pod is gone"
            if (why := stranger(pod, report)) is not None:
                return why
            view, urgency = receive(self._store.view(uid), report, self._now(), stream=True)
            last.keep(line, report)
            if view.report is report:
                self._metrics.reported(uid, report)
            self._keep(uid, view, urgency)
        return "the supervisor ended the stream"

    def _undecodable(self, uid: str, why: str) -> None:
        view = self._store.view(uid)
        text = f"report cannot be decoded: {why}"
        urgency = Urgency.NONE if view.undecodable and view.error == text else Urgency.AT_ONCE
        if urgency is Urgency.AT_ONCE:
            decision("undecodable report", instance=self._instance(uid), pod_uid=uid, why=why)
        changed = replace(view, connected=True, received=self._now(), error=text, undecodable=True)
        self._keep(uid, changed, urgency)

    def _lost(self, uid: str, why: str) -> None:
        view = self._store.view(uid)
        if not view.connected and view.error == why:
            return
        self._metrics.forgotten(uid)
        if view.connected:
            epoch, rank = (view.report.epoch, view.report.rank) if view.report is not None else (None, None)
            about = self._instance(uid)
            decision("report stream lost", instance=about, epoch=epoch, rank=rank, pod_uid=uid, why=why)
            self._pod_lost(uid)
        self._keep(uid, replace(view, connected=False, error=why), Urgency.AT_ONCE)

    def _keep(self, uid: str, view: RunnerView, urgency: Urgency) -> None:
        for key in self._store.set_view(uid, view):
            if urgency is not Urgency.NONE:
                self._changed(key, urgency)

    def _instance(self, uid: str) -> str | None:
        pod = self._store.pod(uid)
        if pod is None:
            return None
        return f"{pod['metadata']['namespace']}/{(pod['metadata'].get('labels') or {}).get(names.INSTANCE_LABEL)}"
