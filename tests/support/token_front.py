"""nginx before another web server: speaks TLS, and lets in who brings the bearer token."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.nginx import TOKEN, make_certificates
from tests.support.ports import free_ports
from tests.support.waiting import wait_until

_CONF = """
daemon off;
master_process off;
{user}
pid {top}/nginx.pid;
error_log {top}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {top}/t1;
    proxy_temp_path {top}/t2;
    fastcgi_temp_path {top}/t3;
    uwsgi_temp_path {top}/t4;
    scgi_temp_path {top}/t5;
    client_max_body_size 0;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {top}/server.pem;
        ssl_certificate_key {top}/server.key;
        location / {{
            if ($http_authorization != "Bearer {token}") {{ return 401; }}
            set $destination $http_destination;
            if ($http_destination ~ "^https://[^/]+(/.*)$") {{
                set $destination http://127.0.0.1:{target}$1;
            }}
            proxy_pass http://127.0.0.1:{target};
            proxy_set_header Host 127.0.0.1:{target};
            proxy_set_header Destination $destination;
            proxy_set_header Authorization "";
        }}
    }}
}}
"""


@contextmanager
def token_front(top: Path, target_port: int) -> Iterator[int]:
    """Its port.  Its certificate is signed by ``top/ca.pem``."""
    (port,) = free_ports(1)
    make_certificates(top)
    user = "user root;" if os.geteuid() == 0 else ""
    conf = top / "front.conf"
    conf.write_text(_CONF.format(top=top, port=port, target=target_port, token=TOKEN, user=user))
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    assert program is not None, "nginx is not installed (apt-get install nginx-light)"
    words = [program, "-e", str(top / "error.log"), "-c", str(conf), "-p", str(top)]
    child = subprocess.Popen(words, stdin=subprocess.DEVNULL)

    def answers() -> bool:
        assert child.poll() is None, (top / "error.log").read_text()
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(answers, "nginx before the server")
        yield port
    finally:
        child.terminate()
        child.wait(10)
