"""Bytes and values on the wire, in both directions. Pure: nothing here does I/O."""
