"""The thread that serves HTTP beside a run, where it may listen, and the token that opens it."""

import errno
import ipaddress
import os
import secrets
import socket
import threading
from pathlib import Path

import uvicorn
from fastapi import FastAPI

SHUTDOWN_S = 2
# Requests under way at the end get this long.


class ServiceError(ValueError):
    """The service cannot listen where the job asks: one line for the user."""


def load_or_create_token(run_dir: Path) -> str:
    """OPD_TOKEN, else the run's token file `token`, made with mode 0600 where it does not exist."""
    if token := os.environ.get("OPD_TOKEN", "").strip():
        return token
    path = run_dir / "token"
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    path.chmod(0o600)
    token = path.read_text().strip()
    if not token:
        raise ServiceError(f"{path}: holds no token; delete the file or set OPD_TOKEN")
    return token


def bind(host: str, port: int, token: str | None) -> socket.socket:
    """A listening socket; port 0 picks a free one.

    Raises ServiceError when the address is taken or unknown, or open to other machines without a token.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ServiceError(f"service.host: {host!r} is no address of this machine ({error.strerror}); use 127.0.0.1") from None
    if token is None and not ipaddress.ip_address(address[0]).is_loopback:
        raise ServiceError(f"service.host: {host} can be reached from other machines and there is no token; set OPD_TOKEN or use 127.0.0.1")
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ServiceError(f"service.port: {host}:{port} is in use; choose another port, or 0 for a free one") from None
        raise ServiceError(f"service.host: cannot listen on {host}:{port} ({error.strerror}); use 127.0.0.1 and another port") from None
    return listener


class ControlServer:
    """Serves an app in a thread of its own until `stop`.

    >>> server = ControlServer(app, bind("127.0.0.1", 0, token))
    >>> server.start()
    >>> server.url
    'http://127.0.0.1:43211'
    >>> server.stop()
    """

    def __init__(self, app: FastAPI, listener: socket.socket) -> None:
        self._listener = listener
        host, self.port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
        # No access log and no log set-up of its own: requests carry the token, and the run owns the terminal.
        self._config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=SHUTDOWN_S,
            server_header=False,
        )

    def start(self) -> None:
        """Connections made from here on are answered: the socket listens already."""
        self._server = uvicorn.Server(self._config)
        # A socket of its own, for it closes what it is given: the port stays ours when the thread dies.
        self._thread = threading.Thread(target=self._serve, args=(self._server, self._listener.dup()), name="opd-http", daemon=True)
        self._thread.start()

    @staticmethod
    def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
        with listener:
            server.run(sockets=[listener])

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Finish the requests under way, close the port, end the thread. Idempotent."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join()
        self._listener.close()
