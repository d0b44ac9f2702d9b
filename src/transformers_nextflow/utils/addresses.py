"""Addresses at which a server is to listen."""

from __future__ import annotations

import socket

from .short_repr import short_repr


def check_can_listen(host: str, port: int):
    """Raises `ValueError` for an address that is none of this machine's, and for a port that is taken."""
    try:
        if not host:
            raise OSError("the host is empty")
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ValueError(
            f"Nothing can listen at {short_repr(host)}, port {port}: {error}. Use 127.0.0.1, or 0.0.0.0 for all "
            "addresses of this machine, and a port that is free."
        ) from error
