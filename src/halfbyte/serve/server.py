"""uvicorn around the application: one address, and an end that loses nothing.

SIGTERM or Ctrl-C: new requests are refused, those under way are ended within a limit, then the
process ends. A second Ctrl-C does not wait.
"""

import math
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI

from halfbyte.errors import ConfigError
from halfbyte.serve.service import Service

_MARGIN_SECONDS = 5  # for the last words of requests that the limit ended
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the server listens, and how it ends.

    Args:
        host: Address of the interface.
        port: TCP port; 0 takes a free one.
        shutdown_timeout: Seconds that requests under way get at the end.

    Raises:
        ConfigError: the port or the time is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    shutdown_timeout: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port should be from 0 to 65535, got {self.port}")
        if self.shutdown_timeout < 0:
            raise ConfigError(
                f"shutdown_timeout should be 0 seconds or more, got {self.shutdown_timeout}"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in _LOOPBACK or self.host.startswith("127.")


class Server(uvicorn.Server):
    """uvicorn's server, which tells the engine of the end as soon as the signal comes.

    Args:
        app: The application.
        service: What it answers with; closed when the server has ended.
        address: Where to listen.
        on_ready: Called with the URL once requests are answered.
    """

    def __init__(
        self,
        app: FastAPI,
        service: Service,
        address: Address,
        *,
        on_ready: Callable[[str], None] = lambda url: None,
    ) -> None:
        self._service, self._address, self._on_ready = service, address, on_ready
        super().__init__(
            uvicorn.Config(
                app,
                host=address.host,
                port=address.port,
                timeout_graceful_shutdown=math.ceil(address.shutdown_timeout) + _MARGIN_SECONDS,
                log_level="warning",
                access_log=False,
                server_header=False,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets=sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new requests from here on, and end."""
        engine, limit = self._service.engine, self._address.shutdown_timeout
        # What is not complete at the limit gets an error of its own, not a cut connection.
        threading.Thread(target=engine.stop, args=(limit,), daemon=True).start()
        super().handle_exit(sig, frame)

    def run_until_signal(self) -> None:
        """Serve until a signal comes, in the main thread.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        # uvicorn raises the signal again when it has ended, which would kill the process.
        before = signal.signal(signal.SIGTERM, _already_ended)
        try:
            self.run()
        except SystemExit as error:
            raise ConfigError(
                f"{self._address.host}:{self._address.port} cannot be listened on",
                hint="is another server there? choose another --port",
            ) from error
        finally:
            signal.signal(signal.SIGTERM, before)
            self._service.close(timeout=0)


def _already_ended(_: int, __: FrameType | None) -> None:
    """Do nothing: the server has ended because of this signal."""
