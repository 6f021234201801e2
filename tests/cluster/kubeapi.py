"""The few requests that the cluster itself sends to its API server, with nothing but the standard library."""

import http.client
import json
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.errors import ClusterError

_MANAGER = "mlx-operator-local-cluster"
_PLURALS = {
    "ServiceAccount": "serviceaccounts",
    "ClusterRole": "clusterroles",
    "ClusterRoleBinding": "clusterrolebindings",
    "ConfigMap": "configmaps",
    "Deployment": "deployments",
    "Service": "services",
}


class KubeApi:
    """An administrator's connection to the API server at ``127.0.0.1:port``.

    Args:
        port: the API server's port on loopback.
        ca: the authority's certificate.
        certificate: the administrator's certificate.
        key: the administrator's key.
    """

    def __init__(self, port: int, *, ca: Path, certificate: Path, key: Path) -> None:
        self._port = port
        self._tls = ssl.create_default_context(cafile=str(ca))
        self._tls.load_cert_chain(str(certificate), str(key))

    def request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, content_type: str = "application/json"
    ) -> tuple[int, str]:
        """Return (HTTP status, body) of one request.

        Raises:
            OSError: the API server cannot be reached.
        """
        connection = http.client.HTTPSConnection("127.0.0.1", self._port, timeout=10, context=self._tls)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": content_type})
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        except http.client.HTTPException as error:
            raise OSError(f"broken answer from the API server: {error}") from error
        finally:
            connection.close()

    def ready(self) -> bool:
        """Whether the API server says that it is ready; False too while it cannot be reached."""
        try:
            return self.request("GET", "/readyz")[0] == 200
        except OSError:
            return False

    def get(self, path: str) -> dict[str, Any] | None:
        """Return an object, or None while it is not there or the API server cannot be reached."""
        try:
            status, text = self.request("GET", path)
        except OSError:
            return None
        if status != 200:
            return None
        answer: dict[str, Any] = json.loads(text)
        return answer

    def apply(self, objects: Sequence[Mapping[str, Any]]) -> None:
        """Create or update objects by server-side apply.

        Raises:
            ClusterError: the API server refused one, with its answer.
        """
        for item in objects:
            path = f"{_path(item)}?fieldManager={_MANAGER}&force=true"
            status, text = self.request("PATCH", path, item, content_type="application/apply-patch+yaml")
            if status not in (200, 201):
                name = f"{item['kind']} {item['metadata']['name']}"
                raise ClusterError(f"The API server refused {name} with status {status}: {text[:500]}")


def _path(item: Mapping[str, Any]) -> str:
    version, metadata = item["apiVersion"], item["metadata"]
    root = f"/api/{version}" if "/" not in version else f"/apis/{version}"
    namespace = f"/namespaces/{metadata['namespace']}" if "namespace" in metadata else ""
    return f"{root}{namespace}/{_PLURALS[item['kind']]}/{metadata['name']}"


def conditions(item: Mapping[str, Any] | None) -> dict[str, str]:
    """Return {condition type: status} of an object, empty when there is none."""
    if item is None:
        return {}
    return {c["type"]: c["status"] for c in item.get("status", {}).get("conditions", [])}
