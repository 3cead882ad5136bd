"""Mechanisms for streams: what is kept, dropped and read again while tokens keep coming."""
