"""A connection that the drill can cut: a TCP proxy on loopback between its own runner and the coordinator."""

import re
import select
import socket
import struct
import threading

CHUNK = 65536
CONNECT_S = 5.0
IDLE_S = 0.2
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Passes bytes on until it is cut; can also swallow the answer to one request that has been delivered."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(IDLE_S)
        self.port = int(self._listener.getsockname()[1])
        self._is_cut = threading.Event()
        self._is_closed = threading.Event()
        self._lock = threading.Lock()
        self._armed: list[tuple[re.Pattern[bytes], threading.Event]] = []
        self._thread = threading.Thread(target=self._accept, name="drill-proxy", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Break every connection, and each new one at once."""
        self._is_cut.set()

    def mend(self) -> None:
        self._is_cut.clear()

    def swallow_answer(self, path_end: str) -> threading.Event:
        """The next POST to a path with this end arrives, and its answer never comes back; tells when."""
        happened = threading.Event()
        pattern = re.compile(rb"^POST [^ ?]*" + re.escape(path_end.encode()) + rb"(\?[^ ]*)? HTTP/1\.1\r\n")
        with self._lock:
            self._armed.append((pattern, happened))
        return happened

    def close(self) -> None:
        self._is_closed.set()
        self._thread.join(CONNECT_S)
        self._listener.close()

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            if self._is_cut.is_set():
                _reset(client)
                continue
            threading.Thread(target=self._carry, args=(client,), name="drill-wire", daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._target, timeout=CONNECT_S)
        except OSError:
            _reset(client)
            return
        try:
            self._pass_on(client, server)
        except OSError:
            pass  # either side has gone: the other one learns it by the reset below
        finally:
            _reset(client)
            _reset(server)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        swallowing: threading.Event | None = None
        while not self._is_closed.is_set() and not self._is_cut.is_set():
            ready, _, _ = select.select([client, server], [], [], IDLE_S)
            if client in ready:
                data = client.recv(CHUNK)
                if not data:
                    return
                swallowing = self._armed_for(data) or swallowing
                server.sendall(data)
            if server in ready:
                data = server.recv(CHUNK)
                if not data:
                    return
                if swallowing is not None:  # the coordinator has done it, and nobody hears
                    swallowing.set()
                    return
                client.sendall(data)

    def _armed_for(self, data: bytes) -> threading.Event | None:
        with self._lock:
            for place, (pattern, happened) in enumerate(self._armed):
                if pattern.match(data):
                    del self._armed[place]
                    return happened
        return None


def _reset(end: socket.socket) -> None:
    """Close as a broken network does, without a farewell."""
    try:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    except OSError:
        pass  # the other side was faster
    end.close()
