"""The download child as a real process, and repositories for it to fetch."""

import asyncio
import contextlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from mlx_operator_api.conditions import Reason
from mlx_runner.download import result
from mlx_runner.download.request import Request
from mlx_runner.supervisor.downloading import ENVIRONMENT
from tests.hub import Hub, Repository
from tests.runner.supervisors import PATIENCE, ROOT

LAYERS = 4
NAME = "org/tiny"
SOURCE = f"hf://{NAME}"
ADAPTER_NAME = "org/adapter"
ADAPTER = f"hf://{ADAPTER_NAME}"


def write_repository(directory: Path, *, shard_bytes: int = 50_000, tied: bool = False, salt: int = 0) -> Path:
    """A model of four layers in one file each, with embedding, head and an unknown tensor in files of their own."""
    directory.mkdir(parents=True)
    parts = {f"layer-{i}": [f"model.layers.{i}.mlp.weight"] for i in range(LAYERS)}
    parts |= {"embed": ["model.embed_tokens.weight"], "last": ["model.norm.weight"], "odd": ["something.else"]}
    if not tied:
        parts["last"].append("lm_head.weight")
    weight_map: dict[str, str] = {}
    for number, (part, tensors) in enumerate(parts.items()):
        name = f"model-{part}.safetensors"
        weight_map |= dict.fromkeys(tensors, name)
        (directory / name).write_bytes(_safetensors(tensors, shard_bytes, salt + number))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "qwen2", "num_hidden_layers": LAYERS, "tie_word_embeddings": tied}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}" + " " * 20_000)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    for unwanted in ("README.md", "pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors"):
        (directory / unwanted).write_bytes(b"not for us")
    return directory


def write_adapter(directory: Path, *, size: int = 30_000) -> Path:
    """An adapter in mlx-lm's form, beside what training leaves there."""
    directory.mkdir(parents=True)
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapters.safetensors").write_bytes(_safetensors(["model.layers.3.mlp.weight.lora_a"], size, 5))
    (directory / "0000100_adapters.safetensors").write_bytes(b"a checkpoint")
    (directory / "README.md").write_bytes(b"not for us")
    return directory


def _safetensors(tensors: list[str], size: int, salt: int) -> bytes:
    each = size // len(tensors)
    header = {
        name: {"dtype": "U8", "shape": [each], "data_offsets": [i * each, (i + 1) * each]}
        for i, name in enumerate(tensors)
    }
    text = json.dumps(header).encode()
    content = bytes((i * 31 + salt * 7 + i // 251) % 256 for i in range(each * len(tensors)))
    return struct.pack("<Q", len(text)) + text + content


def hub_of(directory: Path, *, adapter: Path | None = None) -> tuple[Hub, Repository]:
    """A hub with that one repository, and one of an adapter."""
    repository = Repository(NAME)
    repository.push(directory)
    repositories = {NAME: repository}
    if adapter is not None:
        repositories[ADAPTER_NAME] = Repository(ADAPTER_NAME)
        repositories[ADAPTER_NAME].push(adapter)
    return Hub(repositories=repositories), repository


class Download:
    """One download child; `lines` is what it has said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.lines: list[result.Line] = []
        self._news = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.lines.append(result.decode(line))
            self._news.set()
        self._news.set()

    def troubles(self) -> list[str]:
        return [line.what for line in self.lines if isinstance(line, result.Trouble)]

    def percents(self) -> list[tuple[int, int]]:
        return [(line.percent, line.total) for line in self.lines if isinstance(line, result.Percent)]

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until what it says, or what it did, fulfils something."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                assert self._process.returncode is None, f"it ended before {what}: {self.lines}"
                with contextlib.suppress(TimeoutError):
                    self._news.clear()
                    await asyncio.wait_for(self._news.wait(), 0.05)

    async def said(self) -> result.Found | result.Refused:
        """The result, which is its last word."""
        async with asyncio.timeout(PATIENCE):
            code = await self._process.wait()
            await self._reader
        assert code == 0, (code, self.lines)
        last = self.lines[-1]
        assert isinstance(last, result.Found | result.Refused)
        return last

    async def found(self) -> result.Found:
        last = await self.said()
        assert isinstance(last, result.Found), last
        return last

    async def refused(self, reason: Reason) -> str:
        last = await self.said()
        assert isinstance(last, result.Refused), last
        assert last.reason is reason, last
        return last.message

    @property
    def root(self) -> Path:
        """The file systems as this child sees them."""
        return Path(f"/proc/{self._process.pid}/root")

    async def kill(self) -> None:
        """SIGKILL, as when its pod goes."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        await self._reader


class Pods:
    """Starts download children against a hub; all are gone afterwards."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub = hub
        self.home = home
        self.cache = home / "cache"
        self.cache.mkdir(exist_ok=True)
        self._started: list[Download] = []

    def request(self, **fields: Any) -> Request:
        known = {"source": SOURCE, "model_dir": self.home, "cache_dir": self.cache, "memory": self.home / "hashes.json"}
        return Request.model_validate(known | fields)

    async def start(
        self, *, environment: dict[str, str] | None = None, cache_size: int | str | None = None, **fields: Any
    ) -> Download:
        """A child in the environment that the supervisor gives it; `cache_size`: on a tmpfs of that size (of mount)."""
        prefix: tuple[str, ...] = ()
        if cache_size is not None:
            mount = f'mount -t tmpfs -o size={cache_size} none "{self.cache}" && exec "$@"'
            prefix = ("unshare", "--mount", "sh", "-c", mount, "sh")
        self._started.append(Download(await self._spawn(subprocess.PIPE, environment, fields, prefix)))
        return self._started[-1]

    async def start_into(self, stdout: int, **fields: Any) -> asyncio.subprocess.Process:
        """A child that writes to a file descriptor of ours."""
        return await self._spawn(stdout, None, fields, ())

    async def _spawn(
        self, stdout: int, environment: dict[str, str] | None, fields: dict[str, Any], prefix: tuple[str, ...]
    ) -> asyncio.subprocess.Process:
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            **ENVIRONMENT,
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home / "hf-home"),
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("api", "runner_image")),
            **(environment or {}),
        }
        argv = [sys.executable, "-m", "mlx_runner.download", self.request(**fields).model_dump_json(by_alias=True)]
        return await asyncio.create_subprocess_exec(*prefix, *argv, env=env, stdout=stdout)

    async def close(self) -> None:
        for download in self._started:
            await download.kill()


@contextlib.asynccontextmanager
async def pods(hub: Hub, home: Path) -> AsyncIterator[Pods]:
    starting = Pods(hub, home)
    try:
        yield starting
    finally:
        await starting.close()
