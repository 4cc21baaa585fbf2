"""What botocore's exceptions mean in our terms, and what an S3 server's answers do."""

from collections.abc import Mapping
from typing import Any

import botocore.exceptions as boto_errors

from ..errors import (
    AccessDenied,
    InvalidName,
    NotFound,
    StorageError,
    Unavailable,
)
from .deadline import DeadlineExceeded

FOREIGN = (boto_errors.ClientError, boto_errors.BotoCoreError, OSError)
"""What a request to the store may raise, and ``translate`` translates."""
STREAM_ERRORS = (
    boto_errors.IncompleteReadError,
    boto_errors.ReadTimeoutError,
    boto_errors.ResponseStreamingError,
)
"""An answer that began well was cut."""
EXPIRED = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidToken",
    "RequestExpired",
    "TokenRefreshRequired",
}
"""Credentials that were good once: new ones may be there already."""
NO_UPLOAD = {"InvalidPart", "InvalidPartOrder", "NoSuchUpload"}
"""What the server knows of a multipart upload is not what we know."""

_NOT_FOUND = {"404", "NoSuchKey", "NotFound"}
_TRANSIENT = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "TooManyRequestsException",
    "XAmzContentSHA256Mismatch",
}
_HINTS = {
    "NoSuchBucket": "create the bucket first",
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": "the bucket is in another region: add ?region=… to the store url",
    "AuthorizationHeaderMalformed": "the bucket is in another region: add ?region=… to the store url",
    "IllegalLocationConstraintException": "the bucket is in another region: add ?region=… to the store url",
    "NotImplemented": "this server does not support the request",
}
_MISCONFIGURED = (
    boto_errors.NoCredentialsError,
    boto_errors.PartialCredentialsError,
    boto_errors.ProfileNotFound,
    boto_errors.TokenRetrievalError,
    boto_errors.UnauthorizedSSOTokenError,
)
_MALFORMED = (boto_errors.ParamValidationError, boto_errors.InvalidEndpointConfigurationError)


def translate(error: BaseException, what: str) -> StorageError:
    """Say what happened to ``what``, and whether trying again helps."""
    if isinstance(error, boto_errors.ClientError):
        return _translate_answer(error, what)
    if isinstance(error, _MISCONFIGURED):
        return AccessDenied(
            f"{what}: {error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or an AWS profile."
        )
    if isinstance(error, _MALFORMED):
        return InvalidName(f"{what}: {error}")
    if isinstance(error, boto_errors.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return AccessDenied(
            f"{what}: {error}. For a certificate of your own, set AWS_CA_BUNDLE to its authority's file."
        )
    if _ran_out_of_time(error):
        return Unavailable(f"{what}: not done in the time that it was given: {_brief(error)}")
    if isinstance(error, OSError):
        return Unavailable(f"{what}: {error}")
    return Unavailable(f"{what}: {_brief(error)}")


def status_of(error: BaseException) -> int:
    """The status of an answer that is an error; 0 if there was no answer."""
    return int(_metadata(error).get("HTTPStatusCode", 0))


def code_of(error: BaseException) -> str:
    """The S3 code of an answer that is an error; empty if there was no answer."""
    if not isinstance(error, boto_errors.ClientError):
        return ""
    return str(error.response.get("Error", {}).get("Code", ""))


def headers_of(error: BaseException) -> Mapping[str, str]:
    """The headers of an answer that is an error, their names in small letters."""
    headers: Mapping[str, str] = _metadata(error).get("HTTPHeaders", {})
    return headers


def retry_after_s(error: BaseException) -> float | None:
    """For how long the server wants to be left alone. A date is as good as nothing: whose clock is right?"""
    try:
        return float(headers_of(error).get("retry-after", ""))
    except ValueError:
        return None


def _metadata(error: BaseException) -> Mapping[str, Any]:
    if not isinstance(error, boto_errors.ClientError):
        return {}
    metadata: Mapping[str, Any] = error.response.get("ResponseMetadata", {})
    return metadata


def _ran_out_of_time(error: BaseException) -> bool:
    """Whether somewhere below it a deadline had passed. Libraries wrap in several ways."""
    seen: list[BaseException] = []
    below: list[object] = [error]
    while below:
        one = below.pop()
        if isinstance(one, DeadlineExceeded):
            return True
        if isinstance(one, BaseException) and one not in seen:
            seen.append(one)
            below += [one.__cause__, one.__context__, *one.args, getattr(one, "kwargs", {}).get("error")]
    return False


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _translate_answer(error: boto_errors.ClientError, what: str) -> StorageError:
    status, code = status_of(error), code_of(error) or str(status_of(error))
    said = f"{what}: the store answered {status} {code}"
    if code in _NOT_FOUND:
        return NotFound(f"{what}: no such object")
    if code in _TRANSIENT or status == 429 or (status >= 500 and status != 501):
        return Unavailable(said)
    message = str(error.response.get("Error", {}).get("Message", "")).strip()
    hint = _HINTS.get(code) or (message if message != code else "")
    return AccessDenied(f"{said}{f': {hint}' if hint else ''}")
