"""Obtains a base from the Hugging Face hub.

huggingface-hub says which commit and which digest a file has now. The bytes are fetched here,
because the library's downloads do not survive the end of the process, and these are large.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from modularbase.bases.catalogue import BaseEntry, HubSource
from modularbase.errors import InstallError, InstallFailure
from modularbase.storage.digest import sha256_of
from modularbase.storage.http_download import DownloadError, download
from modularbase.storage.progress import InstallProgress, ProgressCallback, Stage

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of the hub at one commit."""

    url: str
    commit: str
    sha256: str
    n_bytes: int


def find_on_hub(entry: BaseEntry, source: HubSource) -> HubFile:
    """Asks the hub (or $HF_ENDPOINT) which file it has now.

    Raises:
        InstallError: It cannot be reached, has no such file, or publishes no digest.
    """
    # Imported late: it takes a third of a second, and most runs install nothing.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    endpoint = os.environ.get("HF_ENDPOINT") or None

    def url_at(revision: str) -> str:
        return hf_hub_url(source.repo, source.filename, revision=revision, endpoint=endpoint)

    try:
        # The bases are public: no reason to send the user's token anywhere.
        found = get_hf_file_metadata(url_at(source.revision), token=False)
    except HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        kind: InstallFailure = "not_found" if code in (401, 403, 404) else "network"
        raise _failure(entry, f"the hub answered {code}: {error}", kind) from error
    except Exception as error:  # the HTTP client below, and its errors, vary between versions
        reason = f"the hub cannot be reached: {error or type(error).__name__}"
        raise _failure(entry, reason, "network") from error
    digest = (found.etag or "").removeprefix("sha256:")
    if not _SHA256.fullmatch(digest) or found.size is None or found.commit_hash is None:
        reason = f"the hub publishes no sha256 or size for the file (found {found.etag!r})"
        raise _failure(entry, reason, "digest")
    if entry.sha256 not in (None, digest):
        raise _failure(entry, f"the hub has sha256 {digest}, expected {entry.sha256}", "digest")
    return HubFile(url_at(found.commit_hash), found.commit_hash, digest, found.size)


def fetch_from_hub(
    entry: BaseEntry, file: HubFile, partial_folder: Path, progress: ProgressCallback
) -> Path:
    """Downloads a file of the hub, going on where an earlier attempt stopped, and verifies it.

    Raises:
        InstallError: The download failed (it can be resumed), or the digest is wrong.
    """
    partial_folder.mkdir(parents=True, exist_ok=True)
    # Named by content: what an older revision left is not continued with bytes of a newer one.
    partial = partial_folder / f"{file.sha256[:16]}.part"
    for other in partial_folder.iterdir():
        if other != partial:
            other.unlink()

    def report(stage: Stage, n_done: int) -> None:
        progress(InstallProgress(entry.name, stage, n_done, file.n_bytes))

    try:
        download(file.url, partial, file.n_bytes, lambda n: report("download", n))
    except DownloadError as error:
        kind: InstallFailure = "not_found" if error.status == 404 else "network"
        reason = f"{error}; what was downloaded is kept, installing again goes on from there"
        raise _failure(entry, reason, kind) from error
    found = sha256_of(partial, lambda n: report("verify", n))
    if found != file.sha256:
        partial.unlink()
        raise _failure(entry, f"the file has sha256 {found}, expected {file.sha256}", "digest")
    return partial


def _failure(entry: BaseEntry, reason: str, kind: InstallFailure) -> InstallError:
    return InstallError(reason, kind, name=entry.name, source=str(entry.source))
