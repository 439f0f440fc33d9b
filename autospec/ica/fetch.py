"""Downloading the NeuroMark 1.0 template: the only thing in autospec that uses the network, and only when asked to.

The template belongs to GIFT (https://github.com/trendscenter/gift) and is not shipped.  The address names one commit
of that repository and cannot change its content; the content must have the git blob id that this commit records.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from autospec.errors import UserError
from autospec.ica.template import NEUROMARK_GIT_BLOB, git_blob
from autospec.storage import written_whole

# The commit that added the file, unchanged since.
COMMIT = "b797202a57a927d28a04207baa3c06140dea152d"
PATH = "GroupICAT/icatb/icatb_templates/Neuromark_fMRI_1.0.nii"
URL = f"https://raw.githubusercontent.com/trendscenter/gift/{COMMIT}/{PATH}"
MOST_BYTES = 100_000_000
BY_HAND = "You can also copy the file by hand and give its path as the template."


def fetch_template(
    target: str | Path,
    url: str = URL,
    git_blob_id: str = NEUROMARK_GIT_BLOB,
    certificates: str | Path | None = None,
    timeout: float = 60.0,
) -> str:
    """Download the template and verify it.

    Parameters
    ----------
    target : path-like
        Where the file shall stand.  It appears whole and verified, or not at all; if the right file is there already,
        nothing is downloaded.
    url : str
        An https address.
    git_blob_id : str
        SHA-1 by which git names the content.
    certificates : path-like, optional
        PEM file of the authorities to trust instead of the system's.
    timeout : float
        Seconds without an answer after which to give up.

    Returns
    -------
    str
        One line that says what was done.

    Raises
    ------
    UserError
        If the address is not https, the server cannot be reached or proves no valid certificate, or the content is
        another.
    """
    target = Path(target)
    if target.is_file() and git_blob(target.read_bytes()) == git_blob_id:
        return f"{target} is there already, and verified."
    _require_https(url)
    data = _download(url, _context(certificates), timeout)
    found = git_blob(data)
    if found != git_blob_id:
        raise UserError(
            f"what {url} sent is not the template ({len(data)} bytes with git blob id {found}, expected "
            f"{git_blob_id}): nothing was written. {BY_HAND}"
        )
    try:
        with written_whole(target) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UserError(
            f"the template cannot be written to {target} ({error.strerror}): choose another path."
        ) from None
    return f"{target}: {len(data)} bytes from {urlsplit(url).hostname}, verified."


class _SecureRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirection to https only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _require_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, context: ssl.SSLContext, timeout: float) -> bytes:
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _SecureRedirects())
    try:
        with opener.open(urllib.request.Request(url, headers={"User-Agent": "autospec"}), timeout=timeout) as answer:
            data: bytes = answer.read(MOST_BYTES + 1)
            announced = answer.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} answered {error.code} {error.reason}: try again later. {BY_HAND}") from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(_why(url, error)) from None
    if len(data) > MOST_BYTES:
        raise UserError(f"{url} sends more than {MOST_BYTES} bytes, so it is not the template: check the address.")
    if announced and announced.isdigit() and int(announced) != len(data):
        raise UserError(f"the download from {url} broke off after {len(data)} of {announced} bytes: try again.")
    return data


def _why(url: str, error: Exception) -> str:
    """One sentence about a connection that failed."""
    host = urlsplit(url).hostname
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {host} cannot be verified ({cause.verify_message}), so nothing was downloaded: "
            f"behind a proxy, give your institution's authority as certificates. {BY_HAND}"
        )
    if isinstance(cause, ssl.SSLError):
        return f"no secure connection to {host} came about ({cause.reason or cause}). {BY_HAND}"
    if isinstance(cause, socket.gaierror):
        return f"{host} is unknown here: is this machine connected to the network? {BY_HAND}"
    if isinstance(cause, TimeoutError):
        return f"{host} did not answer in time: try again later. {BY_HAND}"
    if isinstance(cause, http.client.IncompleteRead):
        return f"the download from {url} broke off after {len(cause.partial)} bytes: try again. {BY_HAND}"
    return f"{host} cannot be reached ({cause}): is this machine connected to the network? {BY_HAND}"


def _require_https(url: str) -> None:
    if urlsplit(url).scheme != "https" or not urlsplit(url).hostname:
        raise UserError(f"{url} is no https address: the template is downloaded over verified connections only.")


def _context(certificates: str | Path | None) -> ssl.SSLContext:
    if certificates is None:
        return ssl.create_default_context()
    try:
        return ssl.create_default_context(cafile=str(certificates))
    except (OSError, ssl.SSLError):
        raise UserError(f"{certificates} holds no certificates that can be read: give a PEM file.") from None
