"""Push to and pull from the Hub: its protocol over loopback, the client is huggingface_hub itself.

The server keeps one data set's files and the commits that made them, and answers what the client
asks of a repository: its state, a folder's listing, a file, and a commit in two requests.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import HfFileSystem, constants

from mrpo.data.config import PullConfig, PushConfig
from mrpo.data.store import Store
from mrpo.data.store import files as store_files
from mrpo.data.store.commands import pull, push
from mrpo.errors import UserError

REPOSITORY = "datasets/org/name"
COMMIT = "c" * 40
TEAM = f"hf://{REPOSITORY}/team"


class Hub(ThreadingHTTPServer):
    """One data set on the Hub."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.files: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.tokens: set[str | None] = set()
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def listing(self, folder: str) -> list[dict[str, Any]] | None:
        """A folder's entries; None where there is none of that name."""
        inside = f"{folder}/" if folder else ""
        names = [name.removeprefix(inside) for name in self.files if name.startswith(inside)]
        entries = {}
        for name in names:
            first, _, rest = name.partition("/")
            path = inside + first
            entry: dict[str, Any] = {"type": "directory", "path": path, "oid": COMMIT, "size": 0}
            if not rest:
                data = self.files[path]
                entry |= {"type": "file", "oid": sha1(data).hexdigest(), "size": len(data)}
            entries[path] = entry
        return list(entries.values()) if names or not folder else None


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        listed = f"/api/{REPOSITORY}/tree/main"
        if path.startswith(listed):
            entries = self.server.listing(path.removeprefix(listed).strip("/"))
            if entries is None:
                return self.answer(404, b'{"error": "not found"}')
            return self.answer(200, json.dumps(entries).encode())
        if path in (f"/api/{REPOSITORY}", f"/api/{REPOSITORY}/revision/main"):
            state = {"id": "org/name", "sha": COMMIT, "siblings": []}
            return self.answer(200, json.dumps(state).encode())
        name = path.removeprefix(f"/{REPOSITORY}/resolve/main/")
        content = self.server.files.get(name)
        self.answer(404 if content is None else 200, content or b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers["Authorization"])
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith(f"/api/{REPOSITORY}/preupload/main"):
            asked = json.loads(body)["files"]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            content = {"files": [{"path": file["path"], **how} for file in asked]}
            return self.answer(200, json.dumps(content).encode())
        assert self.path.startswith(f"/api/{REPOSITORY}/commit/main"), self.path
        lines = [json.loads(line) for line in body.splitlines()]
        added = [line["value"] for line in lines if line["key"] == "file"]
        self.server.files |= {file["path"]: base64.b64decode(file["content"]) for file in added}
        self.server.commits.append([file["path"] for file in added])
        url = f"{self.server.endpoint}/{REPOSITORY}/commit/{COMMIT}"
        self.answer(200, json.dumps({"commitUrl": url, "commitOid": COMMIT}).encode())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that the client is sent to; the tests' offline mode is lifted for it."""
    server = Hub()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    HfFileSystem.clear_instance_cache()
    yield server
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def filled(folder: Path, make: Any) -> tuple[Store, str]:
    """A store of five files of scores under one identity."""
    store = Store(folder)
    identity = store.record(make.record()).identity
    for seed in range(5):
        store.scores(identity).add(make.scores(make.ids(5, seed=seed)))
    return store, identity


def test_what_was_pushed_is_pulled_again_to_the_byte(hub: Hub, make: Any, tmp_path: Path) -> None:
    store, identity = filled(tmp_path / "store", make)
    assert push(PushConfig(target=TEAM, store=store.root)).exit_code == 0
    assert all(name.startswith(f"team/{identity}/") for name in hub.files)
    copy = Store(tmp_path / "copy")
    assert pull(PullConfig(source=TEAM, store=copy.root)).exit_code == 0
    assert copy.scores(identity).read().equals(store.scores(identity).read())
    assert copy.resolve("llama") == store.resolve("llama")


def test_many_files_go_into_few_commits_and_the_record_into_the_last(
    hub: Hub, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store, identity = filled(tmp_path / "store", make)
    monkeypatch.setattr(store_files, "COMMIT_FILES", 3)
    assert push(PushConfig(target=TEAM, store=store.root)).exit_code == 0
    assert [len(commit) for commit in hub.commits] == [3, 2, 1]
    assert hub.commits[-1] == [f"team/{identity}/reference.json"]


def test_a_second_push_sends_the_new_file_alone(hub: Hub, make: Any, tmp_path: Path) -> None:
    store, identity = filled(tmp_path / "store", make)
    push(PushConfig(target=TEAM, store=store.root))
    sent = len(hub.commits)
    new = store.scores(identity).add(make.scores(make.ids(5, seed=9)))
    push(PushConfig(target=TEAM, store=store.root))
    assert hub.commits[sent:] == [[f"team/{identity}/scores/{new}"]]


def test_the_token_goes_to_the_hub_and_into_no_file(
    hub: Hub, make: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store, _ = filled(tmp_path / "store", make)
    push(PushConfig(target=TEAM, store=store.root))
    pull(PullConfig(source=TEAM, store=str(tmp_path / "copy")))
    assert hub.tokens == {"Bearer hf_secret"}
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 2 * len(hub.files)
    assert not any(b"hf_secret" in data for data in (*kept, *hub.files.values()))
    assert "hf_secret" not in "".join(capfd.readouterr())


def test_a_folder_that_holds_no_store_is_said_to(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hf://datasets/org/name/team"):
        pull(PullConfig(source=TEAM, store=str(tmp_path / "store")))
