"""A shard behind http(s)://, read in order; where a connection breaks or stalls it is opened anew at the same byte."""

import base64
import http.client
import io
import logging
import time
import urllib.request

from lcm.secrets import redact

logger = logging.getLogger(__name__)

TIMEOUT = 60  # seconds without a byte, after which the connection is opened anew
WAITS = (1, 2, 4, 8, 16)  # seconds before each new try; a byte that arrives makes the count start anew
PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be better a moment later


def split_login(url):
    """(`url` without user and password, the header `Authorization` that stands for them, None if there are none).

    Raises OSError for what is no address.
    """
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # whose message may have the password in it
        raise OSError("the address is malformed") from None
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, None
    name, _, password = login.partition(":")
    plain = f"{urllib.parse.unquote(name)}:{urllib.parse.unquote(password)}"
    return parts._replace(netloc=host).geturl(), f"Basic {base64.b64encode(plain.encode()).decode()}"


class HttpFile(io.RawIOBase):
    """The body of `url` as a stream of bytes.

    Reading raises OSError once all tries are used up, or at once for a status that will not change, such as 404.
    `timeout` seconds without a byte, but at most TIMEOUT, end a try.
    """

    def __init__(self, url, timeout=TIMEOUT):
        self.url, self.login, self.timeout = *split_login(url), min(timeout, TIMEOUT)
        self.offset, self.length, self.tries, self.response = 0, None, 0, None

    def readable(self):
        return True

    def open_at_offset(self):
        """Ask for the body from `offset` on. A server without ranges sends all of it; what was read is passed over."""
        request = urllib.request.Request(self.url, headers={"User-Agent": "lcm-distill"})
        if self.login:
            request.add_unredirected_header("Authorization", self.login)  # not for a host that it is sent on to
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
                passed = len(response.read(min(1 << 20, self.offset - start)))
                if not passed:
                    raise http.client.IncompleteRead(b"")
                start += passed
        except BaseException:
            response.close()
            raise
        self.response = response

    def readinto(self, buffer):
        while True:
            try:
                if self.response is None:
                    self.open_at_offset()
                count = self.response.readinto(buffer)
                if count == 0 and self.length is not None and self.offset < self.length:
                    raise http.client.IncompleteRead(b"", self.length - self.offset)
            except (OSError, http.client.HTTPException) as error:
                self.close_response()
                lasting = isinstance(error, urllib.error.HTTPError) and error.code not in PASSING
                if lasting or self.tries == len(WAITS):
                    raise OSError(f"{type(error).__name__}: {error}") from None
                time.sleep(WAITS[self.tries])
                self.tries += 1
            else:
                if self.tries and count:
                    logger.info("%s: went on at byte %d", redact(self.url), self.offset)
                    self.tries = 0
                self.offset += count
                return count

    def close_response(self):
        if self.response is not None:
            self.response.close()
            self.response = None

    def close(self):
        self.close_response()
        super().close()
