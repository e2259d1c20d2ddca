"""The choices that the objectives have, by name; apart from them, so that settings are read without torch."""

from typing import Literal

PriorWeight = Literal["inverse_tangent", "none"]
Normalisation = Literal["l2", "l2_per_element", "none"]
