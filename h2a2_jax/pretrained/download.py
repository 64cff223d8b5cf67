"""Download of one file over HTTP: whole or not at all, gone on with after a break, from the standard library alone.

While it lasts, the bytes are in `<file>.part`, and `<file>.part.json` holds the address and the validator (ETag or
Last-Modified) of what they are part of. A later call asks for the rest only (Range), and only if the file is still the
same one (If-Range); a server that ignores either sends the whole file, and the part begins anew.
"""

import contextlib
import http.client
import ipaddress
import json
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from h2a2_jax import __version__
from h2a2_jax.errors import InputError
from h2a2_jax.files import read_json, whole_file
from h2a2_jax.host import progress_interval

SILENCE_S = 30.0
"""Seconds without a byte after which a server counts as gone."""
MOST_BYTES = 2 << 30
"""Largest file that is downloaded; weights of detectors have some 60 MB."""

_ATTEMPTS = 5
_CHUNK = 1 << 18
_PARTIAL, _UNSATISFIABLE = 206, 416


class _RefusedError(Exception):
    """The server gives no file, for a reason in words."""


class _CutError(Exception):
    """The connection ended before the file did, for a reason in words; what came is kept."""


def download(address: str, path: Path, *, silence: float = SILENCE_S, most_bytes: int = MOST_BYTES) -> None:
    """Download a file; `path` is there when it is whole, and nothing is there otherwise but the part for next time.

    Progress is shown on standard error. A connection that ends early is resumed at once as long as bytes arrive.
    Proxies of the environment are used except for loopback addresses. No other process may download to the same path.

    Args:
        address: http:// or https://; redirects are followed, from https to https only.
        path: the file; its folder exists.
        silence: seconds without a byte after which the server counts as gone.
        most_bytes: largest size that is accepted.

    Raises:
        InputError: the file cannot be downloaded or written; one sentence, which says where to put it by hand.
    """
    part = path.with_name(f"{path.name}.part")
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise InputError(f"The address of the weights is {address!r}; expected is one of http:// or https://.")
    farthest, attempts = _size(part), 0
    try:
        while True:
            try:
                _fetch(address, part, silence, most_bytes)
                break
            except _CutError as error:
                attempts += 1
                if _size(part) <= farthest or attempts == _ATTEMPTS:
                    kept, _ = _resumable(part, address)
                    goes_on = f"; {kept:,} bytes are kept, and the same command goes on from there" if kept else ""
                    raise _RefusedError(f"{error}{goes_on}") from error
                farthest = _size(part)
        part.replace(path)
        _state_file(part).unlink(missing_ok=True)
    except _RefusedError as error:
        raise InputError(
            f"{address} cannot be downloaded ({error}): try again, or fetch the file in another way and put it at "
            f"{path} by hand."
        ) from error
    except OSError as error:
        _discard(part)
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): free space there, or name another folder with "
            f"H2A2_CACHE; the file is at {address}."
        ) from error


def _fetch(address: str, part: Path, silence: float, most_bytes: int) -> None:
    """Bring a part to its end by one request."""
    start, validator = _resumable(part, address)
    headers = {"User-Agent": f"h2a2_jax/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    with _answer(urllib.request.Request(address, headers=headers), silence) as answer:
        if start and (answer is None or (answer.status == _PARTIAL and not _goes_on(answer, start))):
            _discard(part)
            return _fetch(address, part, silence, most_bytes)  # without a part, no range is asked for
        if answer is None or (answer.status == _PARTIAL and not start):
            raise _RefusedError("the server answers with a part of the file that was not asked for")
        start = start if answer.status == _PARTIAL else 0
        length = answer.headers.get("Content-Length", "")
        total = start + int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
        if (total or 0) > most_bytes:
            raise _RefusedError(f"it has {total:,} bytes, more than the {most_bytes:,} that weights may have")
        if not start:
            _discard(part)
            _write_state(part, address, answer)
        with part.open("ab") as file:
            _copy(answer, file, part.name.removesuffix(".part"), start, total, silence, most_bytes)
    if total is not None and _size(part) < total:
        raise _CutError(f"the connection ended at byte {_size(part):,} of {total:,}")


def _copy(
    answer: http.client.HTTPResponse,
    file: IO[bytes],
    title: str,
    start: int,
    total: int | None,
    silence: float,
    most: int,
) -> None:
    """Append the body of an answer to a file."""
    done = start
    bar = tqdm(total=total, initial=start, desc=title, unit="B", unit_scale=True, mininterval=progress_interval())
    with bar:
        while True:
            try:
                chunk = answer.read1(_CHUNK)
            except (OSError, http.client.HTTPException) as error:
                file.flush()
                raise _CutError(_reason(error, silence)) from error
            if not chunk:
                return
            done += len(chunk)
            if done > most:
                _discard(Path(file.name))
                raise _RefusedError(f"it goes on after {most:,} bytes, more than weights may have")
            file.write(chunk)
            bar.update(len(chunk))


@contextlib.contextmanager
def _answer(request: urllib.request.Request, silence: float) -> Iterator[http.client.HTTPResponse | None]:
    """Open a request; None where the server has no such range. Errors of the network become `_RefusedError`."""
    try:
        answer = _opener().open(request, timeout=silence)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == _UNSATISFIABLE and request.has_header("Range"):
            yield None
            return
        raise _RefusedError(f"the server answers {error.code} {error.reason}".strip()) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _RefusedError(_reason(error, silence)) from error
    with answer:
        yield answer


def _goes_on(answer: http.client.HTTPResponse, start: int) -> bool:
    """Return True if a partial answer begins where the part ends."""
    found = re.match(r"bytes ([0-9]{1,18})-", answer.headers.get("Content-Range", ""))
    return found is not None and int(found[1]) == start


# --- the part and its state ------------------------------------------------------------------------------------------


def _state_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state_file(part).unlink(missing_ok=True)


def _write_state(part: Path, address: str, answer: http.client.HTTPResponse) -> None:
    """Store what tells whether the file is still the same one; a weak ETag does not."""
    tag = answer.headers.get("ETag", "")
    validator = answer.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
    with whole_file(_state_file(part)) as file:
        file.write_text(json.dumps({"address": address, "validator": validator}))


def _resumable(part: Path, address: str) -> tuple[int, str]:
    """Size and validator of a part of the file at an address; (0, "") if it must begin anew."""
    stored = read_json(_state_file(part))
    if not isinstance(stored, dict) or stored.get("address") != address:
        return 0, ""
    validator = stored.get("validator")
    if not isinstance(validator, str) or not re.fullmatch(r"[ -~]+", validator):
        return 0, ""
    return _size(part), validator


# --- the network -----------------------------------------------------------------------------------------------------


class _Proxies(urllib.request.ProxyHandler):
    """Proxies of the environment, except for loopback addresses, which no proxy reaches."""

    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:
        if _is_loopback(urlsplit(req.full_url).hostname or ""):
            return None
        return super().proxy_open(req, proxy, type)  # type: ignore[misc]


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects, which urllib keeps to the web, and which never lead from https to http here."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            fp.close()
            raise _RefusedError(f"it is redirected from https to {newurl}, which anybody on the way could change")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """An opener of http and https alone: the usual one also opens files and ftp."""
    opener = urllib.request.OpenerDirector()
    handlers = (
        _Proxies(),
        _Redirects(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    )
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _reason(error: BaseException, silence: float) -> str:
    """Say in words why a connection failed."""
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return f"the server was silent for {silence:g} s"
    if isinstance(cause, socket.gaierror):
        return f"no connection to the network, or no such server: {cause.strerror}"
    if isinstance(cause, ConnectionRefusedError):
        return "the server refuses the connection"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return " ".join(str(cause).split())[:200] or type(cause).__name__
