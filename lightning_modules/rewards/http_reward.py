"""A reward behind HTTP: for judges that want another environment, another machine, or are large."""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import urllib3
from jaxtyping import Float
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch import Tensor
from urllib3.exceptions import HTTPError, LocationParseError, NewConnectionError, TimeoutError
from urllib3.util import Timeout, parse_url

from lightning_modules.errors import ConfigError, UserError
from lightning_modules.rewards.base import RewardModel
from lightning_modules.rewards.preprocessing import eight_bit_levels

MAX_ANSWER = 1024 * 1024  # bytes
_BLOCK = 65536


class HttpReward(RewardModel):
    """Scores that a server gives: VLM judges, HPSv3, whatever answers a POST.

    Sent is ``{"images": ["<base64 of a PNG>", ...], "prompts": ["...", ...]}``, as many of either; wanted is
    ``{"scores": [0.5, ...]}``, one finite number per picture, in their order. Pictures are RGB of 8 bits, as a saved
    PNG has them. A server that is down, slow or busy (429, 5xx) is tried again, after twice as long each time.
    Neither proxies nor passwords of the environment are used.

    Args:
        url: where to post to.
        name: the word in metric names.
        version: what the server runs, in your words: it is kept with every result.
        batch_size: most pictures in a request.
        timeout: seconds in which a request must be answered.
        attempts: how often a request is made.
        backoff: seconds before the second attempt.

    Raises:
        ConfigError: settings without meaning.
        UserError: in ``score``: a server that does not answer, refuses, or answers something else.
    """

    def __init__(
        self,
        url: str,
        name: str = "http",
        version: str | None = None,
        batch_size: int = 8,
        timeout: float = 60.0,
        attempts: int = 5,
        backoff: float = 1.0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or attempts < 1 or not 0 < timeout < math.inf or not 0 <= backoff < math.inf:
            raise ConfigError(
                "HttpReward wants batch_size and attempts of at least 1, timeout above 0 and backoff of 0 or more, got "
                f"{batch_size}, {attempts}, {timeout} and {backoff}"
            )
        self.url, self.name, self.version = url, name, version
        self._place = _public(url)
        self._batch_size, self._timeout, self._attempts, self._backoff = batch_size, timeout, attempts, backoff

    def score(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        scores: list[float] = []
        with urllib3.PoolManager(retries=False) as pool:
            for start in range(0, len(prompts), self._batch_size):
                part = slice(start, start + self._batch_size)
                pictures = [base64.b64encode(data).decode() for data in as_png(images[part])]
                asked = {"images": pictures, "prompts": list(prompts[part])}
                scores += self._read(self._answer(pool, json.dumps(asked).encode()), len(pictures))
        return torch.tensor(scores)

    def described(self) -> dict[str, Any]:
        return {
            **super().described(),
            "version": self.version,
            "url": self._place,
            "preprocessing": {"family": "png", "rounded_to_8_bit": "first"},
        }

    def _answer(self, pool: urllib3.PoolManager, asked: bytes) -> bytes:
        """The body of the answer, of as many attempts as it takes."""
        for attempt in range(1, self._attempts + 1):
            try:
                status, body = self._post(pool, asked)
            except HTTPError as error:
                # In urllib3 a refused connection is a kind of time-out.
                if isinstance(error, TimeoutError) and not isinstance(error, NewConnectionError):
                    fault, remedy = f"gave no answer within {self._timeout:g} s", "raise timeout, or lower batch_size"
                else:
                    fault, remedy = f"cannot be reached ({_reason(error)})", "start the server, or correct the url"
            else:
                if status == 200:
                    return body
                fault, remedy = f"answered with status {status} ({_shown(body)})", "see what the server says of it"
                if status != 429 and status < 500:
                    raise self._failed(fault, "it has to take a POST of images and prompts at that url")
            if attempt < self._attempts:
                wait = self._backoff * 2 ** (attempt - 1)
                rank_zero_info(f"reward {self.name}: {self._place} {fault}; the next attempt is in {wait:g} s")
                time.sleep(wait)
        raise self._failed(f"{fault}, {self._attempts} times", remedy)

    def _post(self, pool: urllib3.PoolManager, asked: bytes) -> tuple[int, bytes]:
        """Status and body of one attempt.

        Raises:
            HTTPError: none came, or not in time.
        """
        until, body = time.monotonic() + self._timeout, b""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        response = pool.request(
            "POST", self.url, body=asked, headers=headers, timeout=Timeout(self._timeout), preload_content=False,
            redirect=False,
        )  # fmt: skip
        try:
            while block := response.read1(_BLOCK):
                body += block
                if len(body) > MAX_ANSWER:
                    raise self._failed(f"answers more than {MAX_ANSWER} bytes", "scores are a few bytes each")
                if time.monotonic() > until:
                    raise TimeoutError
        finally:
            response.close()
        return response.status, body

    def _read(self, body: bytes, count: int) -> list[float]:
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise self._failed(f"answered no JSON ({_shown(body)})", _WANTED) from None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise self._failed(f'answered without "scores" ({_shown(body)})', _WANTED)
        if len(scores) != count:
            raise self._failed(f"answered {len(scores)} scores for {count} pictures", _WANTED)
        wrong = [score for score in scores if not _is_finite(score)]
        if wrong:
            raise self._failed(f"gave the score {str(wrong[0])[:40]!r}", _WANTED)
        return list(map(float, scores))

    def _failed(self, fault: str, remedy: str) -> UserError:
        return UserError(f"reward {self.name}: {self._place} {fault}; {remedy}")


_WANTED = 'it has to answer {"scores": [one finite number per picture]}'


def as_png(images: Float[Tensor, "n 3 h w"]) -> list[bytes]:
    """Pictures in [0, 1] as files of 8 bits per colour."""
    levels = eight_bit_levels(images).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    found = []
    for picture in levels:
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "PNG", compress_level=1)
        found.append(out.getvalue())
    return found


def _public(url: str) -> str:
    """A URL for messages and results: keys that stand after its path are left out.

    Raises:
        ConfigError: no URL of HTTP, or one with a password, which would not be used.
    """
    try:
        parsed = parse_url(url)
    except LocationParseError:
        parsed = parse_url("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.auth:
        raise ConfigError(
            f"HttpReward: want a url such as http://127.0.0.1:8000/score, without a password, got {url!r}"
        )
    return f"{parsed.scheme}://{parsed.netloc}{parsed.path or ''}"


def _is_finite(score: object) -> bool:
    # A whole number may be too large for a float.
    return isinstance(score, int | float) and not isinstance(score, bool) and -1e38 < score < 1e38


def _reason(error: BaseException) -> str:
    return _shown(str(error).rpartition(": ")[2].encode())


def _shown(body: bytes) -> str:
    return " ".join(body.decode(errors="replace").split())[:100] or "nothing"
