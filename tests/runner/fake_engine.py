"""An engine without MLX that speaks the real protocol: channel, progress page, and a star of TCP connections.

For tests of failure paths and of the operator, where MLX's second of imports is only in the way. Rank 0 listens on
the frame port, the others dial it; EOF there is a lost peer, as with the real engine. It "generates" the words of
`ANSWER`, one a token.

`FAKE_ENGINE_PLAN` may name a JSON file that is read at each command, so that a test can change it between epochs:
`{"hang": "Load", "hold": "Load" (until the plan changes, which is then obeyed), "rank": 1 (the plan is of no other),
"fail": {"on": "Connect", "reason": …, "message": …}, "exit": {"on": "Warmup", "code": 3}, "eat": "Load" (memory, until
the plan changes), "bytes": 1000 (of it at a time), "pause": 0.1 (seconds after each time), "token_seconds": 0.1,
"layers": 4, "tokens": 12, "stderr": "…", "abort": "word of a prompt"}`.
"""

import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

from mlx_operator_api import names
from mlx_operator_api.conditions import Reason
from mlx_operator_api.tasks import Peer, Sharding
from mlx_runner import channel
from mlx_runner.progress import Phase, Progress

ANSWER = ["a", "fake", "engine", "has", "no", "weights", "but", "answers", "all", "the", "same"]
_RETRY_SECONDS = 0.05


def plan() -> dict[str, Any]:
    path = os.environ.get("FAKE_ENGINE_PLAN")
    try:
        today = dict(json.loads(Path(path).read_text())) if path else {}
    except FileNotFoundError:
        return {}
    return today if today.get("rank") in (None, int(os.environ.get(names.ENV_RANK, "0"))) else {}


def _name(name: str) -> None:
    Path("/proc/self/comm").write_text(name)


class FakeEngine:
    def __init__(self) -> None:
        self.channel = socket.socket(fileno=int(os.environ[channel.FD_VARIABLE]))
        self.progress = Progress(Path(os.environ[channel.PROGRESS_VARIABLE]))
        self.commands: queue.Queue[channel.Command] = queue.Queue()
        self.cancelled: set[str] = set()
        self.peers: dict[int, socket.socket] = {}
        self.ring: socket.socket | None = None
        """Nobody connects to it: that it listens is what the last rank of a ring is told for."""
        self.rank = 0
        self.world_size = 1
        self.warm = threading.Event()
        self.lock = threading.Lock()

    def say(self, event: channel.Event) -> None:
        with self.lock:
            self.channel.sendall(channel.encode(event))

    def fail(self, reason: Reason, message: str, peer: int | None = None) -> None:
        self.say(channel.Failure(reason=reason, message=message, peer=peer))
        os._exit(channel.FAILURE_EXIT_CODE)

    def read_commands(self) -> None:
        with self.channel.makefile("rb") as lines:
            for line in lines:
                command = channel.decode_command(line)
                if isinstance(command, channel.Cancel):
                    self.cancelled.add(command.id)
                elif isinstance(command, channel.Goodbye):
                    self.goodbye()
                else:
                    self.commands.put(command)
        os._exit(0)

    def run(self) -> None:
        _name(channel.SPARE_NAME)
        self.progress.write(Phase.IDLE)
        threading.Thread(target=self.read_commands, daemon=True).start()
        self.say(channel.Started(pid=os.getpid(), device="cpu", blas="bundled"))
        while True:
            command = self.commands.get()
            _name(channel.ENGINE_NAME)
            self.obey_plan(command.kind)
            match command:
                case channel.Connect():
                    self.connect(command)
                case channel.Load():
                    self.load(command)
                case channel.Warmup():
                    threading.Thread(target=self.warm_up, daemon=True).start()
                case channel.Generate():
                    threading.Thread(target=self.generate, args=[command], daemon=True).start()

    def obey_plan(self, kind: str) -> None:
        if plan().get("hold") == kind:
            self.progress.write(Phase.WAITING)
        while (today := plan()).get("hold") == kind:
            time.sleep(_RETRY_SECONDS)
        if "stderr" in today:
            sys.stderr.write(f"{today['stderr']}\n")
            sys.stderr.flush()
        if today.get("exit", {}).get("on") == kind:
            os._exit(today["exit"]["code"])
        if today.get("fail", {}).get("on") == kind:
            fail = today["fail"]
            self.say(channel.Failure.model_validate({key: value for key, value in fail.items() if key != "on"}))
            os._exit(channel.FAILURE_EXIT_CODE)
        if today.get("eat") == kind:
            eaten = []
            while plan().get("eat") == kind:
                eaten.append(b"x" * int(today.get("bytes", 16 * 1024 * 1024)))
                time.sleep(float(today.get("pause", 0.0)))
        if today.get("hang") == kind:
            self.progress.write(Phase.WAITING)
            threading.Event().wait()

    # -- the group
    def connect(self, command: channel.Connect) -> None:
        self.rank, self.world_size = command.rank, command.world_size
        deadline = time.monotonic() + command.deadline
        if command.sharding is Sharding.TENSOR and self.rank < self.world_size - 1:
            self.ring = socket.create_server((command.listen_host, names.ring_port(command.epoch)))
        if self.rank == 0:
            missing = set(range(1, self.world_size))
            with socket.create_server((command.listen_host, names.FRAME_PORT)) as server:
                while missing:
                    self.say(channel.WaitingFor(ranks=tuple(sorted(missing))))
                    peer, _ = server.accept()
                    rank = int.from_bytes(peer.recv(1))
                    self.peers[rank] = peer
                    missing.discard(rank)
            for peer in self.peers.values():
                peer.sendall(b"+")
        else:
            self.say(channel.WaitingFor(ranks=(0,)))
            self.peers[0] = self.dial(command.peers[0], deadline)
        for rank, peer in self.peers.items():
            threading.Thread(target=self.listen, args=[rank, peer], daemon=True).start()
        self.say(channel.Connected())

    def dial(self, peer: Peer, deadline: float) -> socket.socket:
        while time.monotonic() < deadline:
            try:
                connection = socket.create_connection((peer.pod_ip, peer.port), timeout=1.0)
                connection.settimeout(None)
                connection.sendall(self.rank.to_bytes())
                if connection.recv(1) == b"+":
                    return connection
            except OSError:
                pass
            time.sleep(_RETRY_SECONDS)
        threading.Event().wait()
        raise AssertionError("unreachable")

    def listen(self, rank: int, peer: socket.socket) -> None:
        while True:
            try:
                word = peer.recv(1)
            except OSError:
                word = b""
            match word:
                case b"w":
                    self.warm.set()
                case b"s":
                    self.progress.write(Phase.WAITING, waiting_for=0, steps=1)
                case b"i":
                    self.progress.write(Phase.IDLE)
                case b"g":
                    os._exit(0)
                case _:
                    self.fail(Reason.PEER_LOST, f"connection to rank {rank} closed", rank)

    def tell_all(self, word: bytes) -> None:
        for peer in self.peers.values():
            peer.sendall(word)

    def goodbye(self) -> None:
        if self.rank == 0:
            self.tell_all(b"g")
        os._exit(0)

    # -- the model
    def load(self, command: channel.Load) -> None:
        total = int(plan().get("layers", 4))
        share = total // command.world_size
        first = (command.world_size - 1 - command.rank) * share
        layers = f"{first}-{first + share - 1}"
        for loaded in range(1, share + 1):
            self.progress.write(Phase.COMPUTING, steps=1)
            self.say(channel.LayerLoaded(loaded=loaded, total=share, layers=layers))
        self.progress.write(Phase.IDLE)
        self.say(channel.Loaded(layers=layers, layers_total=share, bytes=1000 * share))

    def warm_up(self) -> None:
        if self.rank == 0:
            self.tell_all(b"w")
        else:
            self.progress.write(Phase.WAITING, waiting_for=0)
            self.warm.wait()
            self.progress.write(Phase.IDLE)
        self.say(channel.WarmedUp())

    def generate(self, command: channel.Generate) -> None:
        today = plan()
        text = command.prompt if isinstance(command.prompt, str) else json.dumps(command.messages)
        if text and "refuse" in text:
            self.say(
                channel.Refused(id=command.id, code="context_length_exceeded", message="too long", param="messages")
            )
            return
        if "abort" in today and today["abort"] in (text or ""):
            os.kill(os.getpid(), signal.SIGABRT)
        prompt_tokens = len((text or "").split())
        self.say(channel.Accepted(id=command.id, prompt_tokens=prompt_tokens))
        asked = int(today.get("tokens", len(ANSWER)))
        count = min(asked, command.max_tokens or asked)
        reason: Literal["stop", "length", "cancelled"] = "length" if count < asked else "stop"
        done = min(count, len(command.resume))
        for index in range(done, count):
            if command.id in self.cancelled:
                reason = "cancelled"
                break
            self.progress.write(Phase.COMPUTING, steps=1, tokens=1)
            self.tell_all(b"s")
            if self.peers:
                self.progress.write(Phase.WAITING, waiting_for=self.world_size - 1)
            time.sleep(float(today.get("token_seconds", 0.001)))
            word = ANSWER[index % len(ANSWER)]
            self.say(channel.Delta(id=command.id, text=word if index == 0 else f" {word}", tokens=(index,)))
            done += 1
        self.progress.write(Phase.IDLE)
        self.tell_all(b"i")
        self.say(
            channel.Finished(
                id=command.id,
                finish_reason=reason,
                prompt_tokens=prompt_tokens,
                completion_tokens=done,
            )
        )


if __name__ == "__main__":
    FakeEngine().run()
