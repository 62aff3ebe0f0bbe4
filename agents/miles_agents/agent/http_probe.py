"""One HTTP/1.1 GET that asks "do you live?": status or the reason why there is none. No redirects, no reuse."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import h11

MAX_BODY_BYTES = 1024 * 1024
_READ_BYTES = 64 * 1024


async def get_status(
    host: str, port: int, path: str, *, timeout_s: float, max_bytes: int = MAX_BODY_BYTES
) -> int | str:
    """GET ``http://host:port/path``.

    Args:
        host: Name or address, IPv6 without brackets.
        port: TCP port.
        path: Target, beginning with ``/``.
        timeout_s: For all of it, from connecting to the end of the body.
        max_bytes: A larger body is a failure.

    Returns:
        The status code once the answer was complete, or in words why there was none. Never raises for a network
        reason.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _get(host, port, path, max_bytes)
    except TimeoutError:
        return f"no answer in {timeout_s:g} s"
    except ConnectionRefusedError:
        return f"connection refused on port {port}"
    except ConnectionResetError:
        return "connection reset before an answer"
    except OSError as error:
        return f"cannot connect: {error}"
    except h11.ProtocolError as error:
        return f"not a valid HTTP answer: {error}"


async def _get(host: str, port: int, path: str, max_bytes: int) -> int | str:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        connection = h11.Connection(our_role=h11.CLIENT)
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        # Not "Connection: close": who closes first keeps the port in TIME_WAIT, and the server's is to be bound again.
        request = h11.Request(method="GET", target=path, headers=[("Host", authority), ("Accept", "*/*")])
        writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        await writer.drain()
        return await _read_answer(connection, reader, max_bytes)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _read_answer(connection: h11.Connection, reader: asyncio.StreamReader, max_bytes: int) -> int | str:
    status = 0
    received = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await reader.read(_READ_BYTES)
            if not data and not status:
                return "connection closed before an answer"
            connection.receive_data(data)
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            received += len(event.data)
            if received > max_bytes:
                return f"the answer is larger than {max_bytes} bytes"
        elif isinstance(event, h11.EndOfMessage):
            return status
        elif isinstance(event, h11.ConnectionClosed):
            return "connection closed before an answer"
