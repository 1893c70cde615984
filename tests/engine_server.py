"""A server for this project's generator with vLLM's protocol, which makes errors on request.

    python tests/engine_server.py FOLDER --port 0 [--fault NAME] [--after N] [--log FILE]      prints {"port": N}

It has ``/v1/models`` and ``/v1/completions``, with token ids in requests and replies. Each request is computed alone,
so the reply depends only on the request. The log has a line for every answered request. Log-probabilities come from the
model's forward pass in transformers, not from the code that scores in the runs.
"""

import argparse
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = (
    # of a request in the middle
    *("die", "hang", "503", "429", "error_200", "broken", "abort"),
    # of what comes back
    *("no_ids", "unknown_token", "too_many", "echo", "fewer", "other_model", "no_logprobs", "bad_logprob", "no_stop"),
    *("goes_on", "truncated", "cut_prompt", "cut_prompt_silent"),
    # of the server
    *("401", "404", "400", "no_prompt_logprobs", "two_models", "equal_samples"),
)


@dataclass
class Engine:
    """A model, and the fault of the server.

    Attributes:
        folder: the model's folder, which is also its name.
        fault: the name of a fault; "" for none.
        after: number of requests that are answered correctly before the fault.
        log: file with a line for every answered request.
    """

    folder: Path
    fault: str = ""
    after: int = 0
    log: Path | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)
    asked: int = 0

    def __post_init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from dnpo.policy.loading import load

        torch.set_num_threads(1)
        self.policy = load(str(self.folder), None)
        self.plain = AutoModelForCausalLM.from_pretrained(self.folder).eval()

    @property
    def now(self) -> str:
        """The fault of the present request; a temporary fault ends after two requests."""
        begun = self.asked - self.after
        passing = self.fault in ("503", "429", "error_200", "broken", "abort")
        return self.fault if begun > 0 and not (passing and begun > 2) else ""

    def complete(self, body: dict[str, Any], fault: str) -> dict[str, Any]:
        """The reply to a request."""
        from dnpo.generate import Sampling
        from dnpo.generate.hf import complete

        prompt, count, limit = list(body["prompt"]), body["n"], body["max_tokens"]
        sent = list(prompt)
        if fault in ("cut_prompt", "cut_prompt_silent"):
            prompt = prompt[1:]
        if fault == "truncated":
            limit = min(limit, 2)
        sampling = Sampling(temperature=body["temperature"], top_p=body["top_p"], top_k=body["top_k"], batch_size=count)
        streams = [body["seed"] + (0 if fault == "equal_samples" else i) for i in range(count)]
        stops = set(body["stop_token_ids"]) | set(self.policy.stop_ids)
        self.policy.causal_lm.generation_config.eos_token_id = sorted(stops)
        with self.policy.evaluating():
            drawn = complete(self.policy, [prompt] * count, sampling, limit, streams, None)
        choices = [self._choice(i, prompt, tokens, stops, body) for i, tokens in enumerate(drawn)]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": sum(map(len, drawn))}
        reply = {"object": "text_completion", "model": str(self.folder), "choices": choices, "usage": usage}
        return self._spoil(reply, sent, fault)

    def _choice(
        self, number: int, prompt: list[int], tokens: list[int], stops: set[int], body: dict[str, Any]
    ) -> dict[str, Any]:
        import torch

        ids = prompt + tokens
        with torch.no_grad():
            table = self.plain(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        logps = [None, *(float(table[t, token]) for t, token in enumerate(ids[1:]))]
        choice: dict[str, Any] = {
            "index": number,
            "text": self.policy.tokenizer.decode(tokens, skip_special_tokens=True),
            "finish_reason": "stop" if tokens[-1] in stops else "length",
            "stop_reason": None,
            "token_ids": tokens,
            "prompt_token_ids": prompt,
            "logprobs": {"token_logprobs": logps[len(prompt) :], "tokens": [], "top_logprobs": [], "text_offset": []},
        }
        if body.get("prompt_logprobs") is not None and self.fault != "no_prompt_logprobs":
            rows = [{str(i): {"logprob": logp, "rank": 1}} for i, logp in zip(prompt, logps, strict=False)]
            choice["prompt_logprobs"] = [None, *rows[1:]]
        return choice

    def _spoil(self, reply: dict[str, Any], prompt: list[int], fault: str) -> dict[str, Any]:
        first = reply["choices"][0]
        if fault == "no_ids":
            del first["token_ids"]
        elif fault == "unknown_token":
            first["token_ids"] = [10**6, *first["token_ids"][1:]]
        elif fault == "too_many":
            first["token_ids"] = [*first["token_ids"], *[5] * 500]
        elif fault == "echo":
            first["token_ids"] = [*prompt, *first["token_ids"]]
            first["logprobs"]["token_logprobs"] = [-1.0] * len(first["token_ids"])
        elif fault == "fewer":
            reply["choices"] = reply["choices"][1:]
        elif fault == "other_model":
            reply["model"] = "another"
        elif fault == "no_logprobs":
            first["logprobs"] = None
        elif fault == "bad_logprob":
            first["logprobs"]["token_logprobs"][0] = 0.5
        elif fault == "no_stop":
            first["finish_reason"] = "stop"
            first["token_ids"] = [5]
            first["logprobs"]["token_logprobs"] = [-1.0]
        elif fault == "goes_on":
            first["token_ids"] = [self.policy.stop_ids[0], 5]
            first["logprobs"]["token_logprobs"] = [-1.0, -1.0]
        elif fault == "abort":
            first["finish_reason"] = "abort"
        elif fault == "cut_prompt_silent":
            del reply["usage"]
            for choice in reply["choices"]:
                del choice["prompt_token_ids"]
        return reply


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    engine: Engine

    def do_GET(self) -> None:
        """List the models."""
        if self._refuse_key():
            return
        names = [str(self.engine.folder), *(["adapter"] if self.engine.fault == "two_models" else [])]
        self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    def do_POST(self) -> None:
        """Complete a prompt."""
        engine, body = self.engine, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refuse_key():
            return
        with engine.lock:
            engine.asked += 1
            fault = engine.now
        if fault == "hang":
            engine.closing.wait(60)
            return
        if fault == "die":
            os._exit(3)
        with engine.lock:
            refused: dict[str, tuple[int, dict[str, Any]]] = {
                "503": (503, {"error": {"message": "the engine is starting"}}),
                "429": (429, {"error": {"message": "slow down"}}),
                "error_200": (200, {"error": {"message": "overloaded", "code": 503}}),
                "404": (404, {"error": {"message": "The model does not exist", "code": 404}}),
                "400": (400, {"error": {"message": "Token id 999 is out of vocabulary", "code": 400}}),
            }
            if fault in refused:
                self._send(*refused[fault], **({"Retry-After": "0.05"} if fault in ("503", "429") else {}))
                return
            reply = engine.complete(body, fault)
            if engine.log is not None:
                probe = body.get("prompt_logprobs") is not None
                row = {"prompt": body["prompt"], "n": body["n"], "seed": body["seed"], "probe": probe}
                row |= {"temperature": body["temperature"], "key": self.headers.get("Authorization", "")}
                with engine.log.open("a") as stream:
                    stream.write(json.dumps({**row, "pid": os.getpid()}) + "\n")
        self._send(200, reply, cut=fault == "broken")

    def _refuse_key(self) -> bool:
        wanted = os.environ.get("VLLM_API_KEY", "")
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.engine.fault == "401" or (wanted and given != wanted):
            self._send(401, {"error": {"message": f"wrong key {given}"}})
            return True
        return False

    def _send(self, status: int, content: Any, cut: bool = False, **headers: str) -> None:
        raw = json.dumps(content).encode()
        raw = raw[: len(raw) // 2] if cut else raw
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):  # the client has disconnected
            self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[str]:
    """Run a server in a thread of this process; yield its address."""
    engine = Engine(folder, **settings)
    handler = type("Handler", (Handler,), {"engine": engine})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        engine.closing.set()
        server.shutdown()
        server.server_close()


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fault", choices=FAULTS, default="")
    parser.add_argument("--after", type=int, default=0)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--serve", type=Path, help="another folder, whose weights are served under the name of FOLDER")
    given = parser.parse_args()
    engine = Engine(given.serve or given.folder, given.fault, given.after, given.log)
    engine.folder = given.folder
    server = ThreadingHTTPServer(("127.0.0.1", given.port), type("Handler", (Handler,), {"engine": engine}))
    server.daemon_threads = True
    print(json.dumps({"port": server.server_address[1]}), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
