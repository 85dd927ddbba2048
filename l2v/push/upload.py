"""Upload to the Hub through huggingface_hub; an error is one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from l2v.errors import UserError, first_line


def check_repo(repo: str) -> None:
    """Check the form of a repository name.

    Raises:
        UserError: if it is not a valid repository name.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo}: not a valid repository name: {first_line(error)}") from None


def offline() -> bool:
    """Whether the user switched the network off (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)


def licence_of(model: str) -> str | None:
    """A model's licence on the hub; None if the hub does not answer."""
    if offline():
        return None
    try:
        data = HfApi().model_info(model, timeout=10).card_data
    except Exception:  # no such model, no network, no access: the name decides next, then the user
        return None
    return data.get("license") if data else None


def with_user(repo: str) -> str:
    """The full name of a repository, which the card's code needs: a bare name gets the user's name.

    Raises:
        UserError: if the hub does not tell who the user is.
    """
    if "/" in repo:
        return repo
    _need_token()
    try:
        return f"{HfApi().whoami()['name']}/{repo}"
    except Exception as error:
        raise UserError(sentence(repo, error)) from None


def _need_token() -> None:
    if get_token() is None:
        raise UserError("no login for the hub: set HF_TOKEN, or run 'hf auth login' once")


def upload(folder: Path, files: list[str], repo: str, kind: str, private: bool) -> str:
    """Create the repository if it does not exist and upload the files in commits; returns the address of the page.

    kind: model or dataset. The token is the hub's own (HF_TOKEN, or the one of `hf auth login`).

    Raises:
        UserError: if the upload fails; uploaded files are kept, and the same command resumes.
    """
    _need_token()
    api = HfApi()
    try:
        made = api.create_repo(repo, repo_type=kind, private=private or None, exist_ok=True)
        repo = made.repo_id
        if private and not api.repo_info(repo, repo_type=kind).private:
            raise UserError(f"{repo} exists and is public; choose another name, or omit --private")
        api.upload_folder(
            repo_id=repo, repo_type=kind, folder_path=folder, allow_patterns=[_literal(file) for file in files],
            commit_message="Upload with l2v",
        )  # fmt: skip
    except UserError:
        raise
    except Exception as error:
        raise UserError(sentence(repo, error)) from None
    return str(made)


def sentence(repo: str, error: BaseException) -> str:
    """Why an upload failed, and what to do."""
    chain = list(_chain(error))
    status = next(
        (e.response.status_code for e in chain if isinstance(e, HfHubHTTPError) and e.response is not None), None
    )
    host = constants.ENDPOINT
    if status == 401:
        return f"{host} does not accept the token (401): set HF_TOKEN to a valid one, or run 'hf auth login' again"
    if status == 403:
        return f"the token may not write to {repo} (403): use a token with write access, or another name"
    if status == 404:
        return f"{repo} does not exist on {host}, or this token has no access (404)"
    if status == 429:
        return f"{host} limits the rate of requests (429): wait some minutes, then run the same command again"
    if status is not None and status >= 500:
        return f"{host} failed ({status}): run the same command again later; it uploads the missing files"
    if status is not None:
        return f"{host} refused the upload ({status}): {first_line(next(e for e in chain if isinstance(e, HfHubHTTPError)))}"
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return "HF_HUB_OFFLINE is set, so nothing is sent; unset it to upload"
    if any(isinstance(e, ConnectionError) or type(e).__name__ in _NETWORK for e in chain):
        return f"{host} cannot be reached: check the network, then run the same command again"
    return f"the upload to {repo} failed: {type(error).__name__}: {first_line(error)}"


_NETWORK = {
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "WriteTimeout",
    "ReadError",
    "WriteError",
    "RemoteProtocolError",
    "ProxyError",
}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _literal(name: str) -> str:
    """An fnmatch pattern that matches this file name only."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
