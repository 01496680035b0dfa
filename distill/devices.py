"""Constants of devices that plans reckon with, and the ledger in which what is taken for granted is named."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources

from pocketvlm.distill.counting import Work


@dataclass
class Ledger:
    """What a plan takes for granted, each with its value and where that is from."""

    rows: list[dict[str, str]] = field(default_factory=list)

    def assume(self, what: str, value: str, because: str) -> None:
        row = {"assumption": what, "value": value, "because": because}
        if row not in self.rows:
            self.rows.append(row)


@dataclass(frozen=True)
class Device:
    """Constants of one device: FLOP/s that training reaches in matrix products and in convolutions, pictures a second
    that one core decodes and augments, seconds that no step goes below, cores beside it, memory in 1e9 bytes.
    sources: of each constant, its kind ("measured", "vendor", "assumed") and where it is from.
    """

    name: str
    title: str
    matrix_flops: float
    convolution_flops: float
    decode_per_core: float
    step_floor_s: float
    cores: float
    memory_gb: float
    sources: dict[str, tuple[str, str]]

    def seconds(self, work: Work, ledger: Ledger) -> float:
        """Of so many multiply-accumulates, two operations each."""
        found = 0.0
        for kind, macs, rate in (
            ("matrix_flops", work.matrix, self.matrix_flops),
            ("convolution_flops", work.convolution, self.convolution_flops),
        ):
            if macs:
                self.told(kind, ledger)
                found += 2 * macs / rate
        return found

    def told(self, name: str, ledger: Ledger) -> None:
        """Name a constant that is used, once."""
        kind, source = self.sources[name]
        ledger.assume(f"{self.name}: {name}", f"{getattr(self, name):.3g}", f"{kind}: {source}")


def load_devices() -> dict[str, Device]:
    """The committed table, by name."""
    text = resources.files("pocketvlm.distill").joinpath("devices.json").read_text(encoding="utf-8")
    found = {}
    for name, row in json.loads(text).items():
        title = row.pop("title")
        values = {key: float(part["value"]) for key, part in row.items()}
        sources = {key: (part["kind"], part["source"]) for key, part in row.items()}
        found[name] = Device(name, title, sources=sources, **values)
    return found
