"""A quarter of the operator's requests fail, half of those after they were carried out; nothing is lost or doubled."""

import ssl

import pytest

from mlx_operator_api.conditions import Reason
from tests.apiserver.harness import World, again_in, groups_of
from tests.apiserver.proxy import FaultProxy


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_bad_network_loses_no_failure_and_doubles_no_child(place: World, seed: int) -> None:
    identity, place.user = place.user, "bad-network"  # as the audit log names the impersonator
    certificate, key = place.server.pki.issue(place.user, user=place.user, groups=["system:masters"])
    tls = ssl.create_default_context(cafile=str(place.server.pki.ca))
    tls.load_cert_chain(str(certificate), str(key))
    async with FaultProxy(place.server.url, tls, identity, groups_of(identity), seed) as proxy:
        kubeconfig = place.folder / "bad-network.kubeconfig"
        proxy.write_kubeconfig(kubeconfig)
        proxy.rate = 0.25
        # The host of the watches ends with some errors (a list that breaks off); it is started again then.
        async with place.deployment("--kubeconfig", str(kubeconfig)) as operators:
            await place.create()
            await place.until_ready(seconds=120)
            place.kubelet.kill_engine("tiny-1")
            after = await place.until(again_in(2), "Ready in epoch 2", seconds=120)
            proxy.rate = 0.0
            await place.settled(3)

        assert proxy.faults.total() >= 5, proxy.faults
        assert not any("msg=bug" in operator.lines() for operator in operators)
        assert [failure["epoch"] for failure in after["status"]["history"]] == [1]
        assert sorted(pod["metadata"]["name"] for pod in await place.pods()) == ["tiny-0", "tiny-1"]
        assert len(place.requests_that_created("pods")) == 2
        reasons = [event["reason"] for event in await place.events()]
        assert all("series" not in event for event in await place.events())
        if len(operators) == 1:  # an operator that ends between status and event takes the event with it
            assert reasons.count(Reason.RUNNER_FAILED) == 1, reasons
            assert reasons.count(Reason.READY) == 2, reasons
