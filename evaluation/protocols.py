"""Protocols by which segmentations are scored: the rules behind a figure, named and printable.

Two figures can be compared when their protocols agree in the unit, the spacing, the direction of the
distances and the values where a mask is empty. ``docs/metrics.md`` has the presets side by side.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args, get_origin, get_type_hints

Measure = Literal["dsc", "nsd", "asd", "assd", "hd", "hd95"]
PresetName = Literal["paper", "transunet", "nnunet", "acdc"]

LABELS: Mapping[str, str] = MappingProxyType(
    {"dsc": "DSC", "nsd": "NSD", "asd": "ASD", "assd": "ASSD", "hd": "HD", "hd95": "HD95"}
)
"""What a measure is called in text."""
OVERLAPS = ("dsc", "nsd")
"""Measures in percent, more is better; all others are distances, less is better."""

_ASD = {
    "half": "½ (mean distance P→G + mean distance G→P) over surface elements",
    "forward": "mean distance P→G over surface elements of P",
    "pooled": "mean over the distances P→G and G→P taken together",
}
_HD95 = {
    "pooled": "95th percentile of the distances P→G and G→P taken together",
    "larger": "the larger of the 95th percentiles of the distances P→G and G→P",
}


@dataclass(frozen=True)
class Empty:
    """What the measures of a class are where a mask holds none of it.

    Attributes:
        overlap: value of DSC and NSD in percent; None leaves the class unscored in that case.
        distance: value of every distance, ``diagonal`` being that of the case's field of view; None
            leaves the class unscored in that case.
    """

    overlap: float | None
    distance: float | Literal["diagonal"] | None

    def describe(self, measures: tuple[Measure, ...]) -> str:
        """Return the rule in words, for the measures that a protocol has."""
        if self.overlap is None and self.distance is None:
            return "not scored"
        return "; ".join(f"{LABELS[measure]} {self._value(measure)}" for measure in measures)

    def _value(self, measure: Measure) -> str:
        value = self.overlap if measure in OVERLAPS else self.distance
        if value is None or value == "diagonal":
            return "not scored" if value is None else "= diagonal of the field of view"
        return f"{value:g}"


_UNSCORED = Empty(None, None)
_WORST = Empty(0.0, "diagonal")


@dataclass(frozen=True)
class Protocol:
    """How segmentations are scored.

    Attributes:
        name: what the protocol is called.
        unit: whether one case is a 2-D ``slice`` or a ``volume``; an image that is no slice of anything is
            a case of its own under both.
        spacing: whether distances are in the spacing of the case, where its source tells one; else they are
            in pixels or voxels.
        measures: what is measured, in the order of the tables.
        both_empty: values of a class that neither prediction nor reference holds.
        prediction_empty: values of a class that the reference alone holds.
        reference_empty: values of a class that the prediction alone holds.
        asd: directions of ASD: ``half`` of the sum of both means, ``forward`` from the prediction to the
            reference alone, or both directions ``pooled``, which is ASSD.
        hd95: percentile of both directions ``pooled``, or the ``larger`` of the two percentiles.
        tolerance: distance up to which NSD takes a surface element as found, in the unit of the distances.
        follows: whose code or text the protocol follows.

    Raises:
        ValueError: there is nothing to measure, a measure or another choice is unknown, or NSD has no
            tolerance.
    """

    name: str
    unit: Literal["slice", "volume"]
    spacing: bool
    measures: tuple[Measure, ...]
    both_empty: Empty
    prediction_empty: Empty
    reference_empty: Empty
    asd: Literal["half", "forward", "pooled"] = "half"
    hd95: Literal["pooled", "larger"] = "pooled"
    tolerance: float | None = None
    follows: str = ""

    def __post_init__(self) -> None:
        unknown = set(self.measures) - set(get_args(Measure))
        if unknown or not self.measures:
            raise ValueError(f"measures {self.measures}: choose some of {', '.join(get_args(Measure))}")
        for key, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, key) not in get_args(kind):
                raise ValueError(f"{key} {getattr(self, key)!r}: choose {' or '.join(get_args(kind))}")
        if "nsd" in self.measures and not (self.tolerance is not None and self.tolerance >= 0):
            raise ValueError(f"NSD needs a tolerance of at least 0, not {self.tolerance}")

    def empty(self, predicted: bool, present: bool) -> Empty:
        """Return the rule for a class that the prediction or the reference, or neither, holds."""
        if predicted:
            return self.reference_empty
        return self.prediction_empty if present else self.both_empty

    def rules(self) -> dict[str, str]:
        """Return the protocol in words, to be printed wherever its figures go."""
        definitions = {
            "dsc": "2|P∩G| / (|P| + |G|), in percent",
            "nsd": f"share of the surface elements of P and G within {self.tolerance or 0:g} of the other "
            "surface, in percent; the tolerance is in the unit of the distances",
            "asd": _ASD[self.asd],
            "assd": _ASD["pooled"],
            "hd": "largest of the distances P→G and G→P",
            "hd95": _HD95[self.hd95],
        }
        neighbours = "4-neighbour" if self.unit == "slice" else "6-neighbour (in 2-D 4-neighbour)"
        return {
            "protocol": self.name + (f", after {self.follows}" if self.follows else ""),
            "unit": f"one case is one {'2-D slice' if self.unit == 'slice' else 'volume (an image, if 2-D)'}",
            "spacing": "that of the case, where known" if self.spacing else "none: pixels or voxels",
            "classes": "foreground only",
            **{measure: definitions[measure] for measure in self.measures},
            "surface": f"mask elements with a {neighbours} outside the mask; the border counts as outside",
            "both empty": self.both_empty.describe(self.measures),
            "only prediction empty": self.prediction_empty.describe(self.measures),
            "only reference empty": self.reference_empty.describe(self.measures),
            "mean": "mean over classes of the mean over the cases in which the class is scored",
        }


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol(
                name="paper",
                unit="slice",
                spacing=False,
                measures=("dsc", "asd"),
                both_empty=_UNSCORED,
                prediction_empty=_WORST,
                reference_empty=_WORST,
                follows="native adversarial synthesis (CVPR 2026)",
            ),
            Protocol(
                name="transunet",
                unit="volume",
                spacing=False,
                measures=("dsc", "hd95"),
                both_empty=Empty(0.0, 0.0),
                prediction_empty=Empty(0.0, 0.0),
                reference_empty=Empty(100.0, 0.0),
                follows="the test code of TransUNet and Swin-Unet",
            ),
            Protocol(
                name="nnunet",
                unit="volume",
                spacing=True,
                measures=("dsc", "nsd", "asd", "assd", "hd95"),
                both_empty=_UNSCORED,
                prediction_empty=_WORST,
                reference_empty=_WORST,
                tolerance=2.0,
                follows="nnU-Net's evaluation (its DSC; the other measures are added)",
            ),
            Protocol(
                name="acdc",
                unit="volume",
                spacing=True,
                measures=("dsc", "hd", "hd95", "asd"),
                both_empty=_UNSCORED,
                prediction_empty=_WORST,
                reference_empty=_WORST,
                asd="forward",
                follows="the ACDC challenge (DSC, HD) and WSL4MIS (DSC, HD95, ASD)",
            ),
        )
    }
)
"""The presets by name."""


def named(protocol: str | Protocol) -> Protocol:
    """Return a preset by its name; a protocol is returned as it is.

    Raises:
        ValueError: there is no preset of that name.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"no protocol is called {protocol!r}; the presets are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]
