"""To the Hub, through huggingface_hub; what goes wrong there is one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from l2v.errors import UserError


def check_repo(repo: str) -> None:
    """Errors: UserError for what cannot be the name of a repository."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo}: no name for a repository of the hub: {str(error).splitlines()[0]}") from None


def offline() -> bool:
    """The user wants no network (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)


def licence_of(model: str) -> str | None:
    """What the hub says of a model's licence; None where it cannot be asked."""
    if offline():
        return None
    try:
        data = HfApi().model_info(model, timeout=10).card_data
    except Exception:  # no such model there, no network, no access: the name is asked next, then the user
        return None
    return data.get("license") if data else None


def with_user(repo: str) -> str:
    """The full name of a repository, which the card's code needs: a bare name is the user's own.

    Errors: UserError where the hub cannot be asked who the user is.
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
    """Make the repository if it is not there, upload the files in commits; the address of the page.

    kind: model or dataset. The token is the hub's own (HF_TOKEN, or what `hf auth login` keeps).
    Errors: UserError with one sentence; what has arrived stays there, and the same command goes on.
    """
    _need_token()
    api = HfApi()
    try:
        made = api.create_repo(repo, repo_type=kind, private=private or None, exist_ok=True)
        repo = made.repo_id
        if private and not api.repo_info(repo, repo_type=kind).private:
            raise UserError(f"{repo} is there already and is public; choose another name, or leave out --private")
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
        return f"the token may not write to {repo} (403): use one with the right to write there, or another name"
    if status == 404:
        return f"{host} knows no {repo}, or hides it from this token (404)"
    if status == 429:
        return f"{host} asks to slow down (429): wait some minutes, then give the same command again"
    if status is not None and status >= 500:
        return f"{host} failed ({status}): give the same command again later, it goes on with what is missing"
    if status is not None:
        return (
            f"{host} refused the upload ({status}): {_first(next(e for e in chain if isinstance(e, HfHubHTTPError)))}"
        )
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return "HF_HUB_OFFLINE is set, so nothing is sent; unset it to upload"
    if any(isinstance(e, ConnectionError) or type(e).__name__ in _NETWORK for e in chain):
        return f"{host} cannot be reached: check the network, then give the same command again"
    return f"the upload to {repo} failed: {type(error).__name__}: {_first(error)}"


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


def _first(error: Any) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _literal(name: str) -> str:
    """A file's name as a pattern of fnmatch that matches nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
