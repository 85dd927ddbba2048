"""Whether a repository is on the Hub, asked once: the libraries retry for half a minute and log every attempt."""

from __future__ import annotations

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id


def is_repository_name(name: str) -> bool:
    """Whether a name can be one of the Hub: `owner/name` or `name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def why_missing(repository: str, file: str, revision: str | None = None) -> str | None:
    """Why a file of a repository cannot be loaded, as part of a sentence; None if it can. At most one request."""
    if isinstance(try_to_load_from_cache(repository, file, revision=revision), str):
        return None
    if constants.HF_HUB_OFFLINE:
        return "it is not in the Hub's cache, and HF_HUB_OFFLINE forbids to ask"
    try:
        get_hf_file_metadata(hf_hub_url(repository, file, revision=revision))
    except GatedRepoError:
        return "the Hub asks for a login and for its terms to be accepted (hf auth login)"
    except RepositoryNotFoundError:
        return "the Hub has no such repository, or it is private (hf auth login)"
    except RevisionNotFoundError:
        return f"its repository on the Hub has no revision {revision}"
    except EntryNotFoundError:
        return f"its repository on the Hub has no {file}"
    except HfHubHTTPError as error:
        return f"the Hub answered {error.response.status_code}"
    except Exception as error:  # the HTTP library's: no route, no name server, a proxy, a timeout
        return f"the Hub cannot be reached ({type(error).__name__})"
    return None
