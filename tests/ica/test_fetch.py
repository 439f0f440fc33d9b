"""Downloading over TLS from a server on this machine; what is not verified leaves nothing behind."""

import os
import re
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from autospec.errors import UserError
from autospec.ica import fetch
from autospec.ica.fetch import fetch_template
from autospec.ica.template import git_blob
from tests.conftest import need

CONTENT = b"maps of networks" * 1000


class Answers(BaseHTTPRequestHandler):
    """What the server does, by path."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/slow":
            time.sleep(1)
            return
        if self.path == "/silent":
            return
        if self.path in ("/insecure", "/moved"):
            secure = f"https://localhost:{self.server.server_port}/template"
            self.send_response(302)
            self.send_header("Location", secure if self.path == "/moved" else "http://localhost:1/template")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write({"/cut": CONTENT[:500], "/other": CONTENT[::-1]}.get(self.path, CONTENT))

    def log_message(self, *_):
        pass


def certificate(folder, name, address):
    """A certificate that vouches for itself, and its key."""
    subprocess.run(
        [
            need("openssl", "install openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt",
            "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", f"/CN={name}",
            "-addext", f"subjectAltName={address}", "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem",
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return folder / f"{name}.pem", folder / f"{name}.key"


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Start servers with their certificates; each gives its address and its certificate."""
    folder, servers = tmp_path_factory.mktemp("tls"), {}

    def start(name, address="DNS:localhost"):
        if name not in servers:
            pem, key = certificate(folder, name, address)
            server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
            server.asked, server.daemon_threads = [], True
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pem, key)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            server.handle_error = lambda *_: None
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            servers[name] = server, pem
        server, pem = servers[name]
        return f"https://localhost:{server.server_port}", pem, server

    yield start
    for server, _ in servers.values():
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def directly(monkeypatch):
    """No proxy stands between the test and its server."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def get(folder, url, pem, **others):
    return fetch_template(folder / "t" / "template.nii", url, git_blob(CONTENT), pem, **{"timeout": 10, **others})


def assert_nothing(folder):
    assert [path for path in folder.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("path", ["/template", "/moved"])
def test_a_verified_file_is_written(tmp_path, serve, path):
    url, pem, _ = serve("good")
    message = get(tmp_path, url + path, pem)
    assert "16000 bytes from localhost, verified" in message
    assert (tmp_path / "t" / "template.nii").read_bytes() == CONTENT
    assert os.listdir(tmp_path / "t") == ["template.nii"]


def test_a_file_that_is_there_is_not_downloaded_again(tmp_path, serve):
    url, pem, server = serve("good")
    get(tmp_path, url + "/template", pem)
    asked = len(server.asked)
    assert "there already" in get(tmp_path, url + "/template", pem)
    assert len(server.asked) == asked
    # A file with other content is replaced.
    (tmp_path / "t" / "template.nii").write_bytes(b"old")
    get(tmp_path, url + "/template", pem)
    assert (tmp_path / "t" / "template.nii").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/other", r"is not the template \(16000 bytes with git blob id [0-9a-f]{40}, expected [0-9a-f]{40}\)"),
        ("/missing", "answered 404"),
        ("/cut", "broke off after 500"),
        ("/insecure", "is no https address"),
        ("/silent", "cannot be reached"),
        ("/slow", "did not answer in time"),
    ],
)
def test_what_is_not_the_template_leaves_nothing(tmp_path, serve, path, sentence):
    url, pem, _ = serve("good")
    with pytest.raises(UserError, match=sentence) as caught:
        get(tmp_path, url + path, pem, timeout=0.3)
    assert "\n" not in str(caught.value)
    assert_nothing(tmp_path)


def test_a_wrong_file_leaves_the_one_that_is_there(tmp_path, serve):
    url, pem, _ = serve("good")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "template.nii").write_bytes(b"mine")
    with pytest.raises(UserError, match="nothing was written"):
        get(tmp_path, url + "/other", pem)
    assert (tmp_path / "t" / "template.nii").read_bytes() == b"mine"


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path, serve):
    url, _, server = serve("good")
    asked = len(server.asked)
    with pytest.raises(UserError, match=r"certificate of localhost cannot be verified .*self-signed"):
        get(tmp_path, url + "/template", None)
    assert len(server.asked) == asked
    assert_nothing(tmp_path)


def test_a_certificate_of_another_host_is_refused(tmp_path, serve):
    url, pem, _ = serve("stranger", "DNS:elsewhere.example")
    with pytest.raises(UserError, match=r"certificate of localhost cannot be verified .*[Hh]ostname mismatch"):
        get(tmp_path, url + "/template", pem)
    assert_nothing(tmp_path)


def test_more_than_the_template_can_be_is_not_taken(tmp_path, serve, monkeypatch):
    url, pem, _ = serve("good")
    monkeypatch.setattr(fetch, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="more than 1000 bytes"):
        get(tmp_path, url + "/template", pem)
    assert_nothing(tmp_path)


def test_a_server_without_tls_is_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def answer():
            connection, _ = plain.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(UserError, match="no secure connection to localhost"):
            get(tmp_path, f"https://localhost:{plain.getsockname()[1]}/template", None)
        thread.join()
    assert_nothing(tmp_path)


def test_no_network_is_said(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(UserError, match=r"localhost cannot be reached .*connected to the network"):
        get(tmp_path, f"https://localhost:{port}/template", None)

    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match=r"raw\.githubusercontent\.com is unknown here"):
        fetch_template(tmp_path / "t" / "template.nii")
    assert_nothing(tmp_path)


def test_only_https_and_readable_certificates_are_taken(tmp_path):
    for url in ("http://localhost/template", "file:///etc/hosts", "template.nii", "https://"):
        with pytest.raises(UserError, match="is no https address"):
            get(tmp_path, url, None)
    (tmp_path / "bad.pem").write_text("no certificate")
    for path in ("bad.pem", "missing.pem"):
        with pytest.raises(UserError, match="no certificates that can be read"):
            get(tmp_path, "https://localhost/template", tmp_path / path)


def test_the_address_names_one_commit():
    assert re.fullmatch(
        r"https://raw\.githubusercontent\.com/trendscenter/gift/[0-9a-f]{40}/"
        r"GroupICAT/icatb/icatb_templates/Neuromark_fMRI_1\.0\.nii",
        fetch.URL,
    )
