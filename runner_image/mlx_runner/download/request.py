"""What the download is asked for: one JSON object, its only argument."""

from pathlib import Path

from mlx_operator_api import names
from mlx_operator_api.base import Lenient
from mlx_operator_api.tasks import Sharding


class Request(Lenient):
    """One rank's part of a model source."""

    source: str
    """`spec.model.source`."""
    model_dir: Path
    """Where a claim or an image is mounted."""
    cache_dir: Path
    """Where downloads are kept, in the layout of the Hugging Face hub's own cache."""
    memory: Path
    """Hashes of files under `model_dir`, so that each is read once."""
    revision: str | None = None
    """The commit that all ranks use; None: resolve the source's revision."""
    adapter: str | None = None
    """`spec.model.adapter.source`."""
    adapter_dir: Path = Path(names.ADAPTER_MOUNT)
    """Where its claim or image is mounted."""
    adapter_revision: str | None = None
    """As `revision`."""
    rank: int = 0
    world_size: int = 1
    sharding: Sharding = Sharding.PIPELINE
    memory_limits: tuple[int | None, ...] = ()
    """By rank, as `layers.split` takes them."""
    cache_bytes: int | None = None
    """Most that the cache may hold; None: what its file system has."""
