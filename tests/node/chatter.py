"""Clients that stream answers while something happens to the group."""

import threading
import time
from typing import Any

import openai

from tests.node.chat import client
from tests.node.instance import Instance


class Chatter(threading.Thread):
    """A few streams of long answers, one after the other, until told to stop; keeps what became of them."""

    def __init__(self, cluster: Any, instance: Instance, question: str, streams: int = 3) -> None:
        super().__init__(daemon=True)
        self._cluster, self._instance, self._question, self._streams = cluster, instance, question, streams
        self._enough = threading.Event()
        self.started = threading.Event()
        """A token came; cleared by whoever wants to see another."""
        self.errors: list[Exception] = []
        self.answered = 0

    def run(self) -> None:
        with client(self._cluster, self._instance) as llm:
            threads = [threading.Thread(target=self._ask, args=(llm,), daemon=True) for _ in range(self._streams)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _ask(self, llm: openai.OpenAI) -> None:
        messages = [{"role": "user", "content": self._question}]
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not self._enough.is_set():
            try:
                stream = llm.chat.completions.create(
                    model=self._instance.name, messages=messages, temperature=1.5, max_tokens=400, stream=True
                )
                for _ in stream:
                    self.started.set()
                self.answered += 1
            except openai.OpenAIError as error:
                self.errors.append(error)
                return

    def streaming(self) -> None:
        """Wait until a token comes from now on."""
        self.started.clear()
        assert self.started.wait(60), "the requests never began to stream"

    def finish(self) -> None:
        """No further question; wait for the last answers."""
        self._enough.set()
        self.join(100)
