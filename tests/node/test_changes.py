"""Changes of the spec while the group runs: what is replaced, what stays, and that it serves again."""

from collections.abc import Callable
from typing import Any

from mlx_operator_api.conditions import ConditionType, Reason
from tests.node.chat import Questions, ask, client
from tests.node.instance import Instance
from tests.node.kube import wait_for
from tests.node.testbed import MODEL_IMAGE


def spec(instance: Instance, **changes: Any) -> None:
    instance.kubectl.patch("mi", instance.name, instance.namespace, {"spec": changes})


def test_a_new_sharding_is_a_new_epoch_in_the_same_pods(
    cluster: Any, create: Callable[..., Instance], questions: Questions
) -> None:
    instance = create("reshard", runners=2, sharding="Pipeline")
    epoch, pods = instance.wait_ready()["epoch"], instance.uids()
    spec(instance, sharding="Tensor")
    status = instance.wait_ready(epoch=epoch + 1)
    assert status["epoch"] == epoch + 1
    assert instance.uids() == pods, "a new sharding needs no new pod"
    assert not status.get("history"), "a change of the spec is no failure"
    question, answer = next(iter(questions.answers.items()))
    with client(cluster, instance) as llm:
        assert ask(llm, instance.name, question) == answer


def test_runners_can_be_added_and_taken_away(
    cluster: Any, create: Callable[..., Instance], questions: Questions
) -> None:
    instance = create("resize", runners=1)
    epoch = instance.wait_ready()["epoch"]
    spec(instance, runners=2)
    status = instance.wait_ready(epoch=epoch + 1)
    assert status["runnersReady"] == "2/2"
    spec(instance, runners=1)
    status = instance.wait_ready(epoch=status["epoch"] + 1)
    assert status["runnersReady"] == "1/1"
    assert len(status["runners"]) == 1
    wait_for("the second pod is gone", lambda: len(instance.pods()) == 1, 60)
    question, answer = next(iter(questions.answers.items()))
    with client(cluster, instance) as llm:
        assert ask(llm, instance.name, question) == answer


def test_new_resources_replace_the_pods(create: Callable[..., Instance]) -> None:
    instance = create("regrow", runners=2)
    epoch, pods = instance.wait_ready()["epoch"], instance.uids()
    spec(instance, runner={"resources": {"limits": {"memory": "900Mi"}}})
    status = instance.wait_ready(epoch=epoch + 1)
    assert not set(instance.uids().values()) & set(pods.values())
    assert {p["spec"]["containers"][0]["resources"]["limits"]["memory"] for p in instance.pods().values()} == {"900Mi"}
    assert status.get("restarts", 0) == 0


def test_a_new_image_replaces_the_pods_and_never_do_two_epochs_serve(
    cluster: Any, create: Callable[..., Instance], questions: Questions
) -> None:
    instance = create("reimage", runners=2)
    epoch, pods = instance.wait_ready()["epoch"], instance.uids()
    newer = cluster.tag_runner_image("changed")
    spec(instance, runner={"image": newer})
    serving: set[int] = set()

    def look(status: dict[str, Any]) -> None:
        epochs = {r["epoch"] for r in status["runners"] if r["state"] in ("RunnerReady", "RunnerRunning")}
        assert len(epochs) <= 1, status["runners"]
        serving.update(epochs)

    status = instance.wait_ready(epoch=epoch + 1, meanwhile=look)
    assert serving == {epoch, epoch + 1} or serving == {epoch + 1}
    assert status["runnerImage"] == newer
    assert not set(instance.uids().values()) & set(pods.values())
    question, answer = next(iter(questions.answers.items()))
    with client(cluster, instance) as llm:
        assert ask(llm, instance.name, question) == answer


def test_new_serving_limits_and_a_new_name_are_a_new_epoch_in_the_same_pods(
    cluster: Any, create: Callable[..., Instance], questions: Questions
) -> None:
    instance = create("relimit", runners=1)
    epoch, pods = instance.wait_ready()["epoch"], instance.uids()
    spec(instance, serving={"maxTokens": 3}, model={"servedName": "other"})
    instance.wait_ready(epoch=epoch + 1)
    assert instance.uids() == pods
    question = next(iter(questions.answers))
    with client(cluster, instance) as llm:
        assert [model.id for model in llm.models.list().data] == ["other"]
        messages = [{"role": "user", "content": question}]
        reply = llm.chat.completions.create(model="other", messages=messages)
        assert reply.usage is not None and reply.usage.completion_tokens <= 3


def test_another_model_is_loaded_instead(cluster: Any, create: Callable[..., Instance], questions: Questions) -> None:
    instance = create("remodel", source=cluster.broken_model("architecture"), runners=1)
    instance.wait_condition(ConditionType.STALLED, "True", Reason.MODEL_UNSUPPORTED)
    spec(instance, model={"source": f"oci://{MODEL_IMAGE}"})
    status = instance.wait_ready()
    assert status.get("restarts", 0) == 0
    question, answer = next(iter(questions.answers.items()))
    with client(cluster, instance) as llm:
        assert ask(llm, instance.name, question) == answer


def test_suspend_removes_the_pods_and_resume_serves_again(
    cluster: Any, create: Callable[..., Instance], questions: Questions
) -> None:
    instance = create("pause", runners=2)
    epoch = instance.wait_ready()["epoch"]
    spec(instance, suspend=True)
    ready = instance.wait_condition(ConditionType.READY, "False", Reason.SUSPENDED)
    wait_for("no pod is left", lambda: not instance.pods(), 60)
    assert ready["message"]
    for kind in (ConditionType.RECONCILING, ConditionType.STALLED):
        instance.wait_condition(kind, "False", timeout=30)
    assert instance.kubectl.get("service", instance.name, instance.namespace) is not None
    spec(instance, suspend=False)
    status = instance.wait_ready(epoch=epoch + 1)
    assert status.get("restarts", 0) == 0
    question, answer = next(iter(questions.answers.items()))
    with client(cluster, instance) as llm:
        assert ask(llm, instance.name, question) == answer


def test_labels_and_annotations_of_the_instance_restart_nothing(cluster: Any, create: Callable[..., Instance]) -> None:
    instance = create("label", runners=1)
    before, pods = instance.wait_ready(), instance.uids()
    cluster.settle()
    mark = cluster.audit.mark()
    metadata = {"metadata": {"labels": {"team": "blue"}, "annotations": {"note": "hello"}}}
    instance.kubectl.patch("mi", instance.name, instance.namespace, metadata)
    cluster.quiet(seconds=5)
    assert not cluster.writes(mark)
    assert instance.status()["epoch"] == before["epoch"]
    assert instance.uids() == pods
