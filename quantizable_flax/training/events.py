"""Event files of TensorBoard: one record for each line of metrics."""

import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")


def header() -> bytes:
    """The record that a file begins with."""
    return record(Event(wall_time=time.time(), file_version="brain.Event:2"))


def scalars(step: int, group: str, values: dict[str, Any]) -> bytes:
    """A record of scalars named `group/name`, the items of a list `group/name/0` and so on."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{group}/{name}/{i}": item for i, item in enumerate(value)}
        else:
            flat[f"{group}/{name}"] = value
    summary = Summary(value=[Summary.Value(tag=_tag(k), simple_value=v) for k, v in flat.items()])
    return record(Event(wall_time=time.time(), step=step, summary=summary))


def _tag(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_./-" else "_" for c in name)


def record(event: Event) -> bytes:
    """An event as the file holds it: its length and itself, a checksum behind each."""
    data = event.SerializeToString()
    length = _LENGTH.pack(len(data))
    return b"".join(
        [length, _CHECKSUM.pack(masked_crc32c(length)), data, _CHECKSUM.pack(masked_crc32c(data))]
    )


def events(content: bytes) -> Iterator[tuple[Event, bytes]]:
    """Yields each event with its record, as far as records are whole."""
    start = 0
    while start + _LENGTH.size <= len(content):
        (length,) = _LENGTH.unpack_from(content, start)
        begin = start + _LENGTH.size + _CHECKSUM.size
        end = begin + length + _CHECKSUM.size
        if end > len(content):
            return
        yield Event.FromString(content[begin : begin + length]), content[start:end]
        start = end


def without(content: bytes, keeps: Callable[[int, str], bool]) -> tuple[bytes, bool]:
    """Returns the records without scalars that `keeps(step, group)` rejects, and if one was kept.

    What is behind the last whole record goes too.
    """
    kept, some = [], False
    for event, whole in events(content):
        tags = [value.tag for value in event.summary.value]
        if all(keeps(event.step, tag.partition("/")[0]) for tag in tags):
            kept.append(whole)
            some |= bool(tags)
    return b"".join(kept), some
