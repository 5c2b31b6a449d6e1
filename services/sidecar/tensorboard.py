"""Scalars of TensorBoard event files, without TensorBoard: it would pull more than all of the light distribution. Pure."""

import struct
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def is_events(head: bytes) -> bool:
    if len(head) < 24:
        return False
    (size,) = struct.unpack_from("<Q", head)
    return 0 < size < 1 << 16 and head[12:13] == b"\x09" and (b"brain.Event" in head[:64] or b"\x1a" in head[:64])


def read_events(data: bytes) -> list[Row]:
    """Scalars of an event file: records of (length, crc, Event, crc); a record that was cut ends it. Tags of one step make one row."""
    at, steps = 0, dict[int, Row]()
    while at + 12 <= len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        end = at + 12 + size
        if end + 4 > len(data):
            break
        _read_event(data, at + 12, end, steps)
        at = end + 4
    return list(steps.values())


def _read_event(data: bytes, at: int, end: int, steps: dict[int, Row]) -> None:
    """Event: 2 = step, 5 = summary; Summary: 1 = value; Value: 1 = tag, 2 = simple_value, 8 = tensor."""
    step, summaries = 0, []
    for number, value in _protobuf(data, at, end):
        if number == 2 and isinstance(value, int):
            step = value
        elif number == 5 and isinstance(value, tuple):
            summaries.append(value)
    for summary in summaries:
        for _, place in _protobuf(data, *summary):
            if not isinstance(place, tuple):
                continue
            tag, scalar = "", None
            for number, value in _protobuf(data, *place):
                if number == 1 and isinstance(value, tuple):
                    tag = data[slice(*value)].decode("utf-8", "replace")
                elif number == 2 and isinstance(value, float):
                    scalar = value
                elif number == 8 and isinstance(value, tuple):
                    scalar = _tensor_scalar(data, *value)
            if tag and scalar is not None:
                steps.setdefault(step, {"step": step})[tag] = scalar


def _tensor_scalar(data: bytes, at: int, end: int) -> float | None:
    """TensorProto: 4 = tensor_content (float32 bytes), 5 = packed float_val."""
    for number, value in _protobuf(data, at, end):
        if number in (4, 5) and isinstance(value, tuple) and value[1] - value[0] == 4:
            return float(struct.unpack_from("<f", data, value[0])[0])
        if number == 5 and isinstance(value, float):
            return value
    return None


def _protobuf(data: bytes, at: int, end: int) -> Iterator[tuple[int, int | float | tuple[int, int]]]:
    """(field number, value) of one message: a whole number, a 32-bit float, or the place of bytes. Stops at what is malformed."""
    while at < end:
        key, at = _varint(data, at, end)
        kind, number = key & 7, key >> 3
        if kind == 0:
            value, at = _varint(data, at, end)
            yield number, value
        elif kind == 2:
            size, at = _varint(data, at, end)
            if at + size > end:
                return
            yield number, (at, at + size)
            at += size
        elif kind == 5 and at + 4 <= end:
            yield number, float(struct.unpack_from("<f", data, at)[0])
            at += 4
        elif kind == 1:
            at += 8
        else:
            return


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    return value, end
