"""Whether the Hugging Face hub answers, asked before a look-up, because its libraries try for half a minute in vain."""

import functools
import threading

PATIENCE = 4.0  # s


def away() -> str:
    """Why the hub cannot be asked; "" if it can.

    Returns:
      A clause such as "https://huggingface.co does not answer (ConnectError: …)", in at most `PATIENCE` seconds.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return _silence(constants.ENDPOINT)


@functools.cache
def _silence(endpoint: str) -> str:
    from huggingface_hub.utils import get_session

    reasons: list[str] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=PATIENCE)  # any status is an answer
        except Exception as e:  # the network can fail in any way
            reasons.append(said(e))
        else:
            reasons.append("")

    # A thread, because the look-up of a host's name obeys no timeout.
    asked = threading.Thread(target=ask, daemon=True)
    asked.start()
    asked.join(PATIENCE)
    reason = reasons[0] if reasons else f"nothing within {PATIENCE:.0f} s"
    return f"{endpoint} does not answer ({reason})" if reason else ""


def said(error: Exception) -> str:
    """The kind and the first line of an error of the hub's libraries."""
    return f"{type(error).__name__}: {' '.join((str(error).splitlines() or [''])[0].split())}"
