"""What is no HTTP, on a connection where the answer may have begun: one answer or none, and no exception."""

from __future__ import annotations

from unittest.mock import Mock

import h11
import pytest

from server.cli.http import Protocol

REQUEST = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("answered", [0, 1, 3])
def test_what_breaks_within_a_body(answered: int) -> None:
    protocol = Protocol.__new__(Protocol)
    protocol.conn, protocol.transport = h11.Connection(h11.SERVER), Mock()
    protocol.conn.receive_data(REQUEST)
    protocol.conn.next_event()
    events = (
        h11.Response(status_code=404, headers=[(b"content-length", b"2")]),
        h11.Data(data=b"no"),
        h11.EndOfMessage(),
    )
    for event in events[:answered]:
        protocol.conn.send(event)
    protocol.conn.receive_data(b"no chunk\r\n")
    with pytest.raises(h11.RemoteProtocolError):
        protocol.conn.next_event()
    protocol.send_400_response("")
    written = b"".join(call.args[0] for call in protocol.transport.write.call_args_list)
    assert (b"invalid_http" in written) == (answered == 0) and protocol.transport.close.called
