"""Mixture: each sample by one of several methods."""

import math

import numpy as np
from torch import Tensor, nn

from errors import InputError
from methods.method import OWN, Method, Preparation, Request, together

COMPONENT = 12 * OWN
"""Stream of the choice of the method, beyond those of every component."""


class Mixture(Method):
    """Make each sample by one of several methods, drawn with given weights.

    A defensive mixture: Hesterberg, "Weighted Average Importance Sampling and Defensive Mixture
    Distributions", Technometrics 1995. A share of plain draws in a mined set bounds how far it can leave
    the prior, and how much of its diversity it can lose.

    Args:
        methods: the components.
        weights: a weight for each of them; they are divided by their sum.

    Raises:
        InputError: no or too few methods or weights, a weight that is negative or not finite, none that
            is positive, or a mixture among the components.
    """

    name = "mixture"

    def __init__(self, methods: list[Method], weights: list[float]) -> None:
        super().__init__()
        if not methods or len(methods) != len(weights):
            raise InputError(
                f"weights {weights}: give one for each of the {len(methods)} methods, at least 1"
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
            raise InputError(f"weights {weights}: must be at least 0 each and above 0 in sum")
        if any(isinstance(part, Mixture) for method in methods for part in method.modules()):
            raise InputError("methods: a mixture is among them; give one mixture with all components")
        self.methods = nn.ModuleList(methods)
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self._noted: dict[str, None] = {}

    def _component(self, number: int) -> Method:
        component = self.methods[number]
        assert isinstance(component, Method)
        return component

    def prepare(self, preparation: Preparation) -> None:
        """See :meth:`Method.prepare`; makes one calibration sample by each component to learn its notes.

        Every sample is noted alike then, whichever components its batch happens to use.
        """
        self._noted = {}
        for number in range(len(self.methods)):
            component = self._component(number)
            component.prepare(preparation)
            request = preparation.requests(1)[0]
            self._noted |= dict.fromkeys(component.synthesize(request)[1])

    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes ``component`` and the components' notes.

        Where the component of a sample does not note what another does, NaN stands (null in a manifest).
        """
        drawn = request.noise.scalars(
            lambda rng: rng.choice(len(self.weights), p=np.array(self.weights)), COMPONENT
        )
        component = drawn.long()
        images, noted, groups = [], [], []
        for number in component.unique().tolist():
            rows = (component == number).nonzero().flatten()
            image, notes = self._component(number).synthesize(request.take(rows))
            images.append(image)
            noted.append(notes)
            groups.append(rows)
        keys = self._noted | dict.fromkeys(key for notes in noted for key in notes)
        merged = {"component": component}
        for key in keys:
            lacking = image.new_full(request.noise.shape if key == "x_T" else (), math.nan)
            parts = [
                notes[key].float() if key in notes else lacking.expand(len(rows), *lacking.shape)
                for notes, rows in zip(noted, groups, strict=True)
            ]
            merged[key] = together(parts, groups)
        return together(images, groups), merged

    def fingerprints(self) -> dict[str, str]:
        """See :meth:`Method.fingerprints`; where components differ under one key, ``<number>.<key>``."""
        found = [self._component(number).fingerprints() for number in range(len(self.methods))]
        values: dict[str, set[str]] = {}
        for prints in found:
            for key, value in prints.items():
                values.setdefault(key, set()).add(value)
        return {
            key if len(values[key]) == 1 else f"{number}.{key}": value
            for number, prints in enumerate(found)
            for key, value in prints.items()
        }
