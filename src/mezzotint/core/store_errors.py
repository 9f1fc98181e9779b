"""Errors of object stores: which of them pass, and one sentence on what to set.

Every library behind fsspec raises errors of its own. The status of the answer and the names of
the errors' classes tell them apart, so no library has to be imported.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

# What a scheme needs: the package that reads it, and what gives access.
SCHEMES = {
    "s3": (
        "mezzotint[s3]",
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and AWS_ENDPOINT_URL for a "
        "store that is not Amazon's",
    ),
    "gs": ("gcsfs", "GOOGLE_APPLICATION_CREDENTIALS to the file of a service account's key"),
    "hf": ("huggingface_hub", "HF_TOKEN to a token of huggingface.co/settings/tokens"),
    "az": ("adlfs", "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
    "https": ("aiohttp", "an address that needs no login"),
    "http": ("aiohttp", "an address that needs no login"),
    "file": ("", "the permissions of the file"),
    "memory": ("", ""),
}
# What is wrong with the machine of this process, not with the store.
LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)
NO_ACCESS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError",
    "TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "RefreshError",
    "DefaultCredentialsError", "GatedRepoError", "LocalTokenNotFoundError", "PermissionError",
}  # fmt: skip
# Codes of S3 that come with status 400, and with the others.
DENIED_CODES = {
    "AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch",
    "ExpiredTokenException", "TokenRefreshRequired", "RequestTimeTooSkewed", "AuthFailure",
}  # fmt: skip
PASSING_CODES = {"SlowDown", "RequestTimeout", "ServiceUnavailable", "InternalError", "Throttling"}
NOT_ANSWERING = {
    "ConnectionError", "TimeoutError", "FSTimeoutError", "HTTPClientError", "ClientConnectionError",
    "ClientPayloadError", "ServerTimeoutError", "TransportError", "ResponseStreamingError",
    "IncompleteReadError", "IncompleteRead", "ResponseParserError", "EndpointConnectionError",
    "Timeout", "ChunkedEncodingError", "OfflineModeIsEnabled",
}  # fmt: skip


class StoreError(ValueError):
    """An address cannot be used as it is: no access, no such bucket, no such file."""


class MissingFileError(StoreError):
    """There is no file at an address, or nothing below it."""


class StoreUnavailable(OSError):
    """A store did not answer, or answered with errors that pass, for longer than the patience."""


class PassingError(Exception):
    """An error that may be gone at the next attempt; its text is the reason."""


def scheme_of(address: str) -> str:
    """Return the scheme of an address by its main name; "file" for a path."""
    scheme = address.partition("://")[0].lower() if "://" in address else "file"
    return {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}.get(scheme, scheme)


def without_query(address: str) -> str:
    """Return an address without its query, which may hold a signature that nobody should see."""
    return address.partition("?")[0] if scheme_of(address) in ("http", "https") else address


def translate_error(error: Exception, address: str) -> Exception:
    """Return the error to raise for one of a library: a StoreError, PassingError or OSError."""
    if isinstance(error, StoreError | StoreUnavailable):
        return error
    if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
        return error
    shown, scheme = without_query(address), scheme_of(address)
    needed = SCHEMES[scheme][1] if scheme in SCHEMES else ""
    names, code, status = _names(error), _code(error), _status(error)
    reason = _reason(error)
    if is_missing_bucket(error):
        bucket = "/".join(shown.split("/")[:3])
        return StoreError(
            f"there is no bucket {bucket}; make it, or check the name and AWS_ENDPOINT_URL"
        )
    if code in PASSING_CODES or status in (408, 425, 429) or (status or 0) >= 500:
        return PassingError(reason)
    if "OfflineModeIsEnabled" in names:
        return StoreError(f"{shown} cannot be read while HF_HUB_OFFLINE is set; unset it")
    if names & NO_ACCESS or code in DENIED_CODES or status in (401, 403):
        return StoreError(f"{shown} may not be used ({reason}); set {needed}")
    if names & {"FileNotFoundError", "RepositoryNotFoundError", "EntryNotFoundError"} or (
        status in (404, 410)
    ):
        return MissingFileError(f"{shown} does not exist; check the address")
    if scheme == "file" and isinstance(error, OSError):
        return error
    if "FlexibleChecksumError" in names:
        return StoreError(
            f"{shown} does not match its checksum ({reason}); repeat the command, or, for a "
            "store that is not Amazon's, set AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
        )
    if names & NOT_ANSWERING:
        return PassingError(reason)
    return StoreError(f"{shown} cannot be used ({reason}); check the address, and set {needed}")


def is_missing_bucket(error: Exception) -> bool:
    """Return whether an error says that the bucket does not exist."""
    return _code(error) == "NoSuchBucket"


def unavailable(address: str, reason: str, seconds: float) -> StoreUnavailable:
    """Return the error of a store that could not be reached for a time."""
    scheme = scheme_of(address)
    advice = {
        "s3": "check the network and AWS_ENDPOINT_URL, and repeat the command",
        "hf": "check the network and HF_ENDPOINT, and repeat the command",
    }.get(scheme, "check the network and the address, and repeat the command")
    return StoreUnavailable(
        f"{without_query(address)} did not answer for {seconds:.0f} seconds ({reason}); {advice}"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _names(error: Exception) -> set[str]:
    """Return the names of an error's classes; of its causes' too where it is a plain OSError."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if type(error) in (OSError, Exception, RuntimeError):
        for cause in _causes(error):
            names |= {cls.__name__ for cls in type(cause).__mro__}
    return names


def _code(error: Exception) -> str:
    """Return the code of an answer of S3, e.g. "NoSuchBucket"."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _status(error: Exception) -> int | None:
    """Return the HTTP status of the answer that an error reports."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = getattr(response, "status_code", None) or getattr(cause, "status", None)
        if isinstance(found, int):
            return found
    return None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".") if lines else "no answer in time"
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
