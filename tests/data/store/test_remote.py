"""A store on object storage: the S3 protocol over loopback, with the faults that networks have.

A real S3 server (moto) stands behind a proxy that answers 503, stalls, or cuts the connection in
the middle of a request or an answer; the client is s3fs, as users have it. memory:// runs the same
scenario through fsspec alone.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import numpy as np
import pytest

from mrpo.data.config import GcConfig, PullConfig, PushConfig, VerifyConfig
from mrpo.data.store import Store
from mrpo.data.store.commands import gc, pull, push, verify_digests
from mrpo.errors import UserError

SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"
)
TIMEOUT = 1.0  # seconds a client of these tests waits for an answer


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on, but for those that `plan` spoils: its next fault for that method."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        self.port = port
        self.plan: list[tuple[str, str]] = []  # (method, fault)
        self.outage = False
        Thread(target=self.serve_forever, daemon=True).start()

    def next_fault(self, method: str) -> str:
        if self.outage:
            return "503"
        if self.plan and self.plan[0][0] == method:
            return self.plan.pop(0)[1]
        return ""


class Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def handle_any(self) -> None:
        fault = self.server.next_fault(self.command)
        length = int(self.headers.get("Content-Length", 0))
        if fault == "cut request":
            self.rfile.read(length // 2)
            return self.cut()
        body = self.rfile.read(length)
        if fault == "stall":
            time.sleep(TIMEOUT + 0.5)
            return self.cut()
        status, headers, answer = 503, [("Content-Type", "application/xml")], SLOW_DOWN
        if fault != "503":
            upstream = http.client.HTTPConnection("127.0.0.1", self.server.port)
            upstream.request(self.command, self.path, body, dict(self.headers))
            response = upstream.getresponse()
            status, headers, answer = response.status, response.getheaders(), response.read()
        if fault == "lost answer":
            return self.cut()
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        size = next((v for n, v in headers if n.lower() == "content-length"), str(len(answer)))
        self.send_header("Content-Length", size)
        self.end_headers()
        if fault == "cut answer":
            self.wfile.write(answer[: len(answer) // 2])
            return self.cut()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def cut(self) -> None:
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(server)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    config = {"read_timeout": TIMEOUT, "connect_timeout": TIMEOUT, "retries": {"max_attempts": 2}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": config})
    system = fsspec.get_filesystem_class("s3")
    monkeypatch.setattr(system, "retries", 2)  # less patience than users have: 5
    system.clear_instance_cache()
    yield proxy
    proxy.shutdown()
    proxy.server_close()
    system.clear_instance_cache()


@pytest.fixture
def s3(proxy: FaultyProxy, request: pytest.FixtureRequest) -> str:
    """The URL of an empty store in a bucket of its own."""
    bucket = f"bucket-{abs(hash(request.node.name)):x}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}/team/store"


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    fsspec.filesystem("memory").store.clear()
    return "memory://team/store"


def test_a_remote_store_does_what_a_local_one_does(url: str, make: Any) -> None:
    store = Store(url)
    assert store.references() == []
    record = store.record(make.record())
    assert store.resolve(f"llama@{record.identity[:8]}") == record
    scores, ids = store.scores(record.identity), make.ids(30)
    bad, good = scores.add(make.scores(ids[:10])), scores.add(make.scores(ids[10:20]))
    assert (scores.missing(ids) == (np.arange(30) >= 20)).all()
    assert (scores.num_rows(), len(scores.response_ids()), scores.read().num_rows) == (20, 20, 20)
    with scores.lease("a" * 32) as held:
        assert held
    path = f"{url.split('://')[1]}/{record.identity}/scores/{bad}"
    system = fsspec.url_to_fs(url)[0]
    system.pipe_file(path, system.cat_file(path)[:-1])
    assert verify_digests(VerifyConfig(store=url)) == 1
    assert scores.check() == [bad]
    assert scores.names() == [good]
    assert scores.set_aside() == [f"{bad}.bad"]
    assert verify_digests(VerifyConfig(store=url)) == 0
    assert scores.missing(ids).sum() == 20
    gc(GcConfig(store=url, delete=True))
    assert (scores.set_aside(), scores.names()) == ([], [good])


@pytest.mark.parametrize("fault", ["503", "stall", "cut request", "lost answer"])
def test_a_write_outlives_a_fault(s3: str, proxy: FaultyProxy, make: Any, fault: str) -> None:
    scores = Store(s3).scores(make.record().identity)
    proxy.plan = [("PUT", fault)]
    table = make.scores(make.ids(500))
    name = scores.add(table)
    assert proxy.plan == []
    assert scores.names() == [name]
    assert scores.damaged() == []
    assert scores.read().num_rows == 500


@pytest.mark.parametrize("fault", ["503", "stall", "lost answer", "cut answer"])
def test_a_read_outlives_a_fault(s3: str, proxy: FaultyProxy, make: Any, fault: str) -> None:
    store = Store(s3)
    record = store.record(make.record())
    scores, ids = store.scores(record.identity), make.ids(500)
    scores.add(make.scores(ids))
    for _ in range(2):
        proxy.plan = [("GET", fault)]
        assert store.references() == [record]  # the fault meets the listing, then a file
        assert proxy.plan == []
    names = scores.names()
    proxy.plan = [("GET", fault)]
    assert len(scores.read_file(names[0])) == scores.num_bytes()
    assert proxy.plan == []
    assert not scores.missing(ids).any()


def test_an_outage_ends_the_write_and_leaves_nothing_half_written(
    s3: str, proxy: FaultyProxy, make: Any
) -> None:
    scores = Store(s3).scores(make.record().identity)
    first = scores.add(make.scores(make.ids(50)))
    proxy.outage = True
    with pytest.raises(OSError, match="reduce your request rate"):
        scores.add(make.scores(make.ids(50, seed=1)))
    with pytest.raises(OSError, match="reduce your request rate"):
        scores.check()  # no file is called damaged because the network is
    proxy.outage = False
    assert (scores.names(), scores.set_aside()) == ([first], [])
    scores.add(make.scores(make.ids(50, seed=1)))
    assert scores.damaged() == []
    assert scores.num_rows() == 100


def test_a_writer_that_is_cut_off_for_good_in_mid_write_leaves_all_or_nothing(
    s3: str, proxy: FaultyProxy, make: Any
) -> None:
    scores = Store(s3).scores(make.record().identity)
    proxy.plan = [("PUT", "cut request")] * 100
    with pytest.raises(Exception, match=r"(?i)connection"):
        scores.add(make.scores(make.ids(500)))
    proxy.plan = []
    assert scores.names() == []
    proxy.plan = [("PUT", "lost answer")] * 100  # written, but the writer can't know
    with pytest.raises(Exception, match=r"(?i)connection"):
        scores.add(make.scores(make.ids(500)))
    proxy.plan = []
    assert len(scores.names()) == 1
    assert scores.damaged() == []
    scores.add(make.scores(make.ids(500)))
    assert scores.num_rows() == 500


def test_push_and_pull_carry_every_row_and_the_second_time_none(
    url: str, tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    local = Store(tmp_path / "store")
    records = [local.record(make.record(alias, commit=alias * 40)) for alias in "ab"]
    for number, record in enumerate(records):
        for part in range(3):
            ids = make.ids(20, seed=part)
            local.scores(record.identity).add(make.scores(ids, first=-10.0 * number - 1))
    assert push(PushConfig(target=url, store=local.root, refs="a")).exit_code == 0
    assert [r.alias for r in Store(url).references()] == ["a"]
    assert push(PushConfig(target=url, store=local.root)).exit_code == 0
    assert "copied  3 files" in capsys.readouterr().out.splitlines()[-2]
    assert push(PushConfig(target=url, store=local.root)).exit_code == 0
    assert "copied  0 files, 0 bytes; 6 were there already" in capsys.readouterr().out
    assert pull(PullConfig(source=url, store=str(tmp_path / "other"))).exit_code == 0
    copy = Store(tmp_path / "other")
    assert copy.references() == local.references()
    for record in records:
        assert copy.scores(record.identity).read().equals(local.scores(record.identity).read())


def test_a_bucket_that_is_not_there_is_one_line(proxy: FaultyProxy, make: Any) -> None:
    store = Store("s3://no-such-bucket-here/store")
    assert store.references() == []
    with pytest.raises(UserError, match="create the bucket"):
        store.record(make.record())
