"""What to do about a cause, chosen by the words in which it was told, and found again at the end of a message.

The catalogue of reasons has one remedy for each; where the words say more, a row of the table here fits better.
"""

import re
from dataclasses import dataclass

from mlx_operator_api.conditions import Reason


@dataclass(frozen=True, slots=True)
class Remedy:
    """The next step where a reason was told in certain words."""

    reason: Reason
    words: str
    """What they match; its named groups stand in the text as `{name}`."""
    text: str


_R = Reason


def _of_pods(words: str, text: str) -> tuple[Remedy, Remedy]:
    """Whether a pod was to be created or deleted."""
    return Remedy(_R.POD_REFUSED, words, text), Remedy(_R.POD_STUCK, words, text)


_TABLE = (
    # The scheduler counts nodes by what is against each: only where all say the same is it clear what helps.
    Remedy(
        _R.UNSCHEDULABLE,
        r"nodes are available: \d+ Insufficient (?P<what>[a-z0-9./-]+?)\.( |$)",
        "free or add {what} on the nodes, or lower spec.runner.resources.requests",
    ),
    Remedy(
        _R.UNSCHEDULABLE,
        r"nodes are available: \d+ node\(s\) didn't match Pod's node affinity/selector\.",
        "correct spec.runner.nodeSelector or affinity, or label a node so that it matches",
    ),
    Remedy(
        _R.UNSCHEDULABLE,
        r"nodes are available: \d+ node\(s\) had untolerated taint\(s\)\.",
        "add the taint of the nodes to spec.runner.tolerations, or take it off a node",
    ),
    Remedy(
        _R.POD_REFUSED,
        r"exceeded quota: (?P<name>[^ ,]+)",
        "raise the ResourceQuota {name}, free what it counts, or lower spec.runner.resources or spec.runners",
    ),
    Remedy(
        _R.POD_REFUSED,
        r"failed quota: (?P<name>[^ :]+): must specify",
        "set in spec.runner.resources what the ResourceQuota {name} demands",
    ),
    Remedy(
        _R.POD_REFUSED,
        r"(minimum|maximum) \S+ usage per \w+ is",
        "keep spec.runner.resources within the LimitRange of the namespace, or change that",
    ),
    Remedy(
        _R.POD_REFUSED,
        r"violates PodSecurity",
        "change the level that the namespace enforces, or correct spec.runner as the message says",
    ),
    Remedy(
        _R.POD_REFUSED,
        r'serviceaccounts? "(?P<name>[^"]+)" not found',
        "create the ServiceAccount {name} in the namespace of the ModelInstance, or correct "
        "spec.runner.serviceAccountName",
    ),
    Remedy(
        _R.POD_REFUSED,
        r"no PriorityClass with name (?P<name>\S+) was found",
        "create the PriorityClass {name}, or correct spec.runner.priorityClassName",
    ),
    Remedy(
        _R.POD_REFUSED,
        r'RuntimeClass "(?P<name>[^"]+)" not found',
        "create the RuntimeClass {name}, or correct spec.runner.runtimeClassName",
    ),
    *_of_pods(
        r'failed calling webhook "(?P<name>[^"]+)".*(deadline exceeded|Client\.Timeout|(handshake|i/o) timeout)',
        "see why the admission webhook {name} does not answer in its time; it is tried again by itself",
    ),
    *_of_pods(
        r"did not finish in its time to (create|delete)",
        "look for a slow admission webhook, or an API server with too much to do; it is tried again by itself",
    ),
    *_of_pods(
        r'failed calling webhook "(?P<name>[^"]+)"',
        "bring the admission webhook {name} back; it is tried again by itself",
    ),
    Remedy(
        _R.POD_REFUSED,
        r'admission webhook "(?P<name>[^"]+)" denied the request',
        "correct spec.runner so that the admission webhook {name} allows the pod, or ask its owner",
    ),
    Remedy(
        _R.POD_REFUSED,
        r"ValidatingAdmissionPolicy '(?P<name>[^']+)'",
        "correct spec.runner so that the ValidatingAdmissionPolicy {name} allows the pod, or change the policy",
    ),
    *_of_pods(
        r'User "(?P<user>[^"]+)" cannot (?P<verb>\w+) resource "(?P<what>[^"]+)"',
        "give the operator its permission back (helm upgrade does): kubectl auth can-i {verb} {what} --as {user}",
    ),
    Remedy(
        _R.CHILD_CONFLICT,
        r"lacks the label (?P<label>\S+)",
        "put the label back, or delete the pod: kubectl label --overwrite pod POD {label}",
    ),
    Remedy(
        _R.IMAGE_PULL_FAILED,
        r"not present with pull policy of Never",
        "load the image onto the node, or set runner.image.pullPolicy of the chart to IfNotPresent",
    ),
    Remedy(
        _R.IMAGE_PULL_FAILED,
        r"(?i)invalid reference format|couldn't parse image",
        "correct spec.runner.image: it is no name of an image",
    ),
    Remedy(
        _R.IMAGE_PULL_FAILED,
        r"(?i)toomanyrequests|too many requests",
        "wait for the registry's rate limit, or give the pods an account there: spec.runner.imagePullSecrets",
    ),
    Remedy(
        _R.IMAGE_PULL_FAILED,
        r"(?i)unauthorized|authorization failed|authentication required|denied|forbidden",
        "name a Secret for this registry in spec.runner.imagePullSecrets, or correct spec.runner.image",
    ),
    Remedy(
        _R.IMAGE_PULL_FAILED,
        r"(?i)no match for platform|no matching manifest",
        "use an image for the node's architecture, or choose other nodes with spec.runner.nodeSelector",
    ),
    Remedy(
        _R.IMAGE_PULL_FAILED,
        r"(?i)no such host|connection refused|timeout|timed out|x509|no route to host|unreachable",
        "make the registry reachable from the node (DNS, proxy, firewall, certificates), or correct spec.runner.image",
    ),
    Remedy(
        _R.IMAGE_PULL_FAILED,
        r"(?i)not found|manifest unknown",
        "correct spec.runner.image: the registry has no such image",
    ),
    Remedy(
        _R.CONTAINER_START_ERROR,
        r"Multi-Attach error|already exclusively attached",
        "use a claim with the access mode ReadOnlyMany or ReadWriteMany, or keep the ranks on one node by affinity",
    ),
    Remedy(
        _R.OUT_OF_MEMORY,
        r"OOMKilled, no memory limit",
        "set spec.runner.resources with requests and limits for memory, so that its node has room for the shard",
    ),
    Remedy(
        _R.EVICTED,
        r"low on resource: memory",
        "set spec.runner.resources.requests.memory to what the shard needs, so that other pods are evicted first",
    ),
    Remedy(
        _R.EVICTED,
        r"low on resource: ",
        "free disk space on the node, or keep the files on a claim: spec.cache.claimName",
    ),
    Remedy(
        _R.EVICTED,
        r'EmptyDir volume "cache" exceeds',
        "raise spec.cache.sizeLimit, or keep the files on a claim: spec.cache.claimName",
    ),
    Remedy(
        _R.EVICTED,
        r"ephemeral local storage usage|local ephemeral storage limit",
        "raise spec.runner.resources.limits for ephemeral-storage, or keep the files on a claim: spec.cache.claimName",
    ),
    Remedy(
        _R.EVICTED,
        r"Preempt",
        "nothing, if that pod may go first and there is room elsewhere; else set spec.runner.priorityClassName",
    ),
    Remedy(
        _R.EVICTED,
        r"node (?P<node>\S+) is cordoned",
        "nothing: the group starts again on other nodes; when the work on the node is done: kubectl uncordon {node}",
    ),
    Remedy(
        _R.EVICTED,
        r"Taint manager",
        "nothing, once a node without that taint has room; spec.runner.tolerations lets pods stay",
    ),
    Remedy(
        _R.NODE_LOST,
        r"node (?P<node>\S+) is NotReady",
        "nothing for the group, which moves to other nodes; look at the node: kubectl describe node {node}",
    ),
    Remedy(
        _R.VOLUME_NOT_BOUND,
        r"its claim is (?P<name>\S+)$",
        "see what holds it up: kubectl describe pvc {name}; it needs a StorageClass that provisions, or a free volume",
    ),
    Remedy(
        _R.POD_STUCK,
        r"ValidatingAdmissionPolicy '(?P<name>[^']+)'",
        "let the ValidatingAdmissionPolicy {name} allow the operator to delete pods, or do it: kubectl delete pod POD",
    ),
    Remedy(
        _R.POD_STUCK,
        r'admission webhook "(?P<name>[^"]+)" denied the request',
        "let the admission webhook {name} allow the operator to delete pods, or do it: kubectl delete pod POD",
    ),
    Remedy(
        _R.POD_STUCK,
        r"refused to delete it",
        "see in the message who refuses it, and let the operator delete pods, or do it: kubectl delete pod POD",
    ),
    Remedy(
        _R.POD_STUCK,
        r"held by the finalizers? ",
        "let the controller of that finalizer finish; if it is gone for good, remove it: kubectl edit pod POD",
    ),
)
"""The first row that matches counts."""

MODEL_IMAGE = "correct {field} or imagePullSecrets, or make the registry reachable"
"""About ImagePullFailed, when the image is the model's or the adapter's."""
IMAGE_VOLUME = "upgrade the nodes, or use a pvc:// source in {field}"
ADAPTER = (
    "correct spec.model.adapter.source: it must lead to a directory with adapter_config.json and adapters.safetensors"
)
"""About ModelNotFound, when it is the adapter that was not found."""
MISSING = "create the {kind} {name} in namespace {namespace}, or correct {field}"
"""About an object that a field of the spec names."""
MISSING_KEY = "add the key that the message names to the {kind} {name}, or correct {field}"
LOST_TOKEN = "make its Secret again, which is done with each new pod: kubectl delete pod POD"  # noqa: S105 (no token)
_OTHERS = {
    Reason.IMAGE_PULL_FAILED: (MODEL_IMAGE,),
    Reason.IMAGE_VOLUME_UNSUPPORTED: (IMAGE_VOLUME,),
    Reason.CONTAINER_START_ERROR: (MISSING, MISSING_KEY, LOST_TOKEN),
    Reason.VOLUME_NOT_FOUND: (MISSING,),
    Reason.MODEL_NOT_FOUND: (ADAPTER,),
}


def find(reason: Reason, words: str, pod: str | None) -> str:
    """What to do about a reason that was told in these words, with the pod's name in the commands."""
    for row in _TABLE:
        if row.reason is reason and (found := re.search(row.words, words)) is not None:
            return of_pod(row.text.format(**found.groupdict()), pod)
    return of_pod(reason.remedy, pod)


def of_pod(text: str, pod: str | None) -> str:
    """A remedy with the pod's name in place of POD."""
    return text if pod is None else re.sub(r"\bPOD\b", pod, text)


def split(message: str, reason: Reason) -> tuple[str, str]:
    """A message without its next step, and that step; the catalogue's where the message has none that is known."""
    rows = (row.text for row in _TABLE if row.reason is reason)
    texts = (*rows, *_OTHERS.get(reason, ()), reason.remedy)
    ends = (re.search(f"; ({_pattern(text)})$", message) for text in texts if text)
    first = min((end for end in ends if end is not None), key=lambda end: end.start(), default=None)
    return (message, reason.remedy) if first is None else (message[: first.start()], first[1])


def _pattern(text: str) -> str:
    """What a remedy looks like once its names are filled in."""
    parts = re.split(r"\{\w+\}|\bPOD\b", text)
    return "[^;]+?".join(re.escape(part) for part in parts)
