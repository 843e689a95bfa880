"""Engine server: a vLLM server that is already running, asked for prompt log-probs over HTTP.

`/v1/completions` takes token ids and gives every row's `prompt_logprobs`; it never reads the prefix
cache for them. Started with `--enable-scale-out` on the V2 model runner (a GPU's default), a
server also scores given ids on the responses' rows alone, at `/inference/v1/generate`; there the
prompt is computed once per pair, and scores whose rows the cache swallowed are left out and asked
for again. Each pair has a cache salt of its own: no other traffic decides what it finds cached.

Before anything is scored, the server must show that it serves the model named in refs.yaml, with
its tokenizer.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import secrets
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError
from .protocol import EngineSettings, Logps, PairTokenLogps, Progress
from .requests import CHOSEN, REJECTED, Request, plan_requests, scored_pair

if TYPE_CHECKING:
    from ...data.rendering import RenderedPair

BLOCK = 8  # every block size of vLLM is a multiple of it, and the server does not tell its own
ATTEMPTS = 8
FIRST_WAIT = 0.5  # seconds before the second attempt, doubled for each one after
TIMEOUT = 600.0  # seconds for one request, its time in the server's queue included
CLAMPED = -9999.0  # JSON has no infinity: the server writes this for it
RETRIED = {408, 425, 429, 500, 502, 503, 504}
SHARING, PLAIN = "/inference/v1/generate", "/v1/completions"


class ServerEngine:
    """A reference behind a vLLM server's URL. `$VLLM_API_KEY` is sent where it is set."""

    def __init__(self, settings: EngineSettings) -> None:
        assert settings.server is not None
        self._settings = settings
        self._url = settings.server.rstrip("/").removesuffix("/v1")
        self._served = self._find_model()
        self.limit: int | None = (
            int(self._served["max_model_len"]) - 1
        )  # it must have room for an answer
        self._check_tokenizer()
        self._version = self._call("/version").get("version")
        self._route = SHARING if settings.share_prompts and self._scores_given_ids() else PLAIN

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "engine": "server",
            "vllm": self._version,
            "route": self._route,
            "concurrency": self._settings.concurrency,
        }

    def score(
        self, pairs: Sequence[RenderedPair], progress: Progress = lambda pairs: None
    ) -> list[PairTokenLogps]:
        plans: dict[int, list[Request]] = {}
        for request in plan_requests(pairs, BLOCK):
            plans.setdefault(request.pair, []).append(request)
        scored: dict[int, PairTokenLogps] = {}
        pool = ThreadPoolExecutor(self._settings.concurrency)
        try:
            under_way = {
                pool.submit(self._score, pairs[index], plan): index for index, plan in plans.items()
            }
            for future in as_completed(under_way):
                scored[under_way[future]] = future.result()
                progress(1)
        finally:
            pool.shutdown(cancel_futures=True)
        return [scored[index] for index in range(len(pairs))]

    def close(self) -> None:
        return None

    def _score(self, pair: RenderedPair, plan: Sequence[Request]) -> PairTokenLogps:
        """One pair, the rejected response after the chosen one, whose blocks it shares."""
        salt = secrets.token_hex(16)
        parts = {request.branch: self._logps(request, salt) for request in plan}
        return scored_pair(pair, parts[CHOSEN], parts.get(REJECTED))

    def _logps(self, request: Request, salt: str) -> Logps:
        if self._route == SHARING:
            logps = self._given_ids(request, salt)
            if logps is None:
                assert request.read_cache, "the server left out rows that no cache held"
                logps = self._given_ids(replace(request, read_cache=False), salt)
            assert logps is not None
            return logps
        body = {"prompt": request.token_ids, "max_tokens": 1, "prompt_logprobs": 0}
        rows = self._call(PLAIN, self._addressed(body, salt))["choices"][0]["prompt_logprobs"]
        assert len(rows) == len(request.token_ids)
        wanted = zip(rows[request.first :], request.token_ids[request.first :])
        logps = np.array([row[str(token)]["logprob"] for row, token in wanted], dtype=np.float32)
        logps[logps <= CLAMPED] = -np.inf
        return logps

    def _given_ids(self, request: Request, salt: str) -> Logps | None:
        """The log-probs by the sharing route; None where the cache swallowed a row of them."""
        sampling = {
            "max_tokens": 1,
            "detokenize": False,
            "prompt_logprob_token_ids": [[token] for token in request.token_ids[request.first :]],
            "prompt_logprob_start": request.first - 1,
            "skip_reading_prefix_cache": not request.read_cache,
        }
        body = {"token_ids": request.token_ids, "sampling_params": sampling}
        scores = self._call(SHARING, self._addressed(body, salt))["prompt_token_id_logprobs"]
        if scores is None:
            return None
        logps = np.load(io.BytesIO(base64.b64decode(scores)), allow_pickle=False)
        assert logps.shape == (request.num_logps, 1), logps.shape
        return np.asarray(logps[:, 0], dtype=np.float32)

    def _addressed(self, body: dict[str, Any], salt: str) -> dict[str, Any]:
        return {**body, "model": self._served["id"], "cache_salt": salt}

    def _scores_given_ids(self) -> bool:
        """Whether the server has the sharing route and the runner that it needs."""
        if SHARING not in self._call("/openapi.json").get("paths", {}):
            return False
        with contextlib.suppress(UserError):
            trial = Request(0, CHOSEN, [1, 1], first=1, read_cache=False)
            return self._given_ids(trial, secrets.token_hex(16)) is not None
        return False

    def _find_model(self) -> dict[str, Any]:
        """The served model or adapter that refs.yaml names."""
        models = self._call("/v1/models")["data"]
        wanted = self._settings.adapter or self._settings.model
        for model in models:
            if any(_same(str(model.get(key)), wanted) for key in ("id", "root")):
                base = next((m for m in models if m["id"] == model.get("parent")), model)
                return {**model, "max_model_len": base["max_model_len"]}
        served = ", ".join(f"{model['id']} ({model.get('root')})" for model in models)
        raise UserError(
            f"reference {self._settings.alias}: {self._url} serves {served}, not {wanted}; start "
            "the server with that model, or correct --server or refs.yaml"
        )

    def _check_tokenizer(self) -> None:
        for text, token_ids in self._settings.probes.items():
            body = {"model": self._served["id"], "prompt": text, "add_special_tokens": False}
            if self._call("/tokenize", body)["tokens"] != token_ids:
                raise UserError(
                    f"reference {self._settings.alias}: {self._url} tokenizes {text[:20]!r} unlike "
                    f"{self._settings.model}; start the server with that model's own tokenizer"
                )

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a GET, or to a POST of `body`; tries again with growing pauses."""
        for attempt in range(ATTEMPTS):
            try:
                return self._call_once(path, body)
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.read()[:300].decode(errors='replace')}"
                if error.code not in RETRIED:
                    raise UserError(f"{self._url}{path} answers {reason}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(error) or type(error).__name__
            wait = FIRST_WAIT * 2**attempt
            if attempt < ATTEMPTS - 1:
                print(f"{path}: {reason}; again in {wait:g} s", file=sys.stderr, flush=True)
                time.sleep(wait)
        raise UserError(
            f"{self._url}{path} failed {ATTEMPTS} times, last with: {reason}; is the server up?"
        )

    def _call_once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            content = json.load(answer)
        assert isinstance(content, dict), content
        return content


def _same(served: str, wanted: str) -> bool:
    """Whether two names mean one model: equal, or paths to one folder."""
    folders = Path(served), Path(wanted)
    if all(folder.is_dir() for folder in folders):
        return folders[0].resolve() == folders[1].resolve()
    return served == wanted
