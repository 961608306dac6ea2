"""nginx with one location for each way a web server can behave.

All locations serve the same directory, so that one file can be asked for in every way.  A
second server block is another host (``elsewhere``), a third speaks TLS with a certificate
of its own authority.  Started as the calling user on free loopback ports.
"""

import datetime
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from stagefs.remote.url import quote_path
from tests.support.ports import free_ports
from tests.support.waiting import wait_until

USER, PASSWORD = "ada", "s3cr3t-w0rd"
TOKEN = "bearer-t0ken-of-a-pilot"

_CONF = """
daemon off;
master_process off;
{user}
pid {top}/nginx.pid;
error_log {top}/error.log;
worker_rlimit_nofile 4096;
events {{ worker_connections 1024; }}
http {{
    log_format asked '$request_method|$request_uri|$status|$body_bytes_sent|$server_port|'
        '$http_range|$http_if_match|$http_authorization|$http_accept_encoding';
    access_log {top}/access.log asked;
    client_body_temp_path {top}/t1;
    proxy_temp_path {top}/t2;
    fastcgi_temp_path {top}/t3;
    uwsgi_temp_path {top}/t4;
    scgi_temp_path {top}/t5;
    keepalive_requests 100000;
    sendfile on;
    default_type application/octet-stream;
    server {{
        listen 127.0.0.1:{port} backlog=512;
        location /plain/ {{ alias {root}/; autoindex on; autoindex_format json; }}
        location /html/ {{ alias {root}/; autoindex on; }}
        location /unlisted/ {{ alias {root}/; }}
        location /whole/ {{ alias {root}/; max_ranges 0; }}
        location /weak/ {{ alias {root}/; etag off; }}
        location /nameless/ {{ alias {root}/; etag off; add_header Last-Modified ""; }}
        location /encoded/ {{ alias {root}/; add_header Content-Encoding gzip; }}
        location /private/ {{
            alias {root}/;
            auth_basic staged;
            auth_basic_user_file {top}/passwords;
        }}
        location /nohead/ {{
            if ($request_method = HEAD) {{ return 405; }}
            alias {root}/;
        }}
        location /forbidden/ {{ return 403; }}
        location /gone/ {{ return 410; }}
        location /teapot/ {{ return 418; }}
        location /busy/ {{ add_header Retry-After 7 always; return 503; }}
        location /limited/ {{ add_header Retry-After 3 always; return 429; }}
        location /failing/ {{ return 500; }}
        location /moved/ {{ rewrite ^/moved/(.*)$ /plain/$1 redirect; }}
        location /away/ {{ rewrite ^/away/(.*)$ http://127.0.0.1:{other_port}/plain/$1 redirect; }}
        location /loop/ {{ rewrite ^/loop/(.*)$ /loop/$1x redirect; }}
        location /astray/ {{ return 302 file:///etc/passwd; }}
        location /slow/ {{ alias {root}/; limit_rate 256k; }}
    }}
    server {{
        listen 127.0.0.1:{other_port};
        location /plain/ {{ alias {root}/; }}
    }}
    server {{
        listen 127.0.0.1:{tls_port} ssl;
        ssl_certificate {top}/server.pem;
        ssl_certificate_key {top}/server.key;
        location /plain/ {{ alias {root}/; autoindex on; autoindex_format json; }}
        location /bearer/ {{
            if ($http_authorization != "Bearer {token}") {{ return 401; }}
            alias {root}/;
            autoindex on;
            autoindex_format json;
        }}
        location /down/ {{
            rewrite ^/down/(.*)$ http://127.0.0.1:{port}/plain/$1 redirect;
        }}
    }}
}}
"""


class Asked:
    """One line of the server's log."""

    def __init__(self, line: str) -> None:
        fields = line.split("|")
        self.method, self.uri = fields[0], fields[1]
        self.status, self.sent_bytes, self.port = (int(field) for field in fields[2:5])
        self.range, self.if_match, self.authorization, self.encoding = (
            "" if field == "-" else field for field in fields[5:9]
        )


class Nginx:
    """A running server.  ``root`` is the directory that it serves."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.root = top / "objects"
        self.root.mkdir(parents=True)
        self.port, self.other_port, self.tls_port = free_ports(3)
        self.ca_file = top / "ca.pem"
        make_certificates(top)
        (top / "passwords").write_text(f"{USER}:{{PLAIN}}{PASSWORD}\n")
        conf = top / "nginx.conf"
        conf.write_text(
            _CONF.format(
                top=top,
                root=self.root,
                port=self.port,
                other_port=self.other_port,
                tls_port=self.tls_port,
                token=TOKEN,
                user="user root;" if os.geteuid() == 0 else "",
            )
        )
        program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin")
        assert program is not None, "nginx is not installed (apt-get install nginx-light)"
        self._child = subprocess.Popen(
            [program, "-e", str(top / "error.log"), "-c", str(conf), "-p", str(top)],
            stdin=subprocess.DEVNULL,
        )
        wait_until(self._answers, "nginx")

    def url(self, name: str, *, location: str = "plain") -> str:
        return f"http://127.0.0.1:{self.port}/{location}/{quote_path(name)}"

    def tls_url(self, name: str, *, location: str = "plain") -> str:
        return f"https://127.0.0.1:{self.tls_port}/{location}/{quote_path(name)}"

    def asked(self) -> list[Asked]:
        """What it was asked, in the order in which the answers ended."""
        lines = (self.top / "access.log").read_text(errors="surrogateescape").splitlines()
        return [Asked(line) for line in lines]

    def freeze(self) -> None:
        os.kill(self._child.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._child.pid, signal.SIGCONT)

    def stop(self) -> None:
        self.thaw()
        self._child.terminate()
        self._child.wait(10)

    def _answers(self) -> bool:
        assert self._child.poll() is None, (self.top / "error.log").read_text()
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def running_nginx(top: Path) -> Iterator[Nginx]:
    server = Nginx(top)
    try:
        yield server
    finally:
        server.stop()


def make_certificates(top: Path) -> None:
    """An authority in ca.pem, and a server certificate for 127.0.0.1 that it signed."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name.from_rfc4514_string("CN=StageFS test authority")
    ca = (
        _certificate(ca_name, ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=True,
                crl_sign=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .sign(ca_key, hashes.SHA256())
    )
    key = ec.generate_private_key(ec.SECP256R1())
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        _certificate(x509.Name.from_rfc4514_string("CN=127.0.0.1"), ca_name, key.public_key())
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    (top / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (top / "server.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (top / "server.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )
