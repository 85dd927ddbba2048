"""vLLM and Text Embeddings Inference over HTTP: their API around `engine_rules`, which reads an export as they do."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from support.engine_rules import Tei, Vllm


@contextmanager
def served(rules, owner="vllm", broken=None):
    """The URL of a server of `rules`, an engine of `engine_rules`.

    vLLM lists its model, and refuses a text that is too long with 400 unless it is asked to cut it; Text Embeddings Inference has
    no list, takes any model's name, and cuts (--auto-truncate). broken: a status that every request gets, or a number of vectors.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status, facts):
            body = json.dumps(facts).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            if isinstance(rules, Tei) or self.path != "/v1/models":
                return self.answer(404, {"error": "no such route"})
            self.answer(
                200, {"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": owner}]}
            )

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if broken and broken >= 400:
                return self.answer(broken, {"error": {"message": "as planned"}})
            if isinstance(rules, Vllm):
                if asked["model"] != "tiny":
                    return self.answer(404, {"error": {"message": f"the model {asked['model']} does not exist"}})
                rules.tokenizer.no_truncation()
                longest = max(len(rules.tokenizer.encode(text).ids) for text in asked["input"])
                if longest > rules.length and "truncate_prompt_tokens" not in asked:
                    return self.answer(400, {"error": {"message": f"{longest} tokens are too many"}})
            rows = rules.encode(asked["input"])[:broken].tolist()
            data = [{"object": "embedding", "index": at, "embedding": row} for at, row in enumerate(rows)]
            usage = {"prompt_tokens": 0, "total_tokens": 0}
            self.answer(200, {"object": "list", "model": "tiny", "data": data[::-1], "usage": usage})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
