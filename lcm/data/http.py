"""A shard behind http(s):// or s3://, read in order; a connection that breaks or stalls is reopened at the same byte.

s3:// addresses become http(s):// ones that are signed with the credentials of this machine. `aws s3 cp` writes the
beginning of a shard twice if the connection breaks.
"""

import base64
import functools
import http.client
import importlib
import io
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from lcm.errors import first_line
from lcm.secrets import redact

logger = logging.getLogger(__name__)

TIMEOUT = 60  # seconds without a byte, after which the connection is reopened
WAITS = (1, 2, 4, 8, 16)  # seconds before each retry; a received byte resets the count
SIGNED_SECONDS = 7 * 24 * 3600  # the most that stores allow
TEMPORARY = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses after which a retry may succeed


@functools.cache
def s3_client() -> Any:
    """The client of an S3-compatible store, as AWS_ENDPOINT_URL and the other settings of boto3 have it. Without
    credentials, which are looked for once, its addresses are those of public buckets."""
    session = importlib.import_module("boto3").Session()
    unsigned = importlib.import_module("botocore").UNSIGNED
    public = importlib.import_module("botocore.config").Config(signature_version=unsigned)
    return session.client("s3", config=None if session.get_credentials() else public)


def http_address(url: str) -> str:
    """`url`, or for s3://BUCKET/KEY an http(s):// address that is readable for SIGNED_SECONDS. Raises OSError."""
    if not url.startswith("s3://"):
        return url
    bucket, _, key = url.removeprefix("s3://").partition("/")
    try:
        place = {"Bucket": bucket, "Key": key}
        address: str = s3_client().generate_presigned_url("get_object", place, SIGNED_SECONDS)
    except Exception as error:  # botocore has its own kinds
        raise OSError(first_line(error)) from None
    return address


def split_login(url: str) -> tuple[str, str | None]:
    """(`url` without user and password, the `Authorization` header made of them, or None without a user).

    Raises OSError if `url` is malformed.
    """
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # its message may contain the password
        raise OSError("the address is malformed") from None
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, None
    name, _, password = login.partition(":")
    plain = f"{urllib.parse.unquote(name)}:{urllib.parse.unquote(password)}"
    return parts._replace(netloc=host).geturl(), f"Basic {base64.b64encode(plain.encode()).decode()}"


class HttpFile(io.RawIOBase):
    """The body of `url`, http(s):// or s3://, as a stream of bytes.

    Reading raises OSError after the last retry, or at once for a permanent status such as 404. A try ends after
    `timeout` seconds without a byte, but at most TIMEOUT.
    """

    def __init__(self, url: str, timeout: float = TIMEOUT):
        self.url, self.login = split_login(http_address(url))
        self.timeout = min(timeout, TIMEOUT)
        self.offset, self.tries = 0, 0
        self.length: int | None = None
        self.response: Any = None

    def readable(self) -> bool:
        return True

    def open_at_offset(self) -> None:
        """Request the body from `offset` on. A server without ranges sends all of it; its start is discarded."""
        request = urllib.request.Request(self.url, headers={"User-Agent": "lcm-distill"})
        if self.login:
            request.add_unredirected_header("Authorization", self.login)  # not sent to another host after a redirect
        if self.offset:
            request.add_header("Range", f"bytes={self.offset}-")
        response = urllib.request.urlopen(request, timeout=self.timeout)
        try:
            start = self.offset if response.status == 206 else 0
            if response.length is not None:
                length = start + response.length
                if self.length not in (None, length):
                    raise OSError(f"the file changed while it was read: {self.length} bytes, then {length}")
                self.length = length
            while start < self.offset:
                discarded = len(response.read(min(1 << 20, self.offset - start)))
                if not discarded:
                    raise http.client.IncompleteRead(b"")
                start += discarded
        except BaseException:
            response.close()
            raise
        self.response = response

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                if self.response is None:
                    self.open_at_offset()
                count = self.response.readinto(buffer)
                if count == 0 and self.length is not None and self.offset < self.length:
                    raise http.client.IncompleteRead(b"", self.length - self.offset)
            except (OSError, http.client.HTTPException) as error:
                self.close_response()
                is_permanent = isinstance(error, urllib.error.HTTPError) and error.code not in TEMPORARY
                if is_permanent or self.tries == len(WAITS):
                    raise OSError(f"{type(error).__name__}: {error}") from None
                time.sleep(WAITS[self.tries])
                self.tries += 1
            else:
                if self.tries and count:
                    logger.info("%s: resumed at byte %d", redact(self.url), self.offset)
                    self.tries = 0
                self.offset += count
                return count

    def close_response(self) -> None:
        if self.response is not None:
            self.response.close()
            self.response = None

    def close(self) -> None:
        self.close_response()
        super().close()
