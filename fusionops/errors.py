"""The exceptions fusionops raises: one for each party that has to act on it.

No module raises a bare built-in exception for something a user passed; every class here also is the built-in
exception that NumPy would raise in its place.
"""

from __future__ import annotations

import numpy as np


class FusionError(Exception):
    """Base of every error that fusionops raises on purpose."""


class SpecError(FusionError, ValueError):
    """The input is wrong: a shape, an extent or an option that no backend could run."""


class SpecTypeError(FusionError, TypeError):
    """The input is of the wrong kind: a dtype, a container or an option of the wrong Python type."""


class SpecAxisError(SpecError, np.exceptions.AxisError):
    """An axis lies outside the arrays it is meant for."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class UnsupportedError(FusionError, NotImplementedError):
    """The input is valid, but no kernel of the requested backend can run it; the message lists every reason."""


class BackendError(FusionError, RuntimeError):
    """The machine lacks what the requested backend needs: a library, a driver, a device."""
