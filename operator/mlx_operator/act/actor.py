"""Performs what a plan says: each action once, and a refused one is data for the next plan."""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from mlx_operator.act.kube import CHILD_SECONDS, Kube, KubeError, Manifest
from mlx_operator.act.resources import PODS, SECRETS, SERVICES, Resource
from mlx_operator.act.tasks import TaskSender
from mlx_operator.act.tokens import instance_secret
from mlx_operator.decide.actions import Action, ApplyService, CreatePod, DeletePod, SendTask
from mlx_operator.decide.observed import Refusal
from mlx_operator.logs import decision
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType

_FOREIGN = "Foreign"
_UNWATCHED = "Unwatched"


class Actor:
    """Turns actions into requests.

    Args:
        answered: told of every object that the API server answers with.
        missing: told of the uid of every pod that was to be deleted and was not there.
        later: plans an instance again in so many seconds.
    """

    def __init__(
        self,
        kube: Kube,
        store: Store,
        sender: TaskSender,
        *,
        token_of: Callable[[str], str],
        answered: Callable[[Resource, Mapping[str, Any]], None],
        missing: Callable[[str], None],
        later: Callable[[Key, float], None],
        now: Callable[[], datetime],
    ) -> None:
        self._kube = kube
        self._store = store
        self._sender = sender
        self._token_of = token_of
        self._answered = answered
        self._missing = missing
        self._later = later
        self._now = now

    async def perform(self, key: Key, instance: Mapping[str, Any], actions: Iterable[Action]) -> None:
        """Perform all; one that fails keeps none of the others from being tried.

        Raises:
            KubeError: at least one may succeed when it is planned again.
        """
        failed: KubeError | None = None
        secrets: set[str] = set()
        for action in actions:
            try:
                await self._perform(key, instance, action, secrets)
            except KubeError as error:
                what = f"{type(action).__name__} failed"
                decision(what, level=logging.WARNING, child=_name(action), error=error, **_about(key, instance, action))
                failed = error
        if failed is not None:
            raise failed

    async def _perform(self, key: Key, instance: Mapping[str, Any], action: Action, secrets: set[str]) -> None:
        match action:
            case SendTask():
                self._sender.send(key, action, reason=_reason(instance))
            case DeletePod():
                how = {"gracePeriodSeconds": action.grace_seconds}
                deletion = partial(self._delete_pod, key, instance, action)
                await self._try(key, instance, action, action.uid, how, deletion)
            case CreatePod():
                creation = partial(self._create, key, instance, action, secrets)
                await self._try(key, instance, action, action.name, action.manifest, creation)
            case ApplyService():
                application = partial(self._apply_service, key, instance, action)
                await self._try(key, instance, action, action.name, action.manifest, application)

    async def _delete_pod(self, key: Key, instance: Mapping[str, Any], action: DeletePod) -> None:
        try:
            answer = await self._kube.delete(
                PODS,
                key.namespace,
                action.name,
                uid=action.uid,
                grace_seconds=action.grace_seconds,
                seconds=CHILD_SECONDS,
            )
        except KubeError as error:
            if error.status == 404:
                self._missing(action.uid)
                return
            if error.status != 409:
                raise
            await self._deleted_meanwhile(key, action, error)
            return
        about = _about(key, instance, action)
        decision("pod deleted", **about, pod=action.name, why=action.why, grace_seconds=action.grace_seconds)
        if answer.get("kind") == PODS.kind:
            self._answered(PODS, answer)

    async def _deleted_meanwhile(self, key: Key, action: DeletePod, error: KubeError) -> None:
        """A conflict: there is another pod under the name by now, or somebody changed this one at the same moment."""
        try:
            pod = await self._kube.get(PODS, key.namespace, action.name)
        except KubeError as unread:
            if unread.status != 404:
                raise
            self._missing(action.uid)
            return
        if pod["metadata"]["uid"] == action.uid:
            raise error
        self._answered(PODS, pod)

    async def _try(
        self,
        key: Key,
        instance: Mapping[str, Any],
        action: Action,
        child: str,
        manifest: Mapping[str, Any],
        attempt: Callable[[], Awaitable[None]],
    ) -> None:
        """One attempt at a child; a refusal is kept for the next plan and tried again when its back-off is over.

        While one waits because nobody answered in time, so do all: each attempt would keep this worker as long.

        `child` is what its refusals are kept under; another `manifest` than was refused is tried at once.
        """
        now, refusals = self._now(), self._store.refusals
        wait = max(refusals.wait(key, child, manifest, now), refusals.held_up(key, child, now))
        if wait > 0:
            self._later(key, wait)
            return
        try:
            await attempt()
        except KubeError as error:
            told = error.unreached_webhook or error.unfinished
            if (error.transient and not told) or error.contended:
                raise
            refusal = Refusal(error.status, error.message, self._now())
            refusals.note(key, child, manifest, refusal, late=error.late)
            what = "deletion refused" if isinstance(action, DeletePod) else "child refused"
            decision(what, level=logging.WARNING, child=_name(action), error=error, **_about(key, instance, action))
            self._later(key, 0.0)  # the refusal belongs into status
        else:
            refusals.clear(key, child)

    async def _create(self, key: Key, instance: Mapping[str, Any], action: CreatePod, secrets: set[str]) -> None:
        await self._secret(key, instance, action.secret, secrets)
        await self._create_pod(key, instance, action)

    async def _secret(self, key: Key, instance: Mapping[str, Any], name: str, done: set[str]) -> None:
        if name in done:
            return
        try:
            body = instance_secret(instance, name, self._token_of(instance["metadata"]["uid"]))
            await self._kube.create(SECRETS, key.namespace, body, seconds=CHILD_SECONDS)
        except KubeError as error:
            # Its name holds the uid and the key: an earlier try of ours made the same. Whether somebody else made it
            # with another token (we may not read it) shows when the runners refuse ours.
            if not error.exists:
                raise
        else:
            decision("secret created", **_about(key, instance), secret=name)
        done.add(name)

    async def _create_pod(self, key: Key, instance: Mapping[str, Any], action: CreatePod) -> None:
        try:
            pod = await self._kube.create(PODS, key.namespace, action.manifest, seconds=CHILD_SECONDS)
        except KubeError as error:
            if not error.exists:
                raise
            pod = await self._kube.get(PODS, key.namespace, action.name)
            _require_ours(pod, instance, PODS)
            _require_watched(pod, instance)
        else:
            decision("pod created", **_about(key, instance, action), pod=action.name)
        self._answered(PODS, pod)

    async def _apply_service(self, key: Key, instance: Mapping[str, Any], action: ApplyService) -> None:
        try:
            service = await self._apply(key, instance, action, self._store.service(key))
        except KubeError as error:
            if error.status != 409 or error.reason == _FOREIGN:
                raise
            # What we knew is outdated: it went, or somebody made a namesake.
            service = await self._apply(key, instance, action, None)
        decision("service applied", **_about(key, instance), service=action.name)
        self._answered(SERVICES, service)

    async def _apply(
        self, key: Key, instance: Mapping[str, Any], action: ApplyService, known: Mapping[str, Any] | None
    ) -> Manifest:
        if known is None:
            try:
                known = await self._kube.get(SERVICES, key.namespace, action.name)
            except KubeError as error:
                if error.status != 404:
                    raise
        body = dict(action.manifest)
        if known is not None:
            _require_ours(known, instance, SERVICES)
            # The uid is a precondition: a namesake that somebody makes meanwhile is not taken over.
            body["metadata"] = {**body["metadata"], "uid": known["metadata"]["uid"]}
        force = known is not None
        return await self._kube.apply(SERVICES, key.namespace, action.name, body, force=force, seconds=CHILD_SECONDS)


def owned(child: Mapping[str, Any], instance: Mapping[str, Any]) -> bool:
    """The child's controller is this very instance."""
    owners = child["metadata"].get("ownerReferences") or ()
    return any(owner.get("controller") and owner.get("uid") == instance["metadata"]["uid"] for owner in owners)


def _require_ours(child: Mapping[str, Any], instance: Mapping[str, Any], resource: Resource) -> None:
    if owned(child, instance):
        return
    owner = next(iter(child["metadata"].get("ownerReferences") or ()), None)
    whose = f"{owner['kind']} {owner['name']} (uid {owner['uid']})" if owner else "nobody that it names"
    name = child["metadata"]["name"]
    raise KubeError(409, _FOREIGN, f"{resource.kind} {name} exists and belongs to {whose}")


def _require_watched(pod: Mapping[str, Any], instance: Mapping[str, Any]) -> None:
    """Without the label no watch and no list shows the pod: it would be waited for for ever."""
    name = instance["metadata"]["name"]
    if (pod["metadata"].get("labels") or {}).get(names.INSTANCE_LABEL) == name:
        return
    lacks = f"exists and lacks the label {names.INSTANCE_LABEL}={name}"
    raise KubeError(409, _UNWATCHED, f"{PODS.kind} {pod['metadata']['name']} of this ModelInstance {lacks}")


def _about(key: Key, instance: Mapping[str, Any], action: Action | None = None) -> dict[str, Any]:
    """What every line about a decision carries; the reason is that of Ready in the status that it follows from."""
    rank = action.rank if isinstance(action, CreatePod | DeletePod) else None
    epoch = (instance.get("status") or {}).get("epoch")
    return {"instance": key, "epoch": epoch, "rank": rank, "reason": _reason(instance)}


def _reason(instance: Mapping[str, Any]) -> str | None:
    conditions = (instance.get("status") or {}).get("conditions") or ()
    return next((entry.get("reason") for entry in conditions if entry.get("type") == ConditionType.READY), None)


def _name(action: Action) -> str:
    return action.pod if isinstance(action, SendTask) else action.name
