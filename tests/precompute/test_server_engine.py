"""Engine server: its requests against a small HTTP server, its numbers against a real vLLM."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrpo.data.rendering import RenderedPair, Renderer
from mrpo.errors import UserError
from mrpo.precompute.engines import server
from mrpo.precompute.engines.protocol import EngineSettings, PairTokenLogps
from mrpo.precompute.engines.server import PLAIN, SHARING, ServerEngine
from mrpo.precompute.worker import PROBES

CLOSE = 1e-3  # nats, of a whole sequence


class FakeServer(ThreadingHTTPServer):
    """vLLM's answers; the log-prob of token t at position i is -(t + i / 1000).

    `shares`: it has the route for given ids; `omits`: there, scores are left out where the cache
    may be read; `wrong`: there, they are another row's. `without`: paths that it does not have.
    `code` and `text`: what it answers instead, to everything; `edit`: changes an answer with rows.
    """

    request_queue_size = 64

    def __init__(
        self,
        failures: int = 0,
        shares: bool = False,
        omits: bool = False,
        wrong: bool = False,
        without: Collection[str] = (),
        code: int | None = None,
        text: str = "",
        edit: Callable[[dict[str, Any]], Any] = lambda answer: answer,
    ) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.code, self.text, self.edit = code, text, edit
        self.failures = failures  # answers of 503 before the first good one
        self.shares, self.omits, self.wrong = shares, omits, wrong
        self.without = without
        self.tokens = [1, 2]  # the answer of /tokenize
        self.models: list[dict[str, Any]] = [
            {"id": "served", "root": "org/model", "max_model_len": 101, "parent": None},
            {"id": "mine", "root": "org/lora", "max_model_len": None, "parent": "served"},
        ]
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.elsewhere = "/elsewhere"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/models":
            return {"data": self.models}
        if path == "/openapi.json":
            return {"paths": {SHARING: {}} if self.shares else {}}
        if path == "/version":
            return {"version": "0.32.0"}
        if path == "/tokenize":
            return {"tokens": self.tokens}
        self.bodies.append(body)
        return self.given_ids(body) if path == SHARING else self.every_row(body)

    def every_row(self, body: dict[str, Any]) -> dict[str, Any]:
        rows: list[Any] = [None]
        for place, token in enumerate(body["prompt"][1:], 1):
            rows.append({"7777": {"logprob": -3}, str(token): {"logprob": logp(token, place)}})
        answer: dict[str, Any] = self.edit({"choices": [{"prompt_logprobs": rows}]})
        return answer

    def given_ids(self, body: dict[str, Any]) -> dict[str, Any]:
        sampling = body["sampling_params"]
        if self.omits and not sampling["skip_reading_prefix_cache"]:
            return {"prompt_token_id_logprobs": None}
        ids, start = sampling["prompt_logprob_token_ids"], sampling["prompt_logprob_start"]
        assert [token for (token,) in ids] == body["token_ids"][start + 1 :]
        scores = [[logp(token, start + 1 + row)] for row, (token,) in enumerate(ids)]
        if self.wrong:
            scores = scores[::-1]
        return {"prompt_token_id_logprobs": as_npy(np.array(scores, dtype=np.float32))}


def as_npy(array: np.ndarray) -> str:
    """An array as vLLM writes it into its answers."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def logp(token: int, place: int) -> float:
    return -(token + place / 1000)


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        self.server.keys.append(self.headers.get("Authorization"))
        self.server.failures -= 1
        code = 503 if self.server.failures >= 0 else 200
        code = 404 if self.path in self.server.without else code
        content = json.dumps(self.server.answer(self.path, body) if code == 200 else {}).encode()
        if self.server.code is not None:
            code, content = self.server.code, self.server.text.encode()
        self.send_response(code)
        if code == 307:
            self.send_header("Location", self.server.elsewhere)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        return None


Serve = Callable[..., FakeServer]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
    servers: list[FakeServer] = []

    def start(**options: Any) -> FakeServer:
        servers.append(FakeServer(**options))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for running in servers:
        running.shutdown()
        running.server_close()


def engine(url: str, model: str = "org/model", **settings: Any) -> ServerEngine:
    return ServerEngine(EngineSettings(alias="llama", model=model, server=url, **settings))


def fake_logps(sequence: Any) -> list[float]:
    places = range(sequence.start, len(sequence.token_ids))
    return [logp(sequence.token_ids[place], place) for place in places]


@pytest.mark.parametrize(
    "options", [{}, {"shares": True}, {"shares": True, "omits": True}], ids=str
)
def test_every_scored_token_has_the_log_prob_of_its_own_id_and_place(
    serve: Serve, make_pair: Any, options: dict[str, bool]
) -> None:
    fake = serve(**options)
    pairs = [make_pair(30, 3, 5, 8), make_pair(9, 0, 1, 1), make_pair(12, 8, 4, 4)]
    finished: list[int] = []
    running = engine(fake.url)
    assert running.facts["route"] == (SHARING if options else PLAIN)
    fake.bodies.clear()
    for pair, score in zip(pairs, running.score(pairs, finished.append)):
        assert score.chosen.tolist() == pytest.approx(fake_logps(pair.chosen))
        assert score.rejected.tolist() == pytest.approx(fake_logps(pair.rejected))
    assert sum(finished) == 3
    assert len({body["cache_salt"] for body in fake.bodies}) == 3
    assert {body["model"] for body in fake.bodies} == {"served"}


def test_a_response_reads_the_cache_only_where_no_block_can_hold_its_first_row(
    serve: Serve, make_pair: Any
) -> None:
    """The block size is unknown, but a multiple of 8: 16 common tokens may be a block."""
    fake = serve(shares=True)
    running = engine(fake.url)
    for common in (1, 2):
        fake.bodies.clear()
        running.score([make_pair(15, common, 5, 5)])
        _, rejected = fake.bodies
        assert rejected["sampling_params"]["skip_reading_prefix_cache"] is (common == 1)


def test_a_server_that_is_busy_is_asked_again(
    serve: Serve, make_pair: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = serve(failures=3)
    running = engine(fake.url + "/v1/")
    assert "503" in capsys.readouterr().err
    fake.failures = 2
    (score,) = running.score([make_pair(9, 0, 1, 1)])
    assert np.isfinite(score.chosen).all()


def test_a_server_that_stays_away_is_a_users_mistake(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "ATTEMPTS", 3)
    with pytest.raises(UserError, match="failed 3 times, last with: 503"):
        engine(serve(failures=99).url)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match=r"failed 3 times.*is the server up"):
            engine(f"http://127.0.0.1:{free.getsockname()[1]}")


def test_a_refused_request_or_a_redirect_is_one_line_at_once(serve: Serve) -> None:
    """No second attempt, and nothing is sent to where a redirect points."""
    for code, reason in ((401, "401 no key given"), (307, "307")):
        fake = serve(code=code, text="no key\ngiven")
        with pytest.raises(UserError, match=f"/v1/models answers {reason}") as raised:
            engine(fake.url)
        assert "\n" not in str(raised.value)
        assert len(fake.keys) == 1


def test_a_key_is_not_sent_to_where_another_server_points(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    other, fake = serve(), serve(code=307)
    fake.elsewhere = f"{other.url}/v1/models".replace("127.0.0.1", "localhost")
    with pytest.raises(UserError, match="/v1/models answers 307"):
        engine(fake.url)
    assert other.keys == []


def test_a_server_that_shows_nothing_but_its_api_works(serve: Serve, make_pair: Any) -> None:
    """No /openapi.json (`--disable-fastapi-docs`), no /version, no /tokenize."""
    fake = serve(shares=True, without={"/openapi.json", "/version", "/tokenize"})
    pair = make_pair(30, 3, 5, 8)
    running = engine(fake.url, probes={"hello": [1, 3]})
    assert running.facts["route"] == PLAIN
    (score,) = running.score([pair])
    assert score.chosen.tolist() == pytest.approx(fake_logps(pair.chosen))


def test_a_route_whose_trial_differs_is_not_used(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engine(serve(shares=True, wrong=True).url).facts["route"] == PLAIN
    printed = capsys.readouterr().err
    assert "is not used: on a trial pair it is 6 nats off plain prompt_logprobs" in printed


def test_pauses_double_and_an_answer_that_is_no_json_is_asked_for_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "ATTEMPTS", 4)
    with pytest.raises(UserError, match="failed 4 times, last with: no JSON object: <html>"):
        engine(serve(code=200, text="<html>").url)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[-2] for line in lines] == ["0.01", "0.02", "0.04"]


def test_another_model_or_tokenizer_is_refused(serve: Serve) -> None:
    fake = serve()
    with pytest.raises(UserError, match=r"serves served \(org/model\), mine .*, not org/other"):
        engine(fake.url, model="org/other")
    with pytest.raises(UserError, match="tokenizes 'hello' unlike org/model"):
        engine(fake.url, probes={"hello": [1, 3]})
    assert engine(fake.url, probes={"hello": [1, 2]}).limit == 100


def cut(answer: dict[str, Any]) -> dict[str, Any]:
    """The rows of a prompt without its beginning, as truncation leaves them."""
    return {"choices": [{"prompt_logprobs": [None, *answer["choices"][0]["prompt_logprobs"][2:]]}]}


def shifted(answer: dict[str, Any]) -> dict[str, Any]:
    """As many rows as tokens, each of its neighbour."""
    rows = answer["choices"][0]["prompt_logprobs"]
    return {"choices": [{"prompt_logprobs": [None, *rows[2:], rows[1]]}]}


def raised_by(nats: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Every number of an answer that much higher: logits, as `--logprobs-mode raw_logits` gives."""

    def edit(answer: dict[str, Any]) -> dict[str, Any]:
        for row in answer["choices"][0]["prompt_logprobs"][1:]:
            for value in row.values():
                value["logprob"] += nats
        return answer

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (cut, "has 23 rows for 24 tokens; name a vLLM server of this model"),
        (shifted, "lacks tokens that were sent; name"),
        (lambda answer: answer | {"model": "gpt"}, "is of another model, gpt; name"),
        (lambda answer: {"choices": [{"text": "an answer"}]}, "has no prompt_logprobs; name"),
        (lambda answer: {"choices": []}, "has no prompt_logprobs; name"),
        (lambda answer: {"error": "busy"}, "has no prompt_logprobs; name"),
        (raised_by(0.9), r"has probabilities that add up to 1\.02; logits, it seems; start the"),
        (raised_by(40), r"add up to [0-9.]*; logits, it seems"),
    ],
)
def test_an_answer_that_is_not_a_log_prob_for_each_token_is_refused_in_one_line(
    serve: Serve, make_pair: Any, edit: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        engine(serve(edit=edit).url).score([make_pair(20, 0, 4, 3)])
    assert str(caught.value).startswith("reference llama: an answer of http://127.0.0.1:")
    assert "\n" not in str(caught.value)


def test_logits_are_seen_where_a_server_gives_no_likeliest_tokens(
    serve: Serve, make_pair: Any
) -> None:
    def edit(answer: dict[str, Any]) -> dict[str, Any]:
        rows = answer["choices"][0]["prompt_logprobs"]
        return raised_by(40)(answer) if len(rows) == 24 else {}

    with pytest.raises(UserError, match=r"has a log-prob of [0-9.]*, above 0; logits, it seems"):
        engine(serve(edit=edit).url).score([make_pair(20, 0, 4, 3)])


def test_a_model_answers_under_any_of_its_names(serve: Serve, make_pair: Any) -> None:
    names = [{"id": name, "root": "org/model"} for name in ("first", "second")]
    fake = serve(edit=lambda answer: answer | {"model": "first"})
    fake.models = names
    (score,) = engine(fake.url, model="second").score([make_pair(9, 0, 1, 1)])
    assert np.isfinite(score.chosen).all()
    assert {body["model"] for body in fake.bodies} == {"second"}


def test_an_adapter_is_neither_its_model_nor_right_on_another_model(serve: Serve) -> None:
    fake = serve()
    fake.models[0]["root"] = "org/other"
    with pytest.raises(UserError, match="not org/lora; start the server with that model"):
        engine(fake.url, adapter="org/lora")
    fake.models[1]["id"] = "org/model"
    with pytest.raises(UserError, match="not org/model; start the server with that model"):
        engine(fake.url)


def test_an_adapter_is_found_among_the_served_models(serve: Serve, make_pair: Any) -> None:
    fake = serve()
    adapted = engine(fake.url, adapter="org/lora")
    adapted.score([make_pair(9, 0, 1, 1)])
    assert adapted.limit == 100
    assert {body["model"] for body in fake.bodies} == {"mine"}


def test_the_key_is_sent_and_the_clamped_infinity_is_one(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    fake = serve()
    running = engine(fake.url)
    assert set(fake.keys) == {"Bearer secret"}
    monkeypatch.setattr(running, "_call", lambda *_: {"choices": [{"prompt_logprobs": ROWS}]})
    request = server.Request(0, 0, [1, 2, 3], first=1, read_cache=False)
    assert running._logps(request, "salt").tolist() == [-1.5, -np.inf]


ROWS = [None, {"2": {"logprob": -1.5}}, {"3": {"logprob": -9999.0}}]


@pytest.fixture(scope="module")
def real_server(reference_folder: Path) -> Iterator[str]:
    """vLLM's OpenAI server on loopback, with the route that reads the prefix cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --block-size 32"
    process = subprocess.Popen(
        [*command, "--model", reference_folder, *options.split(), "--enable-scale-out"],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TORCH_COMPILE_DISABLE": "1",
        },
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.vllm
def test_vllm_writes_arrays_as_the_small_server_does() -> None:
    from vllm.utils.serial_utils import numpy2base64

    array = np.array([[-1.5], [-0.25]], dtype=np.float32)
    assert as_npy(array) == numpy2base64(array)


@pytest.mark.vllm
def test_a_real_server_gives_the_rows_of_transformers(
    real_server: str,
    reference_folder: Path,
    corner_pairs: list[RenderedPair],
    expected: list[PairTokenLogps],
    differ: Any,
) -> None:
    """It has the sharing route, but a CPU's runner does not score given ids: so it is not used."""
    tokenizer = Renderer.load(reference_folder).tokenizer
    probes = {text: tokenizer.encode(text, add_special_tokens=False) for text in PROBES}
    running = engine(real_server, str(reference_folder), probes=probes, concurrency=16)
    assert running.facts == {
        "engine": "server",
        "vllm": "0.32.0",
        "route": PLAIN,
        "concurrency": 16,
    }
    assert running.limit == 1023
    assert differ(running.score(corner_pairs[::2]), expected[::2]) < CLOSE


@pytest.mark.vllm
def test_a_real_server_of_another_model_is_refused(real_server: str) -> None:
    with pytest.raises(UserError, match=r"serves .*, not org/model; start the server with"):
        engine(real_server)
