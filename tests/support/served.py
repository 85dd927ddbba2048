"""A server of `l2v serve` in a process of its own, and the client of OpenAI."""

import json
import multiprocessing
import os
import signal
import sys
import time

import httpx
import numpy as np
import openai

from l2v import Encoder
from l2v.commands import main as cli


def serving(command, log, slow):
    """The process of a server, forked with all imports done. slow: seconds that every forward takes longer."""
    sys.stdout = sys.stderr = open(log, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 - for good
    if slow:
        embed = Encoder.embed
        Encoder.embed = lambda self, batch: time.sleep(slow) or embed(self, batch)
    os._exit(cli.main(command))


class Served:
    def __init__(self, base, folder, *options, slow=0.0, name="tiny"):
        self.log = folder / f"server-{time.monotonic_ns()}.log"
        command = ["serve", str(base), "--name", name, "--port", "0", *map(str, options)]
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=serving, args=(command, self.log, slow))
        self.process.start()
        until = time.monotonic() + 60
        while not (self.log.exists() and "http://" in self.said()) and time.monotonic() < until:
            time.sleep(0.02)
        self.url = self.said().partition(" at ")[2].split()[0]
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def said(self):
        return self.log.read_text(encoding="utf-8")

    def vectors(self, texts, **options):
        reply = self.client.embeddings.create(input=texts, model="tiny", **options)
        assert [row.index for row in reply.data] == list(range(len(reply.data)))
        return np.array([row.embedding for row in reply.data], np.float32)

    def post(self, body, path="/embeddings", **options):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(f"{self.url}{path}", content=content, timeout=60, **options)

    def health(self):
        return httpx.get(self.url.replace("/v1", "/health"), timeout=60).json()

    def end(self):
        os.kill(self.process.pid, signal.SIGTERM)
        self.process.join(60)
        return self.process.exitcode
