"""One request to a judge's endpoint, and the kinds of its failure."""

import contextlib
import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

_MOST_BYTES = 1 << 20


class JudgeError(Exception):
    """The judge gave no verdict. retry_after: seconds the endpoint asks to wait before the next attempt."""

    retry_after: float = 0.0


class JudgeMisconfigured(JudgeError):
    """The settings name no judge, or hold something unknown."""


class JudgeTimeout(JudgeError):
    """No whole answer came in time."""


class JudgeUnreachable(JudgeError):
    """No connection, or one that ended before the answer did."""


class JudgeRateLimited(JudgeError):
    """HTTP 429."""


class JudgeServerError(JudgeError):
    """HTTP 5xx."""


class JudgeRefused(JudgeError):
    """Any other status but 200, such as a wrong key or model: asking again would not help."""


class JudgeBadAnswer(JudgeError):
    """The answer is no chat completion, or its text is no verdict."""


def chat(url: str, key: str | None, payload: Mapping[str, Any], seconds: float) -> str:
    """The text of the answer to one POST of `payload` to `url`/chat/completions.

    seconds: for the whole answer once its headers are there, and for each wait before; redirects are not followed.
    Raises a JudgeError of the kind that fits, whose text never holds the key.
    """
    import requests  # as late as here: most workers never ask a judge
    from urllib3.exceptions import HTTPError, ReadTimeoutError

    def bearer(request: requests.PreparedRequest) -> requests.PreparedRequest:
        # As an auth function, not a header: requests would put a password of ~/.netrc in a header's place.
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    host, end = urlsplit(url).hostname, time.monotonic() + seconds
    late = f"the judge at {host} gave no whole answer within {seconds:.3g} s"
    try:
        with (
            requests.Session() as session,
            session.post(
                f"{url.rstrip('/')}/chat/completions",
                json=dict(payload),
                auth=bearer,
                timeout=seconds,
                stream=True,
                allow_redirects=False,
            ) as response,
        ):
            body = bytearray()
            # As it comes, not by whole blocks: an answer that drips in must not pass the time limit.
            while part := response.raw.read1(_MOST_BYTES, decode_content=True):
                body += part
                if time.monotonic() > end:
                    raise JudgeTimeout(late)
                if len(body) > _MOST_BYTES:
                    raise JudgeBadAnswer(f"the judge at {host} sent more than {_MOST_BYTES} bytes")
            status, wanted_wait = response.status_code, response.headers.get("Retry-After")
    except (requests.RequestException, HTTPError) as e:
        if isinstance(e, requests.Timeout | ReadTimeoutError):
            raise JudgeTimeout(late) from None
        raise JudgeUnreachable(f"the judge at {host} cannot be reached or broke off ({type(e).__name__})") from None
    if status != 200:
        kind = JudgeRateLimited if status == 429 else JudgeServerError if status >= 500 else JudgeRefused
        said = body.decode(errors="replace")  # some endpoints repeat a wrong key
        said = " ".join((said.replace(key, "***") if key else said).split())[:200]
        error = kind(f"the judge at {host} answered HTTP {status}: {said}")
        error.retry_after = _seconds(wanted_wait)
        raise error
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise JudgeBadAnswer(f"the judge at {host} sent no chat completion")
    return text


def _seconds(retry_after: str | None) -> float:
    """A Retry-After header, in seconds or as a date; 0 for none or one that cannot be read."""
    for read in (float, lambda text: (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()):
        with contextlib.suppress(ValueError, TypeError):
            return max(0.0, read(retry_after or ""))
    return 0.0
