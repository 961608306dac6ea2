"""A real server behind a proxy that breaks connections, for tests on mounts."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.faultproxy import FaultProxy, fault_proxy
from tests.support.identity import Identity
from tests.support.lying_proxy import LyingProxy, lying_proxy
from tests.support.mounted import Mounted
from tests.support.nginx import running_nginx
from tests.support.served import HttpServed, Served, SharedGateway, SshServed, serving_s3
from tests.support.sshd import Sshd, running_sshd


class Proxied:
    """A server, and the proxy that all of a mount's connections to it go through."""

    def __init__(
        self,
        served: Served,
        proxy: FaultProxy,
        *,
        port: int,
        sshd: Sshd | None = None,
        liar: LyingProxy | None = None,
    ) -> None:
        """``liar`` is between the two, where the protocol is HTTP."""
        self.served = served
        self.proxy = proxy
        self.liar = liar
        self.sshd = sshd
        self.scheme = served.scheme
        self._ports = f":{port}", f":{proxy.port}"

    def environment(self, identity: Identity) -> dict[str, str]:
        own = dict(self.served.environment(identity))
        if "AWS_ENDPOINT_URL" in own:
            own["AWS_ENDPOINT_URL"] = own["AWS_ENDPOINT_URL"].replace(*self._ports)
        return own

    def put(self, name: str, data: bytes) -> str:
        return self.served.put(name, data).replace(*self._ports)

    def url(self, name: str) -> str:
        return self.served.url(name).replace(*self._ports)

    def status(self, mount: Mounted) -> Mapping[str, object]:
        """What ``stagefs remote list`` says of the one remote that is in use."""
        (one,) = mount.json_of("stagefs", "remote", "list")
        return dict(one)


@contextlib.contextmanager
def proxied(scheme: str, top: Path, gateway: SharedGateway) -> Iterator[Proxied]:
    """``top``: an empty directory that everybody can enter."""
    with contextlib.ExitStack() as stack:
        served: Served
        sshd = None
        if scheme == "http":
            nginx = stack.enter_context(running_nginx(top))
            served, port = HttpServed(nginx), nginx.port
        elif scheme == "ssh":
            (top / "sshd").mkdir()
            sshd = stack.enter_context(running_sshd(top / "sshd"))
            served, port = SshServed(top, sshd), sshd.port
        else:
            s3 = stack.enter_context(serving_s3(top, gateway))
            served, port = s3, s3.port
        liar = stack.enter_context(lying_proxy(port)) if sshd is None else None
        proxy = stack.enter_context(fault_proxy(port if liar is None else liar.port))
        if sshd is not None:
            sshd.trust_port(proxy.port)
        yield Proxied(served, proxy, port=port, sshd=sshd, liar=liar)
