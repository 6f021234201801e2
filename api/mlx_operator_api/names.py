"""Names that several parts must agree on: the API group, labels, annotations, ports, children.

Nothing here is written a second time anywhere; the chart and the CRD are checked against it by tests.
"""

GROUP = "mlx-operator.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "ModelInstance"
PLURAL = "modelinstances"
SINGULAR = "modelinstance"
SHORT_NAME = "mi"
CATEGORY = "mlx"

CONTROLLER = f"{GROUP}/controller"
"""`reportingController` of our events."""
FIELD_MANAGER = "mlx-operator"
"""Manager name of every write, as `kubectl get --show-managed-fields` shows it."""

# Labels on every child. `INSTANCE_LABEL` selects them all and is what the operator watches by.
INSTANCE_LABEL = f"{GROUP}/instance"
INSTANCE_UID_LABEL = f"{GROUP}/instance-uid"
RANK_LABEL = f"{GROUP}/rank"

# Annotations of a ModelInstance that a person sets: any new value acts once.
RETRY_ANNOTATION = f"{GROUP}/retry"
RESTART_ANNOTATION = f"{GROUP}/restart"
# Annotation of a pod: hash of the template it was created from.
TEMPLATE_HASH_ANNOTATION = f"{GROUP}/template-hash"

MAX_NAME_LENGTH = 50
"""Of a ModelInstance: its pods are NAME-RANK and its Secret NAME-UID8-KEYID8, and names of pods are host names (63)."""
MAX_RUNNERS = 64

# Ports of a runner pod. Fixed, so that NetworkPolicies and people can rely on them.
PUBLIC_PORT = 8080
"""Public OpenAI-compatible API (rank 0)."""
CONTROL_PORT = 8081
"""Control API, report stream, probes, metrics (every rank)."""
FRAME_PORT = 8082
"""Frames and hidden states between ranks: the lower rank listens, the higher dials."""
RING_PORT_BASE = 8100
RING_PORT_COUNT = 100

CONTAINER = "runner"
"""Name of the one container of a runner pod."""
TOKEN_MOUNT = "/var/run/secrets/mlx-operator.dev"  # noqa: S105 (a path)
"""Where the instance's Secret is mounted in a runner pod; the key `token` holds the bearer token."""
TOKEN_KEY = "token"  # noqa: S105 (the name of a key)
API_KEY_MOUNT = "/var/run/secrets/mlx-api-keys"
"""Where the Secret with the keys of clients is mounted in rank 0's pod."""
API_KEY = "api-key"
"""Default key of that Secret."""
STATE_MOUNT = "/var/run/mlx-runner"
"""Small emptyDir that outlives the supervisor's process: its reports, for its successor."""
MODEL_MOUNT = "/models/source"
ADAPTER_MOUNT = "/models/adapter"
ADAPTER_FIELD = "spec.model.adapter"
"""Begins what a download says of an adapter, so that it is told apart from the model."""
"""Read-only mount of a `pvc://` claim or an `oci://` image."""
CACHE_MOUNT = "/models/cache"
"""Writable cache for downloads."""

# Environment of a runner container: how its supervisor learns who it is.
ENV_INSTANCE = "MLX_INSTANCE_NAME"
ENV_NAMESPACE = "MLX_INSTANCE_NAMESPACE"
ENV_UID = "MLX_INSTANCE_UID"
ENV_RANK = "MLX_RUNNER_RANK"
ENV_POD_NAME = "MLX_RUNNER_POD_NAME"
ENV_POD_UID = "MLX_RUNNER_POD_UID"
ENV_POD_IP = "MLX_RUNNER_POD_IP"
ENV_NODE_NAME = "MLX_RUNNER_NODE_NAME"
ENV_CACHE_BYTES = "MLX_RUNNER_CACHE_BYTES"
"""Size limit of the cache's emptyDir, in bytes; unset: none."""
ENV_GRACE = "MLX_RUNNER_GRACE_SECONDS"
"""The pod's terminationGracePeriodSeconds."""
HUB_TOKEN_ENV = "HF_TOKEN"  # noqa: S105 (the name of a variable)
"""Where the hub's own tools look for a token, too."""
HUB_TOKEN_KEY = "token"  # noqa: S105 (the name of a key)
"""Key of the Secret of `spec.model.credentialsSecretRef`."""
# With defaults that fit a pod; tests and people on loopback set them.
ENV_LISTEN_HOST = "MLX_RUNNER_LISTEN_HOST"
ENV_TOKEN_FILE = "MLX_RUNNER_TOKEN_FILE"  # noqa: S105 (the name of a variable)
ENV_STATE_DIR = "MLX_RUNNER_STATE_DIR"
ENV_MODEL_DIR = "MLX_RUNNER_MODEL_DIR"
ENV_ADAPTER_DIR = "MLX_RUNNER_ADAPTER_DIR"
ENV_CACHE_DIR = "MLX_RUNNER_CACHE_DIR"
ENV_API_KEY_FILE = "MLX_RUNNER_API_KEY_FILE"
"""Keys of clients, one a line; without it everybody is let in."""


def ring_port(epoch: int) -> int:
    """Port of the MLX ring for an epoch: a new one each time, so that no stale peer is met."""
    return RING_PORT_BASE + epoch % RING_PORT_COUNT


def pod_name(instance: str, rank: int) -> str:
    """Name of the pod of a rank."""
    return f"{instance}-{rank}"


def secret_name(instance: str, uid: str, key_id: str) -> str:
    """Name of the instance's token Secret: bound to the object (uid) and to the operator's key."""
    return f"{instance}-{uid[:8]}-{key_id[:8]}"


def service_name(instance: str) -> str:
    """Name of the client Service, which selects rank 0."""
    return instance


def endpoint(instance: str, namespace: str) -> str:
    """Base URL that an OpenAI client in the cluster uses."""
    return f"http://{service_name(instance)}.{namespace}.svc:{PUBLIC_PORT}/v1"
