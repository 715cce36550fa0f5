"""A real HTTP server on the loopback that speaks as much of the hub's language as downloads need."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

import published_toy as toy
from stableavatar.checkpoints import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECES = 20
LARGE = (".pt", ".pth", ".safetensors", ".bin", ".onnx")


class Hub(ThreadingHTTPServer):
    """Repositories as dictionaries of files; what was fetched is written down."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.damaged: set[str] = set()
        self.stated_sizes: dict[str, int] = {}
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()
        self.failing = False
        self.seconds = 0.0  # that every answer takes

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def reply(self, status: int, content: bytes, body: bool = True, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.send_slowly(content)

    def send_slowly(self, content: bytes) -> None:
        size = max(len(content) // PIECES, 1)
        for start in range(0, len(content), size):
            time.sleep(self.server.seconds / PIECES)
            self.wfile.write(content[start : start + size])

    def answer(self, body: bool) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        path = unquote(urlsplit(self.path).path).strip("/")
        if self.server.failing:
            return self.reply(503, b"{}", body)
        if path.startswith("api/models/"):
            owner, name, what, revision = [*path.split("/")[2:], "revision", "main"][:4]
        else:
            owner, name, what, revision = path.split("/")[:4]
        repo_id = f"{owner}/{name}"
        if repo_id in self.server.gated:
            return self.reply(403, b"{}", body, X_Error_Code="GatedRepo")
        if repo_id not in self.server.repositories:
            return self.reply(404, b"{}", body, X_Error_Code="RepoNotFound")
        if revision not in ("main", "v1", COMMIT):
            return self.reply(404, b"{}", body, X_Error_Code="RevisionNotFound")
        files = self.server.repositories[repo_id]
        if what == "revision":
            answer = {"id": repo_id, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            return self.reply(200, json.dumps(answer).encode(), body, Content_Type="application/json")
        if what == "tree":
            entries = [self.entry(file, content) for file, content in files.items()]
            return self.reply(200, json.dumps(entries).encode(), body, Content_Type="application/json")
        return self.send_file(path.split(f"/{revision}/", 1)[1], files, body)

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        size = self.server.stated_sizes.get(path, len(content))
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": size,
            "oid": hashlib.sha1(content).hexdigest(),
        }
        if path.endswith(LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 130}
        return entry

    def send_file(self, path: str, files: dict[str, bytes], body: bool) -> None:
        if path not in files:
            return self.reply(404, b"{}", body, X_Error_Code="EntryNotFound")
        content = files[path]
        etag = (hashlib.sha256 if path.endswith(LARGE) else hashlib.sha1)(content).hexdigest()
        if path in self.server.damaged:
            content = content[:-1] + b"!"
        if body:
            self.server.fetched.append(path)
        return self.reply(200, content, body, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)


def published_files() -> dict[str, bytes]:
    wanted = [
        f"{toy.BASE}/config.json",
        f"{toy.BASE}/diffusion_pytorch_model.safetensors",
        f"{toy.BASE}/Wan2.1_VAE.pth",
        f"{toy.BASE}/{toy.T5}",
        f"{toy.BASE}/{toy.CLIP}",
        f"{toy.BASE}/google/umt5-xxl/tokenizer.json",
        "StableAvatar-1.3B/transformer3d-square.pt",
        "StableAvatar-1.3B/transformer3d-rec-vec.pt",
        "wav2vec2-base-960h/config.json",
        "wav2vec2-base-960h/model.safetensors",
        "Kim_Vocal_2.onnx",
        "README.md",
        "assets/figure.png",
    ]
    return {path: f"the content of {path}".encode() for path in wanted}


@contextmanager
def hub_with_published() -> Iterator[Hub]:
    """A hub that has the published repository, with a few bytes a file."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.repositories[hub.PUBLISHED_REPOSITORY] = published_files()
    yield server
    server.shutdown()
    server.server_close()


@contextmanager
def hub_for(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """The only hub that this process asks, which has the published files; what comes of it lies in `cache`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with hub_with_published() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server
