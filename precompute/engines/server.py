"""Engine server: prompt log-probs over HTTP from a vLLM server that is already running.

`/v1/completions` takes token ids and gives every row's `prompt_logprobs`; it never reads the prefix
cache for them. Started with `--enable-scale-out` on the V2 model runner (a GPU's default), a
server also scores given ids on the responses' rows alone, at `/inference/v1/generate`; there the
prompt is computed once per pair. Scores whose rows came from the cache are missing from the answer
and requested again. Each pair has a cache salt of its own, so that no other traffic decides what
it finds cached. A server that serves another model or tokenizer than refs.yaml names is refused,
and so is an answer that is not one log-prob for each token that was sent.
"""

from __future__ import annotations

import base64
import io
import math
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import tenacity

from ...data.store.import_scores import ABOVE_ZERO
from ...errors import UserError
from ...files import fits
from .protocol import EngineSettings, Logps, PairTokenLogps, Progress
from .requests import Request, disagreement, plan_requests, scored_pair, trial_pair

if TYPE_CHECKING:
    from ...data.rendering import RenderedPair

BLOCK = 8  # every block size of vLLM is a multiple of it; the server does not report its own
ATTEMPTS = 8
FIRST_WAIT = 0.5  # seconds before the second attempt, doubled before each further one
TIMEOUT = 600.0  # seconds for an answer, its time in the server's queue included
TOP = 5  # log-probs of a row whose probabilities are added up
CLAMPED = -9999.0  # JSON has no infinity: the server writes this for it
ABSENT = {404, 405, 501}
RETRIED = {408, 425, 429, 500, 502, 503, 504}
LOGITS = "logits, it seems; start the server without --logprobs-mode"
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
        self._check_log_probs()
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
        self._client.close()

    def _score(self, pair: RenderedPair, plan: Sequence[Request]) -> PairTokenLogps:
        """One pair, the rejected response after the chosen one, whose blocks it shares."""
        salt = secrets.token_hex(16)
        parts = {request.branch: self._logps(request, salt) for request in plan}
        return scored_pair(pair, parts)

    def _logps(self, request: Request, salt: str) -> Logps:
        if self._route == PLAIN:
            return self._every_row(request, salt)
        logps = self._given_ids(request, salt)
        if logps is None and request.read_cache:
            logps = self._given_ids(replace(request, read_cache=False), salt)
        if logps is None:
            raise self._unfit(SHARING, "lacks rows that no cache held")
        return logps

    def _every_row(self, request: Request, salt: str) -> Logps:
        """The log-probs by the plain route."""
        rows = self._rows(request.token_ids, salt)
        scored = zip(rows[request.first :], request.token_ids[request.first :])
        try:
            values = [row[str(token)]["logprob"] for row, token in scored]
            logps = np.array(values, dtype=np.float32)
        except (KeyError, TypeError, ValueError):
            raise self._unfit(PLAIN, "lacks tokens that were sent") from None
        logps[logps <= CLAMPED] = -np.inf
        return self._checked(PLAIN, logps)

    def _rows(self, token_ids: Sequence[int], salt: str, top: int = 0) -> list[Any]:
        """For each token what the plain route says of it and of the `top` likeliest in its place.

        None for the first token.
        """
        body = {"prompt": token_ids, "max_tokens": 1, "prompt_logprobs": top}
        answer = self._answer(PLAIN, body, salt)
        if not fits(answer, {"choices": [{"prompt_logprobs": list}]}) or not answer["choices"]:
            raise self._unfit(PLAIN, "has no prompt_logprobs")
        rows: list[Any] = answer["choices"][0]["prompt_logprobs"]
        if len(rows) != len(token_ids):
            raise self._unfit(PLAIN, f"has {len(rows)} rows for {len(token_ids)} tokens")
        return rows

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
        scores = self._answer(SHARING, body, salt).get("prompt_token_id_logprobs")
        if scores is None:
            return None
        try:
            logps = np.load(io.BytesIO(base64.b64decode(scores)), allow_pickle=False)
        except (TypeError, ValueError, EOFError):
            raise self._unfit(SHARING, "holds no array") from None
        if logps.shape != (request.num_logps, 1):
            raise self._unfit(SHARING, f"has {logps.shape} log-probs for {request.num_logps}")
        return self._checked(SHARING, np.asarray(logps[:, 0], dtype=np.float32))

    def _checked(self, path: str, logps: Logps) -> Logps:
        if (logps > ABOVE_ZERO).any():
            raise self._unfit(path, f"has a log-prob of {logps.max():.3g}, above 0", LOGITS)
        return logps

    def _answer(self, path: str, body: dict[str, Any], salt: str) -> dict[str, Any]:
        """What the server's model says; vLLM answers under the first of the model's names."""
        answer = self._call(path, {**body, "model": self._served["id"], "cache_salt": salt})
        if (model := answer.get("model")) not in (None, *self._served["names"]):
            raise self._unfit(path, f"is of another model, {model}")
        return answer

    def _unfit(
        self, path: str, why: str, way_out: str = "name a vLLM server of this model"
    ) -> UserError:
        alias = self._settings.alias
        return UserError(f"reference {alias}: an answer of {self._url}{path} {why}; {way_out}")

    def _check_log_probs(self) -> None:
        """Refuse a server that gives logits: the probabilities of its rows add up to more than 1.

        Not every logit is above 0, so that single answers may look right.
        """
        try:
            rows = self._rows(trial_pair(self.limit).chosen.token_ids, secrets.token_hex(16), TOP)
            totals = [
                sum(math.exp(min(value["logprob"], 1.0)) for value in row.values())
                for row in rows[1:]
            ]
        except (UserError, AttributeError, KeyError, TypeError):
            return  # it may allow fewer than these; every answer is looked at by itself
        if max(totals) > 1 + TOP * ABOVE_ZERO:
            raise self._unfit(PLAIN, f"has probabilities that add up to {max(totals):.3g}", LOGITS)

    def _scores_given_ids(self) -> bool:
        """Whether the sharing route gives what the plain one does, cached rows included."""
        if SHARING not in (self._optional("/openapi.json") or {}).get("paths", {}):
            return False
        salt = secrets.token_hex(16)
        try:
            for request in plan_requests([trial_pair(self.limit)], BLOCK):
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
        content = self._call("/v1/models")
        models = content["data"] if fits(content, {"data": [{"id": str}]}) else []
        adapter, named = self._settings.adapter, self._settings.adapter or self._settings.model
        for model in models:
            base = next((m for m in models if m["id"] == model.get("parent")), None)
            if not _is(model, named) or (adapter is None and model.get("parent")):
                continue  # an adapter is not the model that it is of, whatever its name
            if adapter is not None and base is not None and not _is(base, self._settings.model):
                continue
            names = [m["id"] for m in models if m.get("root") == model.get("root")]
            longest = (base or model).get("max_model_len")
            return {**model, "names": names, "max_model_len": longest}
        served = ", ".join(f"{model['id']} ({model.get('root')})" for model in models)
        raise UserError(
            f"reference {self._settings.alias}: {self._url} serves {served}, not {named}; start "
            "the server with that model, or correct --server or refs.yaml"
        )

    def _check_tokenizer(self) -> None:
        for text, token_ids in self._settings.probes.items():
            body = {"model": self._served["id"], "prompt": text, "add_special_tokens": False}
            answer = self._optional("/tokenize", body)
            if answer is not None and answer.get("tokens") != token_ids:
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
            content = None
        if not isinstance(content, dict):
            raise httpx.DecodingError(f"no JSON object: {answer.text[:300]}")
        return content


def _report_retry(path: str, state: tenacity.RetryCallState) -> None:
    assert state.outcome is not None
    reason = _one_line(state.outcome.exception())
    print(f"{path}: {reason}; again in {state.upcoming_sleep:g} s", file=sys.stderr, flush=True)


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is(model: Mapping[str, Any], named: str) -> bool:
    """Whether a served model is the named one: by its id or root, or by a path to its folder."""
    for served in (str(model.get("id")), str(model.get("root"))):
        folders = Path(served).is_dir() and Path(named).is_dir()
        if served == named or (folders and Path(served).samefile(named)):
            return True
    return False
