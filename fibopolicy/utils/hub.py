"""Names of repositories on the Hugging Face Hub, and its errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from fibopolicy.errors import UserError, one_line

PREFIX = "hub:"


def parse_hub_name(name: str) -> tuple[str, str | None]:
    """Repository and revision of OWNER/NAME or OWNER/NAME@REVISION.

    Raises:
        UserError: it has another form.
    """
    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"hub:{name}: expected hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    return repository, revision or None


@contextmanager
def wrap_hub_errors(name: str) -> Iterator[None]:
    """Turn errors of a download from the repository `name` into one line."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except UserError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"hub:{name}: no such repository or revision, or you may not read it; log in with `hf"
            " auth login` if it needs a token"
        ) from error
    except Exception as error:  # of the HTTP library, which depends on the version
        raise UserError(
            f"hub:{name}: cannot be downloaded ({one_line(error)[:200]}); check the network, or set"
            " HF_ENDPOINT to a mirror"
        ) from error
