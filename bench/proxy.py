"""A TCP proxy on this machine that can delay what passes, and drop every connection."""

import asyncio
import threading


class Proxy:
    """Forwards connections to a port of this machine, in a thread of its own.

    Args:
        port: to forward to.

    Attributes:
        endpoint: where it listens, for ZeroMQ.
        delay_s: seconds by which everything that passes is held back.
    """

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self._port = port
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._pass, "127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:  # nobody listens at present
            writer.close()
            return
        pair = {writer, there_writer}
        self._open |= pair
        await asyncio.gather(self._copy(reader, there_writer), self._copy(there_reader, writer))
        self._open -= pair

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                sink.write(data)
                await sink.drain()
        except OSError:
            pass  # the other side has gone, or it was dropped
        finally:
            sink.close()

    def drop(self) -> None:
        """Cut every connection, as if a cable were pulled and put back."""
        self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    def close(self) -> None:
        """Listen no more."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._server.close()
