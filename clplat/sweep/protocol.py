"""On which data a sweep tunes, and so how far its figures can be believed.

```yaml
protocol: end_of_stream                       # validation data of all experiences: optimistic
protocol: {first: 3}                          # the first three experiences alone
protocol: {stream: {name: digits, validation: 0.1}}     # another stream; the best is transferred to the file's
protocol: {streams: [digits, {name: digits, scenario: task}]}   # one configuration for all: the mean over streams
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clplat.metrics.catalogue import METRICS

OPTIMISTIC = "end-of-stream validation (optimistic: it tunes on experiences that a learner has not met when it begins)"
# Metrics that read rows or columns of experiences beyond those learned.
_AHEAD = ("forward_transfer", "transfer", "average", "last")
# Metrics that are scored on the labels of what is predicted as it arrives: test data of their stream.
_ONLINE = ("online_error", "last_round_error", "round_drift", "hardest_error")
_VALID = "end_of_stream, {first: K}, {stream: ...} or {streams: [...]}"


@dataclass(frozen=True)
class Protocol:
    """One of the four.

    Args:
        first: experiences that are tuned on; None: all.
        streams: that are tuned on instead of the configuration's, each as in a configuration.
        transfers: the best is meant for the configuration's stream, not for `streams`.
    """

    first: int | None = None
    streams: tuple[Any, ...] = ()
    transfers: bool = False

    def __str__(self) -> str:
        if self.first is not None:
            return f"tuned on the first {self.first} experiences"
        if self.transfers:
            return f"tuned on another stream ({stream_name(self.streams[0])}) and transferred"
        if self.streams:
            return f"one configuration for {len(self.streams)} streams ({', '.join(self._told())}); {OPTIMISTIC}"
        return OPTIMISTIC

    def labels(self) -> list[str]:
        """A name for each stream, each once."""
        names = [stream_name(s) for s in self.streams]
        return [n if names.count(n) == 1 else f"{n}-{names[:i].count(n) + 1}" for i, n in enumerate(names)]

    def _told(self) -> list[str]:
        """The label of each stream; of those of one name with what sets them apart."""
        options = [_whole(stream) for stream in self.streams]
        names = [stream_name(s) for s in self.streams]
        found = []
        for label, name, own in zip(self.labels(), names, options, strict=True):
            rivals = [other for other, its in zip(options, names, strict=True) if its == name]
            apart = [f"{k} {v}" for k, v in own.items() if any(r.get(k, ...) != v for r in rivals)]
            found.append(f"{label}: {', '.join(apart)}" if apart else label)
        return found

    def settings(self, stream: Any = None) -> dict[str, Any]:
        """Keys that a trial has beside its own, on one of the streams."""
        found = {} if self.first is None else {"loop.stop_after": self.first}
        return found if stream is None else {**found, "stream": stream}


def read_protocol(given: Any, base: Mapping[str, Any], flags: Mapping[str, str], faults: list[str]) -> Protocol:
    """The protocol of a `sweep:` section; a fault where it is none, or contradicts the configuration."""
    if given in (None, "end_of_stream"):
        return Protocol()
    key, value = next(iter(given.items())) if isinstance(given, dict) and len(given) == 1 else (None, None)
    if key == "first":
        if type(value) is int and value >= 1:
            return Protocol(first=value)
        faults.append(f"sweep.protocol.first: {value!r} is out of range (valid: ≥ 1)")
    elif key in ("stream", "streams"):
        streams = [value] if key == "stream" else value
        if not isinstance(streams, list) or not streams or not all(map(stream_name, streams)):
            what = "a stream" if key == "stream" else "a list of streams"
            valid = "(valid: a name, or a mapping with a name)"
            faults.append(f"sweep.protocol.{key}: {value!r} is not {what} {valid}")
        elif any(f == "stream" or f.startswith("stream.") for f in flags):
            faults.append(f"sweep.protocol.{key}: names the streams, so flags of the stream have no effect")
        elif twice := [s for i, s in enumerate(streams) if _whole(s) in map(_whole, streams[:i])]:
            faults.append(f"sweep.protocol.{key}: {twice[0]!r} is there twice (valid: each once)")
        elif key == "stream" and streams[0] == base.get("stream"):
            faults.append("sweep.protocol.stream: is the configuration's own stream (valid: another one)")
        else:
            return Protocol(streams=tuple(streams), transfers=key == "stream")
    else:
        faults.append(f"sweep.protocol: {given!r} is not valid (valid: {_VALID})")
    return Protocol()


def protocol_faults(protocol: Protocol, metrics: list[str], lengths: set[int]) -> list[str]:
    """Metrics that a protocol must not be judged by, and more experiences than there are.

    Args:
        lengths: of the streams.
    """
    faults = []
    for metric in metrics:
        if protocol.first is not None and metric in _AHEAD:
            faults.append(f"sweep.metric: {metric} reads experiences beyond protocol.first ({protocol.first})")
        if metric in _ONLINE and not protocol.transfers:
            faults.append(f"sweep.metric: {metric} is scored on labels of test data: {METRICS[metric].summary} (valid "
                          "with protocol: {stream: ...}, another stream)")  # fmt: skip
    if protocol.first is not None and lengths and protocol.first >= min(lengths):
        faults.append(f"sweep.protocol.first: {protocol.first} is out of range (valid: 1..{min(lengths) - 1}, of "
                      f"{min(lengths)} experiences)")  # fmt: skip
    return faults


def _whole(stream: Any) -> dict[str, Any]:
    """A stream as a mapping, with or without options."""
    return dict(stream) if isinstance(stream, Mapping) else {"name": stream}


def stream_name(stream: Any) -> str:
    """The name of a stream as a configuration has it; empty where it is none."""
    name = stream.get("name") if isinstance(stream, Mapping) else stream
    return name if isinstance(name, str) else ""
