"""A server that speaks OpenAI's chat API, with faults and bad habits on demand; and, as a command, a stand-in for vLLM.

What it answers is a function of (messages, seed, temperature, top_k, min_p), so a test can say what must come back.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = {"429": 0.10, "500": 0.05, "dropped": 0.05, "torn": 0.02}


def words(body: dict) -> list[str]:
    """The words of the answer, before it is cut: 20, or as many as the question's number says."""
    greedy = body["temperature"] == 0 or body.get("top_k") == 1 or body.get("min_p") == 1
    decides = [body["messages"], None if greedy else [body.get(name) for name in ("seed", "temperature", "top_k")]]
    draw = random.Random(hashlib.sha256(json.dumps(decides).encode()).digest())
    asked = body["messages"][-1]["content"].split()[-1]
    return [draw.choice("abcdefghij") for _ in range(int(asked) if asked.isdigit() else 20)]


class ChatServer(ThreadingHTTPServer):
    """Serves on a free loopback port until `close`.

    Attributes:
        served: how often each seed was answered in full.
        most: the most requests that were there at one time.
        arrivals: (time, seed) of every request for a chat.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, habits: tuple[str, ...] = (), faults: dict[str, float] | None = None, seconds: float = 0.0,
                 script: tuple[tuple[int, dict, object], ...] = (), port: int = 0):  # fmt: skip
        super().__init__(("127.0.0.1", port), _Handler)
        self.habits, self.faults, self.seconds, self.script = set(habits), faults or {}, seconds, list(script)
        self.served: collections.Counter = collections.Counter()
        self.faulted: collections.Counter = collections.Counter()
        self.arrivals: list[tuple[float, int | None]] = []
        self.bodies: list[dict] = []
        self.here = self.most = self.clock = 0
        self.draw, self.lock = random.Random(5), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def fault(self) -> str | None:
        drawn = self.draw.random()
        for name, share in self.faults.items():
            if drawn < share:
                self.faulted[name] += 1
                return name
            drawn -= share
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, said: object, headers: dict[str, str] | None = None, torn: bool = False) -> None:
        content = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        content = content[: len(content) // 2] if torn else content
        head = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        lines = [f"HTTP/1.1 {status} -", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        self.wfile.write("\r\n".join(lines).encode() + content)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            names = ("tiny", "other")
            self.send(200, {"data": [{"id": name, "root": "/secret/place"} for name in names]})
        elif self.path == "/version":
            self.send(200, {"version": "0.0.1"})
        else:
            self.send(200 if self.path == "/health" else 404, "")

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.arrivals.append((time.monotonic(), body.get("seed")))
            server.bodies.append(body)
            server.here += 1
            server.most = max(server.most, server.here)
            scripted = server.script.pop(0) if server.script else None
            fault = None if scripted else server.fault()
        try:
            time.sleep(server.seconds)
            self.respond(body, scripted, fault)
        finally:
            with server.lock:
                server.here -= 1

    def respond(self, body: dict, scripted: tuple[int, dict, object] | None, fault: str | None) -> None:
        server = self.server
        if scripted is not None:
            status, headers, said = scripted
            if said == "echo the key":
                said = {"error": {"message": f"wrong key: {self.headers.get('Authorization')}"}}
            if said is not None:
                return self.send(status, said, headers)
        if fault in ("429", "500"):
            return self.send(int(fault), {"error": {"message": "too much"}})
        if fault == "dropped":
            self.close_connection = True
            return None
        for name in ("seed", "top_k", "min_p"):
            if f"rejects {name}" in server.habits and name in body:
                return self.send(422, {"detail": f"{name} is not known"})
        with server.lock:
            if fault is None:
                server.served[body.get("seed")] += 1
            said = self.completion(body)
        return self.send(200, said, torn=fault == "torn")

    def completion(self, body: dict) -> dict:
        server, asked = self.server, dict(body)
        server.clock += 1
        if "ignores seed" in server.habits or ("shares seed" in server.habits and server.here > 1):
            asked["seed"] = server.clock
        if "one text" in server.habits:
            asked["seed"] = 0
        for name in ("top_k", "min_p"):
            if f"ignores {name}" in server.habits:
                asked.pop(name, None)
        if "moves" in server.habits and server.clock % 8 == 0:  # as a GPU's logits do with a batch's shape
            asked["seed"] = server.clock
        drawn = words(asked)
        said = drawn[: body["max_tokens"]]
        finish = "length" if len(said) < len(drawn) and "always stops" not in server.habits else "stop"
        choice = {"index": 0, "message": {"role": "assistant", "content": " ".join(said)}, "finish_reason": finish}
        if "no finish_reason" in server.habits:
            del choice["finish_reason"]
        usage = {"prompt_tokens": len(body["messages"]), "completion_tokens": len(said)}
        return {"choices": [choice], "system_fingerprint": "fp-1"} | (
            {} if "no usage" in server.habits else {"usage": usage}
        )


def main() -> None:
    """`vllm serve MODEL --port N …`: tells how it was started, and is ready after a while (or dies, by its model)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    args, others = parser.parse_known_args()
    keys = ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "OPENAI_API_KEY")
    environment = {name: os.environ[name] for name in keys if name in os.environ}
    child = os.fork()  # as vLLM has an engine beside its server
    if child == 0:
        time.sleep(120)
        os._exit(0)
    told = {"pid": os.getpid(), "child": child, "port": args.port, "others": others, "environment": environment}
    print(json.dumps(told), flush=True)
    if "broken" in args.model:
        print("ValueError: no kernel for this card", file=sys.stderr)
        sys.exit(3)
    time.sleep(0.3)
    with ChatServer(port=args.port):
        threading.Event().wait(60)


if __name__ == "__main__":
    main()
