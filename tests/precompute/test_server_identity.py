"""Whose scores a server's are: compared before any is stored, apart where nothing can show it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from mrpo.data.config import VerifyConfig
from mrpo.data.rendering import Renderer
from mrpo.data.store import ReferenceRecord
from mrpo.errors import UserError
from mrpo.evaluation.config import DoctorConfig
from mrpo.evaluation.doctor.doctor import diagnose
from mrpo.precompute import preflight
from mrpo.precompute.engines import server
from mrpo.precompute.preflight import SERVER, UNVERIFIED, spread
from mrpo.precompute.reference_run import ReferenceRun
from mrpo.precompute.run import precompute
from mrpo.precompute.verify import verify
from mrpo.tests.precompute.test_server_engine import FakeServer
from mrpo.tests.precompute.workspace import Workspace, rows


class ModelServer(FakeServer):
    """A server of a model folder, in a precision, its weights rounded to fp8 on request."""

    def __init__(self, folder: Path, dtype: str = "float32", fp8: bool = False) -> None:
        super().__init__(without={"/openapi.json", "/version"})
        self.folder = str(folder)
        self.model = load(folder, dtype, fp8)

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/models":
            return {"data": [{"id": "any-name", "root": self.folder}]}
        if path == "/tokenize":
            encode = Renderer.load(self.folder).tokenizer.encode
            return {"tokens": encode(body["prompt"], add_special_tokens=False)}
        return self.every_row(body)

    @torch.inference_mode()
    def every_row(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = torch.tensor([body["prompt"]])
        logps = self.model(ids).logits[0, :-1].float().log_softmax(-1)
        logps = logps.gather(1, ids[0, 1:, None])[:, 0].tolist()
        rows = [{str(token): {"logprob": logp}} for token, logp in zip(body["prompt"][1:], logps)]
        return {"choices": [{"prompt_logprobs": [None, *rows]}]}


@cache
def load(folder: Path, dtype: str, fp8: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    for name, weight in model.named_parameters() if fp8 else ():
        if weight.ndim == 2 and "embed" not in name:
            scale = weight.float().abs().max() / 448
            rounded = (weight.float() / scale).to(torch.float8_e4m3fn).float() * scale
            weight.data = rounded.to(weight.dtype)
    return model


@pytest.fixture
def serve(tiny_references: dict[str, Path]) -> Iterator[Callable[..., str]]:
    """Starts a server of the tiny Llama; returns its URL."""
    servers: list[FakeServer] = []

    def start(**options: Any) -> str:
        servers.append(ModelServer(tiny_references["llama"], **options))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].url

    yield start
    for running in servers:
        running.shutdown()
        running.server_close()


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReferenceRun, "run", lambda run, devices, logs: run.run_here())
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)


def score(workspace: Workspace, url: str) -> ReferenceRecord:
    config = workspace.config(refs="llama", engine="server", server=url)
    (record,) = precompute(config).records
    return record


def num_rows(workspace: Workspace) -> int:
    store = workspace.store
    return sum(store.scores(identity).num_rows() for identity in store.identities())


def test_a_server_that_agrees_with_the_weights_and_then_with_the_store_is_verified(
    workspace: Workspace, serve: Callable[..., str]
) -> None:
    workspace.prepare(rows(20))
    first = score(workspace, serve())
    assert SERVER not in first.inputs
    assert first.runs[-1]["verified"] == "engine hf"
    workspace.prepare(rows(24))
    second = score(workspace, serve())
    assert second.identity == first.identity
    assert second.runs[-1]["verified"] == "stored scores"
    assert len(workspace.by_id("llama")) == 48


def test_a_server_of_quantized_weights_is_refused_before_anything_is_stored(
    workspace: Workspace, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.prepare(rows(20))
    url = serve(fp8=True)
    with pytest.raises(UserError, match=r"nats per square root of a token off engine hf, .*serve"):
        score(workspace, url)
    assert num_rows(workspace) == 0
    precompute(workspace.config(refs="llama"))  # with engine hf
    workspace.prepare(rows(24))
    monkeypatch.setattr(preflight, "_weights_here", lambda model, revision: False)
    with pytest.raises(UserError, match="off stored scores"):
        score(workspace, url)
    assert num_rows(workspace) == 40


@pytest.mark.parametrize(
    ("served", "agrees"),
    [
        ({"dtype": "bfloat16"}, True),
        ({"dtype": "float32"}, False),
        ({"dtype": "float16"}, False),
        ({"dtype": "bfloat16", "fp8": True}, False),
    ],
    ids=str,
)
def test_another_precision_than_bfloat16_is_seen(
    workspace: Workspace, serve: Callable[..., str], served: dict[str, Any], agrees: bool
) -> None:
    """By the error of a server and that of engine hf, both against float32."""
    entries = yaml.safe_load(workspace.refs_config.read_text())
    entries["llama"]["dtype"] = "bfloat16"
    workspace.refs_config.write_text(yaml.safe_dump(entries))
    workspace.prepare(rows(20))
    if agrees:
        assert score(workspace, serve(**served)).runs[-1]["verified"] == "engine hf"
    else:
        with pytest.raises(UserError, match="where bfloat16 is"):
            score(workspace, serve(**served))
        assert num_rows(workspace) == 0


def test_what_nothing_can_verify_is_kept_apart_and_doctor_says_so(
    workspace: Workspace,
    serve: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(preflight, "_weights_here", lambda model, revision: False)
    pairs = workspace.prepare(rows(24))
    url = serve()
    record = score(workspace, url)
    assert record.inputs[SERVER] == UNVERIFIED == "unverified server"
    assert "kept apart as those of an unverified server" in capsys.readouterr().err
    assert workspace.scores("llama").num_rows() == 0  # the reference's own
    assert num_rows(workspace) == 48

    # A second server is held to the first, and the same one is asked nothing twice.
    workspace.prepare(rows(26))
    with pytest.raises(UserError, match="off stored scores"):
        score(workspace, serve(fp8=True))
    assert score(workspace, url).identity == record.identity
    assert num_rows(workspace) == 52

    settings = {"pairs": str(pairs.path), "store": workspace.store.root}
    settings["refs_config"] = str(workspace.refs_config)
    diagnosis = diagnose(DoctorConfig(refs="llama", **settings))
    assert "unverified" in [finding.code for finding in diagnosis.findings["llama"]]
    probed = diagnose(DoctorConfig(refs="llama", probe=4, **settings))
    assert probed.probes[0].agree == 8
    assert "unverified" not in [finding.code for finding in probed.findings["llama"]]
    assert verify(VerifyConfig(rescore=6, **settings)).exit_code == 0

    # Scores of servers that earlier versions took on trust verify no other server.
    trusted = workspace.store.record(
        ReferenceRecord(
            alias="llama",
            entry=record.entry,
            inputs={key: value for key, value in record.inputs.items() if key != SERVER},
            runs=({"engine": "server", "pairs_folder": str(pairs.path)},),
        )
    )
    again = workspace.store.scores(record.identity).read()
    workspace.store.scores(trusted.identity).add(again.slice(0, 20))
    assert score(workspace, url).identity == record.identity


def test_the_spread_is_of_responses_of_any_length() -> None:
    """Differences of 1 nat over 4 tokens and of 3 over 9: sqrt((0.25 + 1) / 2) over both."""

    def table(chosen: float, rejected: float, tokens: int = 4) -> pa.Table:
        ids = pa.array([b"a" * 16, b"b" * 16], pa.binary(16))
        return pa.table({"response_id": ids, "logp": [chosen, rejected], "tokens": [tokens, 9]})

    assert spread(table(-10, -20), table(-11, -17)) == pytest.approx(0.625**0.5)
    assert spread(table(-10, -20), table(-10, -20, tokens=5)) == float("inf")
