"""What to do about an object that a pod needs and that is not there: which field of the spec names it."""

import re

from mlx_operator_api import names
from mlx_operator_api.source import SourceKind

from . import remedies
from .picture import Picture
from .spec import Wanted

_OBJECT = re.compile(r'\b(?P<kind>secret|configmap)s? "(?P<name>[^"]+)" not found', re.IGNORECASE)
_KEY = re.compile(r"couldn't find key \S+ in (?P<kind>Secret|ConfigMap) [^/ ]+/(?P<name>\S+)")
_MOUNTED_KEY = re.compile(r'volume "api-keys" ?: references non-existent secret key')
_CLAIM = re.compile(r'persistentvolumeclaims? "(?P<name>[^"]+)" not found')
_KINDS = {"secret": "Secret", "configmap": "ConfigMap"}


def remedy(picture: Picture, words: str) -> str | None:
    """The next step where the kubelet misses a Secret, a ConfigMap or a key of one; None: it misses nothing."""
    wanted = picture.wanted
    if (found := _OBJECT.search(words)) is not None:
        kind, name = _KINDS[found["kind"].lower()], found["name"]
        if name == names.secret_name(wanted.name, wanted.uid, picture.settings.key_id):
            return remedies.LOST_TOKEN
        return remedies.MISSING.format(kind=kind, name=name, namespace=wanted.namespace, field=_field(wanted, name))
    if (found := _KEY.search(words)) is not None:
        field = _field(wanted, found["name"])
        return remedies.MISSING_KEY.format(kind=found["kind"], name=found["name"], field=field)
    keys = wanted.spec.serving.api_key_secret_ref if wanted.spec.serving else None
    if keys is not None and _MOUNTED_KEY.search(words):
        return remedies.MISSING_KEY.format(kind="Secret", name=keys.name, field=_field(wanted, keys.name))
    return None


def _field(wanted: Wanted, name: str) -> str:
    """The field that names a Secret or a ConfigMap."""
    credentials, serving = wanted.spec.model.credentials_secret_ref, wanted.spec.serving
    if credentials is not None and credentials.name == name:
        return "spec.model.credentialsSecretRef"
    if serving is not None and serving.api_key_secret_ref is not None and serving.api_key_secret_ref.name == name:
        return "spec.serving.apiKeySecretRef"
    return "spec.runner.env"


def claim(words: str) -> str | None:
    """The claim that does not exist, in the scheduler's or the kubelet's words."""
    found = _CLAIM.search(words)
    return found["name"] if found is not None else None


def claim_remedy(picture: Picture, name: str) -> str:
    """The next step about a claim that does not exist."""
    wanted = picture.wanted
    places = (("spec.model.source", wanted.source), ("spec.model.adapter.source", wanted.adapter))
    named = (f for f, s in places if s is not None and s.kind is SourceKind.CLAIM and s.name == name)
    field = next(named, "spec.cache.claimName")
    return remedies.MISSING.format(kind="PersistentVolumeClaim", name=name, namespace=wanted.namespace, field=field)
