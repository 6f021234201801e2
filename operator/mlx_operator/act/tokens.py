"""The operator's key, and the token that each instance derives from it.

The key is a Secret in the operator's own namespace: created once, kept for ever, the only Secret that is ever read.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
from typing import Any

from mlx_operator.act.kube import Kube, KubeError
from mlx_operator.act.resources import INSTANCES, SECRETS
from mlx_operator_api import names

DEFAULT_KEY_SECRET = "mlx-operator-key"  # noqa: S105 (the name of an object)
_ENTRY = "key"
_BYTES = 32


class UnusableKeyError(Exception):
    """The operator's key cannot be used; the text says what to do."""


class OperatorKey:
    """The key, and what follows from it."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.key_id = hashlib.sha256(key).hexdigest()[:8]
        """Says which key a Secret was made with, without saying the key."""

    def token(self, uid: str) -> str:
        """Bearer token of the runners of an instance: HMAC-SHA256 of its uid, in hex."""
        return hmac.new(self._key, uid.encode(), hashlib.sha256).hexdigest()


async def operator_key(kube: Kube, namespace: str, name: str = DEFAULT_KEY_SECRET) -> OperatorKey:
    """Read the key, or make it where there is none yet; safe against another operator doing the same.

    Raises:
        UnusableKeyError: the Secret exists and holds no key of ours.
        KubeError: it can be neither read nor created.
    """
    try:
        return _key(await kube.get(SECRETS, namespace, name), namespace, name)
    except KubeError as error:
        if error.status != 404:
            raise
    body = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/managed-by": names.FIELD_MANAGER}},
        "immutable": True,
        "type": "Opaque",
        "data": {_ENTRY: base64.b64encode(secrets.token_bytes(_BYTES)).decode()},
    }
    try:
        return _key(await kube.create(SECRETS, namespace, body), namespace, name)
    except KubeError as error:
        if error.status != 409:
            raise
        return _key(await kube.get(SECRETS, namespace, name), namespace, name)


def instance_secret(instance: Any, name: str, token: str) -> dict[str, Any]:
    """The immutable Secret of an instance, owned by it."""
    metadata = instance["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": name,
            "labels": {names.INSTANCE_LABEL: metadata["name"], names.INSTANCE_UID_LABEL: metadata["uid"]},
            "ownerReferences": [
                {
                    "apiVersion": INSTANCES.api_version,
                    "kind": INSTANCES.kind,
                    "name": metadata["name"],
                    "uid": metadata["uid"],
                    "controller": True,
                    "blockOwnerDeletion": False,
                }
            ],
        },
        "immutable": True,
        "type": "Opaque",
        "data": {names.TOKEN_KEY: base64.b64encode(token.encode()).decode()},
    }


def _key(secret: dict[str, Any], namespace: str, name: str) -> OperatorKey:
    try:
        key = base64.b64decode((secret.get("data") or {}).get(_ENTRY, ""), validate=True)
    except binascii.Error:
        key = b""
    if len(key) < _BYTES:
        raise UnusableKeyError(
            f"Secret {namespace}/{name} has no entry {_ENTRY!r} of at least {_BYTES} bytes: it is not the operator's "
            "key; delete it (a new one is made, and each instance in turn gets new pods with new tokens) or name "
            "another with --key-secret"
        )
    return OperatorKey(key)
