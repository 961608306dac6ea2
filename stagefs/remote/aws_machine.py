"""The keys that a machine of a cloud has by being one (instance metadata, version 2).

obstore asks for them itself where no other keys are found; requests that are signed here ask
here.  Blocking, bounded by a few seconds; may be used from several threads.
"""

import contextlib
import datetime
import threading

import msgspec
import urllib3

from stagefs.remote.aws import Keys

DEFAULT_ENDPOINT = "http://169.254.169.254"
CONNECT_TIMEOUT_S = 1.0
READ_TIMEOUT_S = 2.0
# Keys are renewed by the machine well before they end.
SPARE = datetime.timedelta(minutes=5)
TOKEN_LIFETIME_S = 600
_PROOF_PATH = "/latest/api/token"
_ROLES_PATH = "/latest/meta-data/iam/security-credentials/"


class _Told(msgspec.Struct, rename="pascal"):
    """What the machine says of one role."""

    access_key_id: str
    secret_access_key: str
    token: str
    expiration: datetime.datetime


class MachineKeys:
    """Asked again when the last keys are about to end."""

    def __init__(self, endpoint: str | None) -> None:
        self._endpoint = (endpoint or DEFAULT_ENDPOINT).rstrip("/")
        self._lock = threading.Lock()
        self._known: _Told | None = None

    def keys(self) -> Keys | None:
        """None where there is no such service, or the machine has no role."""
        with self._lock:
            now = datetime.datetime.now(datetime.UTC)
            if self._known is None or self._known.expiration - SPARE < now:
                self._known = None
                with contextlib.suppress(
                    urllib3.exceptions.HTTPError, msgspec.MsgspecError, OSError
                ):
                    self._known = self._asked()
            if self._known is None:
                return None
            return Keys(self._known.access_key_id, self._known.secret_access_key, self._known.token)

    def _asked(self) -> _Told | None:
        # No proxy: the address is the machine's own.
        timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S)
        with urllib3.PoolManager(timeout=timeout, retries=False) as client:

            def ask(method: str, path: str, header: str, value: str) -> bytes | None:
                answer = client.request(method, self._endpoint + path, headers={header: value})
                return answer.data if answer.status == 200 else None

            wish = ("X-aws-ec2-metadata-token-ttl-seconds", str(TOKEN_LIFETIME_S))
            token = ask("PUT", _PROOF_PATH, *wish)
            if token is None:
                return None
            proof = ("X-aws-ec2-metadata-token", token.decode("latin-1"))
            roles = ask("GET", _ROLES_PATH, *proof)
            if not roles:
                return None
            role = roles.split()[0].decode("latin-1")
            told = ask("GET", _ROLES_PATH + role, *proof)
            return None if told is None else msgspec.json.decode(told, type=_Told)
