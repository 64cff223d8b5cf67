"""Downloads: whole or not at all, gone on with after a break, and one sentence for every failure."""

import errno
import io
import re
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.pretrained import download as module
from h2a2_jax.pretrained.download import download
from tests.pretrained.server import Behaviour, serving

BODY = np.random.default_rng(0).bytes(700_000)
OTHER = np.random.default_rng(1).bytes(700_000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Behaviour]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # which does not reach loopback addresses
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving({"/a.pth": BODY}) as behaviour:
        yield behaviour


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.pth"


def refused(server: Behaviour, path: Path, match: str, **limits: Any) -> str:
    """The sentence of a download that fails and leaves no file."""
    with pytest.raises(InputError, match=match) as caught:
        download(f"{server.address}/a.pth", path, **limits)
    sentence = str(caught.value)
    assert not path.exists() and "\n" not in sentence and str(path) in sentence
    return sentence


def leftovers(path: Path) -> set[str]:
    return {other.name for other in path.parent.iterdir()} - {path.name}


@pytest.mark.parametrize("length", [True, False])
def test_a_file_is_downloaded_whole(server: Behaviour, path: Path, length: bool, capfd: pytest.CaptureFixture[str]):
    server.length = length
    download(f"{server.address}/a.pth", path)
    assert path.read_bytes() == BODY and not leftovers(path)
    assert "a.pth" in capfd.readouterr().err


def test_a_connection_that_ends_early_is_resumed(server: Behaviour, path: Path):
    server.cuts = [300_000, 100_000]
    download(f"{server.address}/a.pth", path)
    assert path.read_bytes() == BODY and not leftovers(path)
    assert [range for _, range in server.asked] == ["", "bytes=300000-", "bytes=400000-"]


def test_a_later_call_goes_on_where_the_last_one_ended(server: Behaviour, path: Path):
    server.cuts = [300_000, 0]
    sentence = refused(server, path, "the connection ended at byte 300,000 of 700,000")
    assert "300,000 bytes are kept, and the same command goes on from there" in sentence
    download(f"{server.address}/a.pth", path)
    assert path.read_bytes() == BODY and not leftovers(path)
    assert server.asked[-1][1] == "bytes=300000-"


@pytest.mark.parametrize("validators", [{"ETag": '"2"'}, {"Last-Modified": "Mon, 30 Nov 2026 10:00:00 GMT"}, {}])
def test_a_file_that_changed_begins_anew(server: Behaviour, path: Path, validators: dict[str, str]):
    server.cuts = [300_000, 0]
    refused(server, path, "the connection ended")
    server.files, server.validators = {"/a.pth": OTHER}, validators
    download(f"{server.address}/a.pth", path)
    assert path.read_bytes() == OTHER and not leftovers(path)


@pytest.mark.parametrize("validators", [{}, {"ETag": 'W/"1"'}])
def test_without_a_strong_validator_nothing_is_resumed(server: Behaviour, path: Path, validators: dict[str, str]):
    server.validators, server.cuts = validators, [300_000, 0]
    assert "are kept" not in refused(server, path, "the connection ended")
    download(f"{server.address}/a.pth", path)
    assert path.read_bytes() == BODY and not any(range for _, range in server.asked)


def test_a_server_that_ignores_ranges_sends_the_whole_file(server: Behaviour, path: Path):
    server.ranges, server.cuts = False, [300_000]
    download(f"{server.address}/a.pth", path)
    assert path.read_bytes() == BODY and server.asked[-1][1] == "bytes=300000-"


def test_a_part_that_is_longer_than_the_file_begins_anew(server: Behaviour, path: Path):
    server.cuts = [300_000, 0]
    refused(server, path, "the connection ended")
    server.files = {"/a.pth": BODY[:200_000]}
    download(f"{server.address}/a.pth", path)
    assert path.read_bytes() == BODY[:200_000] and not leftovers(path)


def test_a_part_from_another_address_begins_anew(server: Behaviour, path: Path):
    server.cuts = [300_000, 0]
    refused(server, path, "the connection ended")
    server.files["/b.pth"] = OTHER
    download(f"{server.address}/b.pth", path)
    assert path.read_bytes() == OTHER and server.asked[-1] == ("/b.pth", "")


def test_a_silent_server_is_left(server: Behaviour, path: Path):
    server.cuts, server.silent = [300_000, 0], True
    assert "300,000 bytes are kept" in refused(server, path, r"the server was silent for 0\.2 s", silence=0.2)
    server.silent = False
    download(f"{server.address}/a.pth", path)
    assert path.read_bytes() == BODY and server.asked[-1][1] == "bytes=300000-"


@pytest.mark.parametrize("status", [403, 404, 500, 503, 416])
def test_the_servers_answer_is_in_the_sentence(server: Behaviour, path: Path, status: int):
    server.status = status
    sentence = refused(server, path, f"the server answers {status}")
    assert f"{server.address}/a.pth cannot be downloaded" in sentence and "by hand" in sentence
    assert not leftovers(path)


def test_a_server_that_is_not_there(path: Path):
    with serving({}) as gone:
        pass
    refused(gone, path, "the server refuses the connection")
    gone.address = "http://weights.invalid"
    refused(gone, path, "no connection to the network, or no such server")


@pytest.mark.parametrize("length", [True, False])
def test_a_file_that_is_too_large_is_refused(server: Behaviour, path: Path, length: bool):
    server.length = length
    refused(server, path, "than weights may have|that weights may have", most_bytes=500_000)
    assert not leftovers(path)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://host/a.pth", "a.pth", "http:///a.pth"])
def test_other_addresses_than_of_the_web_are_refused(path: Path, address: str):
    with pytest.raises(InputError, match=re.escape(f"{address!r}; expected is one of http:// or https://")):
        download(address, path)


def test_redirects_are_followed_within_the_web(server: Behaviour, path: Path):
    with serving({"/b.pth": BODY}) as other:
        server.location = f"{other.address}/b.pth"
        download(f"{server.address}/a.pth", path)
    assert path.read_bytes() == BODY
    path.unlink()
    server.location = "file:///etc/passwd"
    refused(server, path, "the server answers 302 .*is not allowed")
    secure = urllib.request.Request("https://host/a.pth")
    answer = (io.BytesIO(), 302, "Found", Message(), f"{server.address}/b.pth")
    with pytest.raises(Exception, match="redirected from https to http://"):
        module._Redirects().redirect_request(secure, *answer)


def test_a_full_disk_is_one_sentence(server: Behaviour, path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_copy", full)
    assert "H2A2_CACHE" in refused(server, path, "cannot be written .No space left on device")
    assert not leftovers(path)
