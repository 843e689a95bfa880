"""Engine server: prompt log-probs over HTTP from a vLLM server that is already running.

`/v1/completions` takes token ids and gives every row's `prompt_logprobs`; it never reads the prefix
cache for them. Started with `--enable-scale-out` on the V2 model runner (a GPU's default), a
server also scores given ids on the responses' rows alone, at `/inference/v1/generate`; there the
prompt is computed once for all its responses. Scores whose rows came from the cache are missing
from the answer and requested again. Each prompt has a cache salt of its own, so that no other
traffic decides what it finds cached. A server that serves another model or tokenizer than refs.yaml
names is refused.
"""

from __future__ import annotations

import base64
import io
import os
import secrets
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import tenacity

from ...errors import UserError
from .protocol import EngineSettings, Logps, Progress
from .requests import Request, all_logps, disagreement, plan_requests, trial_prompt

if TYPE_CHECKING:
    from ...data.rendering import RenderedPrompt

BLOCK = 8  # every block size of vLLM is a multiple of it; the server does not report its own
ATTEMPTS = 8
FIRST_WAIT = 0.5  # seconds before the second attempt, doubled before each further one
TIMEOUT = 600.0  # seconds for an answer, its time in the server's queue included
CLAMPED = -9999.0  # JSON has no infinity: the server writes this for it
ABSENT = {404, 405, 501}
RETRIED = {408, 425, 429, 500, 502, 503, 504}
SHARING, PLAIN = "/inference/v1/generate", "/v1/completions"


class NoSuchPath(UserError):
    """A path that a server does not have, or does not show."""


class ServerEngine:
    """A reference behind a vLLM server's URL. `$VLLM_API_KEY` is sent where it is set.

    Raises `UserError` where the server stays away, refuses a request, or serves another model.
    """

    def __init__(self, settings: EngineSettings) -> None:
        assert settings.server is not None
        self._settings = settings
        self._url = settings.server.rstrip("/").removesuffix("/v1")
        key = os.environ.get("VLLM_API_KEY")
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=TIMEOUT,
            follow_redirects=False,  # which would send texts, and maybe the key, elsewhere
            limits=httpx.Limits(max_connections=None),
        )
        self._served = self._find_model()
        # One token less than the server takes: it wants room for an answer.
        longest = self._served["max_model_len"]
        self.limit: int | None = None if longest is None else int(longest) - 1
        self._check_tokenizer()
        self._version = (self._optional("/version") or {}).get("version")
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
        self, prompts: Sequence[RenderedPrompt], progress: Progress = lambda responses: None
    ) -> list[tuple[Logps, ...]]:
        plans: dict[int, list[Request]] = {}
        for request in plan_requests(prompts, BLOCK):
            plans.setdefault(request.prompt, []).append(request)
        scored: dict[int, tuple[Logps, ...]] = {}
        pool = ThreadPoolExecutor(self._settings.concurrency)
        try:
            under_way = {
                pool.submit(self._score, prompts[index], plan): index
                for index, plan in plans.items()
            }
            for future in as_completed(under_way):
                scored[under_way[future]] = future.result()
                progress(len(future.result()))
        finally:
            pool.shutdown(cancel_futures=True)
        return [scored[index] for index in range(len(prompts))]

    def close(self) -> None:
        self._client.close()

    def _score(self, prompt: RenderedPrompt, plan: Sequence[Request]) -> tuple[Logps, ...]:
        """One prompt, each response after those whose blocks it shares."""
        salt = secrets.token_hex(16)
        return all_logps(prompt, {one.response: self._logps(one, salt) for one in plan})

    def _logps(self, request: Request, salt: str) -> Logps:
        if self._route == SHARING:
            logps = self._given_ids(request, salt)
            if logps is None:
                assert request.read_cache, "the server left out rows that no cache held"
                logps = self._given_ids(replace(request, read_cache=False), salt)
            assert logps is not None
            return logps
        return self._every_row(request, salt)

    def _every_row(self, request: Request, salt: str) -> Logps:
        """The log-probs by the plain route."""
        body = {"prompt": request.token_ids, "max_tokens": 1, "prompt_logprobs": 0}
        rows = self._call(PLAIN, self._addressed(body, salt))["choices"][0]["prompt_logprobs"]
        assert len(rows) == len(request.token_ids)
        scored = zip(rows[request.first :], request.token_ids[request.first :])
        logps = np.array([row[str(token)]["logprob"] for row, token in scored], dtype=np.float32)
        logps[logps <= CLAMPED] = -np.inf
        return logps

    def _given_ids(self, request: Request, salt: str) -> Logps | None:
        """The log-probs by the sharing route; None where the cache left out one of their rows."""
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
        """Whether the sharing route gives what the plain one does, cached rows included."""
        if SHARING not in (self._optional("/openapi.json") or {}).get("paths", {}):
            return False
        salt = secrets.token_hex(16)
        try:
            for request in plan_requests([trial_prompt(self.limit)], BLOCK):
                shared = self._given_ids(request, salt)
                if shared is None:
                    shared = self._given_ids(replace(request, read_cache=False), salt)
                if shared is None:
                    return False
                plain = self._every_row(request, secrets.token_hex(16))
                if (why := disagreement(shared, plain, self._settings.dtype)) is not None:
                    print(f"{SHARING} of {self._url} is not used: {why}", file=sys.stderr)
                    return False
        except UserError:
            return False
        return True

    def _optional(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """As `_call`; None where the server does not have that path."""
        try:
            return self._call(path, body)
        except NoSuchPath:
            return None

    def _find_model(self) -> dict[str, Any]:
        """The served model or adapter that refs.yaml names."""
        models = self._call("/v1/models")["data"]
        named = self._settings.adapter or self._settings.model
        for model in models:
            if any(_same(str(model.get(key)), named) for key in ("id", "root")):
                base = next((m for m in models if m["id"] == model.get("parent")), model)
                return {**model, "max_model_len": base.get("max_model_len")}
        served = ", ".join(f"{model['id']} ({model.get('root')})" for model in models)
        raise UserError(
            f"reference {self._settings.alias}: {self._url} serves {served}, not {named}; start "
            "the server with that model, or correct --server or refs.yaml"
        )

    def _check_tokenizer(self) -> None:
        for text, token_ids in self._settings.probes.items():
            body = {"model": self._served["id"], "prompt": text, "add_special_tokens": False}
            answer = self._optional("/tokenize", body)
            if answer is not None and answer["tokens"] != token_ids:
                raise UserError(
                    f"reference {self._settings.alias}: {self._url} tokenizes {text[:20]!r} unlike "
                    f"{self._settings.model}; start the server with that model's own tokenizer"
                )

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a GET, or to a POST of `body`; tries again with growing pauses."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(httpx.HTTPError),
            wait=tenacity.wait_exponential(FIRST_WAIT),
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            before_sleep=lambda state: _report_retry(path, state),
            reraise=True,
        )
        try:
            return retrying(self._call_once, path, body)
        except httpx.HTTPError as error:
            raise UserError(
                f"{self._url}{path} failed {ATTEMPTS} times, last with: {_one_line(error)}; is the "
                "server up?"
            ) from None

    def _call_once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        method = "GET" if body is None else "POST"
        try:
            answer = self._client.request(method, self._url + path, json=body)
        except httpx.InvalidURL as error:
            raise UserError(f"--server {self._url}: not a URL ({error})") from None
        reason = f"{answer.status_code} {answer.text[:300]}"
        if answer.status_code in RETRIED:
            raise httpx.HTTPStatusError(reason, request=answer.request, response=answer)
        if not answer.is_success:
            absent = answer.status_code in ABSENT
            raise (NoSuchPath if absent else UserError)(
                f"{self._url}{path} answers {' '.join(reason.split())}"
            )
        try:
            content = answer.json()
        except ValueError:
            raise httpx.DecodingError(f"no JSON: {answer.text[:300]}") from None
        assert isinstance(content, dict), content
        return content


def _report_retry(path: str, state: tenacity.RetryCallState) -> None:
    assert state.outcome is not None
    reason = _one_line(state.outcome.exception())
    print(f"{path}: {reason}; again in {state.upcoming_sleep:g} s", file=sys.stderr, flush=True)


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _same(served: str, named: str) -> bool:
    """Whether two names mean the same model: equal, or paths to the same folder."""
    folders = Path(served).is_dir() and Path(named).is_dir()
    return served == named or (folders and Path(served).samefile(named))
