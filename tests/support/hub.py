"""A stand-in for the Hub on this machine: the routes by which a repository is made and a folder is uploaded."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".parquet", "tokenizer.json")


class Hub:
    """repos: files by name, of every repository. fail: {part of a path: status}, what the server refuses."""

    def __init__(self) -> None:
        self.repos, self.private, self.fail, self.tokens, self.objects, self.asked = {}, {}, {}, set(), {}, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                outer.answer(self, "POST")

            def do_PUT(self):
                outer.answer(self, "PUT")

            def do_GET(self):
                outer.answer(self, "GET")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler, method: str) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        path = handler.path.split("?")[0]
        self.asked.append(f"{method} {path}")
        status = next((status for part, status in self.fail.items() if part in path), None)
        reply = {"error": "nej"} if status else self.reply(method, path, body, handler)
        data = json.dumps(reply).encode()
        handler.send_response(status or (404 if reply is None else 200))
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def reply(self, method: str, path: str, body: bytes, handler):
        if path.startswith("/lfs/"):  # the storage's own address, signed: no token goes there
            oid = path.removeprefix("/lfs/")
            assert hashlib.sha256(body).hexdigest() == oid
            self.objects[oid] = body
            return {}
        self.tokens.add((handler.headers.get("Authorization"), path))
        if path == "/api/whoami-v2":
            return {"type": "user", "name": "mig"}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            kind = asked.get("type") or "model"
            name = f"{asked.get('organization') or 'mig'}/{asked['name']}"
            self.repos.setdefault((kind, name), {})
            self.private.setdefault((kind, name), asked.get("visibility") == "private" or bool(asked.get("private")))
            return {"url": f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{name}"}
        for (kind, name), files in self.repos.items():
            api = f"/api/{kind}s/{name}"
            if path == api:
                return {"id": name, "private": self.private[kind, name], "sha": "0" * 40, "siblings": [], "tags": []}
            if path == f"{api}/preupload/main":
                told = json.loads(body)["files"]
                modes = [(f["path"], "lfs" if f["path"].endswith(LARGE) else "regular") for f in told]
                return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]}
            if path.endswith(f"/{name}.git/info/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                return {
                    "transfer": "basic",
                    "objects": [o | {"actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}} for o in objects],
                }
            if path == f"{api}/commit/main":
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = self.objects[value["oid"]]
                prefix = "datasets/" if kind == "dataset" else ""
                return {
                    "success": True,
                    "commitOid": "1" * 40,
                    "commitUrl": f"{self.url}/{prefix}{name}/commit/{'1' * 40}",
                }
        return None
