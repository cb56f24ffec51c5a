"""Sends one request to a judge's endpoint, and names the kinds of failure."""

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
    """The judge gave no verdict.

    Attributes:
      retry_after: seconds that the endpoint asks to wait before the next attempt; 0 if it asks for none.
    """

    retry_after: float = 0.0


class JudgeMisconfigured(JudgeError):
    """The settings name no judge, or one of them is unknown or not valid."""


class JudgeTimeout(JudgeError):
    """The answer was not complete in time."""


class JudgeUnreachable(JudgeError):
    """The connection could not be made, or it broke before the answer was complete."""


class JudgeRateLimited(JudgeError):
    """The endpoint answered HTTP 429: too many requests."""


class JudgeServerError(JudgeError):
    """The endpoint answered HTTP 5xx."""


class JudgeRefused(JudgeError):
    """The endpoint answered a status that is neither 200 nor 429 nor 5xx, such as one for a wrong key or a redirect.

    Another attempt would not help.
    """


class JudgeBadAnswer(JudgeError):
    """The answer is no chat completion, is too long, or contains no verdict."""


def chat(url: str, key: str | None, payload: Mapping[str, Any], seconds: float) -> str:
    """Sends one POST to `url`/chat/completions and returns the text of the answer. Redirects are not followed.

    Args:
      url: the base URL, such as `https://host/v1`.
      key: the API key, sent as a bearer token; None or "" sends none.
      payload: the body of the request; sent as JSON.
      seconds: above 0; limit on the time to connect, on the wait for the headers, and on the time to the end of the
        answer. The last is checked only while the answer arrives, so one attempt may take longer than `seconds`.

    Returns:
      The text of the first choice's message; *** stands for the key where the endpoint repeats it.

    Raises:
      JudgeError: one of JudgeTimeout, JudgeUnreachable (also if `payload` has a NaN or an infinity), JudgeRateLimited,
        JudgeServerError, JudgeRefused, and JudgeBadAnswer for an answer that is no chat completion or has over 1 MiB.
        Its message never contains the key. Where the status is not 200, `retry_after` has the wait that the endpoint
        asks for.
      TypeError: if `payload` is not JSON-serialisable.
      ValueError: if the URL cannot be split, because its brackets or its host are not valid.
    """
    import requests  # imported here, because most workers never ask a judge
    from urllib3.exceptions import HTTPError, ReadTimeoutError

    def bearer(request: requests.PreparedRequest) -> requests.PreparedRequest:
        # An auth function, because requests replaces an Authorization header by a password from ~/.netrc.
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    host, end = urlsplit(url).hostname, time.monotonic() + seconds
    late = f"the judge at {host} did not complete its answer within {seconds:.3g} s"
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
            # Read whatever has arrived; reading whole blocks would let a slowly dripping answer exceed the time limit.
            while part := response.raw.read1(_MOST_BYTES, decode_content=True):
                body += part
                if time.monotonic() > end:
                    raise JudgeTimeout(late)
                if len(body) > _MOST_BYTES:
                    raise JudgeBadAnswer(f"the judge at {host} sent more than {_MOST_BYTES} bytes")
            status, wanted_wait = response.status_code, response.headers.get("Retry-After")
    except (requests.RequestException, HTTPError, ValueError, OSError) as e:  # their texts may contain the key
        if isinstance(e, requests.Timeout | ReadTimeoutError):
            raise JudgeTimeout(late) from None
        raise JudgeUnreachable(f"the judge at {host} cannot be reached or broke off ({type(e).__name__})") from None
    if status != 200:
        kind = JudgeRateLimited if status == 429 else JudgeServerError if status >= 500 else JudgeRefused
        said = body.decode(errors="replace")  # some endpoints repeat a wrong key in their answer
        said = " ".join(_without(key, said).split())[:200]
        error = kind(f"the judge at {host} answered HTTP {status}: {said}")
        error.retry_after = _seconds(wanted_wait)
        raise error
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise JudgeBadAnswer(f"the judge at {host} sent no chat completion")
    return _without(key, text)


def _without(key: str | None, text: str) -> str:
    """Returns a text of the endpoint without the key, also where JSON writes its slashes as `\\/`."""
    return text.replace(key, "***").replace(key.replace("/", "\\/"), "***") if key else text


def _seconds(retry_after: str | None) -> float:
    """Converts a Retry-After header, in seconds or a date, to seconds; 0 if it is absent or cannot be read."""
    for read in (float, lambda text: (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()):
        with contextlib.suppress(ValueError, TypeError):
            return max(0.0, read(retry_after or ""))
    return 0.0
