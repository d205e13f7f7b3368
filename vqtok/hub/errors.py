"""What goes wrong between here and the Hub, in words for people."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import httpx

# RuntimeError: the client wraps the failures of uploads in it.
HUB_ERRORS = (OSError, RuntimeError, httpx.HTTPError)
_REMEDIES = {
    "push": {
        401: "log in with `hf auth login`, or give a token that may write there",
        403: "log in with `hf auth login`, or give a token that may write there",
        404: "check the name, and whether your token may see it",
        412: "somebody else has pushed in the meantime: push again",
        429: "it wants fewer requests: wait a few minutes and push again",
        500: "push again, what has arrived is not sent twice",
    },
    "load": {
        401: "check the name, and whether it is private",
        403: "check the name, and whether it is private",
        404: "check the name, and whether it is private",
        429: "it wants fewer requests: wait a few minutes and load again",
        500: "load again, what has arrived is kept",
    },
}


def explain(error: BaseException, doing: str) -> str:
    """Why a request to the Hub failed and what to do, as the rest of a sentence.

    Args:
        error: one of `HUB_ERRORS`.
        doing: "push" or "load".
    """
    remedies = _REMEDIES[doing]
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "huggingface_hub is offline (HF_HUB_OFFLINE): go online"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision: check the name of the branch, the tag or the commit"
    if isinstance(error, HfHubHTTPError | httpx.HTTPStatusError):
        status = error.response.status_code
        said = (getattr(error, "server_message", None) or "").splitlines()
        remedy = remedies.get(min(status, 500))
        return f"the Hub answered {status}{f' ({said[0]})' if said else ''}" + (f", {remedy}" if remedy else "")
    if isinstance(error, httpx.HTTPError):
        return f"the connection broke ({type(error).__name__}), {remedies[500]}"
    cause = error.__cause__  # "not in the cache, and the Hub does not answer" says less than why it does not
    if isinstance(cause, HfHubHTTPError | httpx.HTTPError):
        return explain(cause, doing)
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
