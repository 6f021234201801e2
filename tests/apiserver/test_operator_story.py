"""What kubectl shows of the Events of an instance: the story of each epoch, in its order."""

import re

from mlx_operator.act.resources import INSTANCES
from mlx_operator_api.conditions import Reason
from tests.apiserver import injection
from tests.apiserver.harness import World, again_in, eventually

R = Reason
EVENT = re.compile(r"^.*?\s(?:Normal|Warning)\s+(\w+)\s", re.MULTILINE)
STORY = [
    *(R.PODS_CREATED, R.IMAGE_PULL_FAILED, R.EPOCH_STARTED, R.MODEL_LOADED, R.READY, R.RUNNER_FAILED),
    *(R.EPOCH_STARTED, R.MODEL_LOADED, R.READY),
    *(R.SPEC_CHANGED, R.EPOCH_STARTED, R.MODEL_LOADED, R.READY, R.SUSPENDED),
]


async def lived(place: World) -> None:
    """An instance that met with an image that could not be pulled, lost an engine, was changed, and was suspended."""
    await place.operator()
    injection.held(place, "ErrImagePull", "no such image", "tiny-1")
    await place.create()
    await place.until(lambda i: injection.stalled(i, R.IMAGE_PULL_FAILED), "the image cannot be pulled")
    injection.released(place)
    await place.until(again_in(1), "Ready")
    place.kubelet.kill_engine("tiny-1")
    await place.until(again_in(2), "Ready again")
    for spec in ({"serving": {"maxQueue": 3}}, {"suspend": True}):
        await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", {"spec": spec})
        if "suspend" not in spec:
            await place.until(again_in(3), "Ready with the change")

    async def told() -> bool:
        return len(await place.events()) >= len(STORY)

    await eventually(told, "every Event is posted", 30)


async def test_kubectl_shows_the_events_in_the_order_of_the_story(place: World) -> None:
    await lived(place)
    described = await injection.kubectl(place, "describe", "modelinstance", "tiny", "-n", place.namespace)
    assert EVENT.findall(described.partition("\nEvents:\n")[2]) == STORY, described
    listed = await injection.kubectl(place, "events", "--for=modelinstance/tiny", "-n", place.namespace)
    assert EVENT.findall(listed) == STORY, listed
