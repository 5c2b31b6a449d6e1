"""A server on loopback with the interface of SGLang's POST /generate, over a bigram teacher."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

VOCABULARY = 30
WINDOW = 64
LOGP_VV = torch.log_softmax(2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)), -1)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def _send(self, status: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        known = {
            "/get_model_info": {"model_path": "/models/big", "tokenizer_path": "/models/big", "is_generation": True},
            "/get_server_info": {"version": "0.5.9", "max_total_num_tokens": 100_000, "context_length": WINDOW},
            "/v1/models": {"data": [{"id": "big", "max_model_len": WINDOW}]},
        }
        self._send(200 if self.path in known else 404, known.get(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/generate":
            self._send(404, {})
            return
        ids = body["input_ids"]
        if len(ids) >= WINDOW:
            self._send(400, {"error": {"message": f"The input ({len(ids)} tokens) is longer than the model's context length ({WINDOW})"}})
            return
        meta: dict[str, Any] = {"prompt_tokens": len(ids)}
        if body.get("return_logprob"):
            start, top, given = body["logprob_start_len"], body["top_logprobs_num"], body["token_ids_logprob"]
            rows = [LOGP_VV[before] for before in ids[start:-1]]
            meta["input_token_logprobs"] = [
                [None, ids[start], None],
                *([row[i].item(), i, None] for row, i in zip(rows, ids[start + 1 :], strict=True)),
            ]
            tops = [zip(*map(torch.Tensor.tolist, row.topk(top)), strict=True) for row in rows]
            meta["input_top_logprobs"] = [None, *([[value, i, None] for value, i in pairs] for pairs in tops)]
            meta["input_token_ids_logprobs"] = [None, *([[row[i].item(), i, None] for i in given] for row in rows)]
        self._send(200, {"text": "", "output_ids": [7, 3, 9], "meta_info": meta})


@contextlib.contextmanager
def sglang_server() -> Iterator[str]:
    """Its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
