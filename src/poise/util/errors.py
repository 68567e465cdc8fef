"""Every error poise raises on purpose.

::

    PoiseError
    ├── InputError (also ValueError)   the caller's input is wrong; the CLI exits with 2
    │   ├── TraceError                 a routing trace or load profile
    │   │   └── NoTrafficError         nothing wrong, and no token in it
    │   ├── ClusterError               a cluster spec, preset or YAML file
    │   ├── ModelError                 a model preset, config or module
    │   ├── PlacementError             a placement or home table, or a file of one
    │   ├── OptionError                an option of a call or of the command line
    │   ├── PluginError                what another package offers is not what it should be
    │   └── UnavailableError           the traffic of a frozen case is not here, or is another one
    ├── CommunicationError             a rank was lost or a collective failed
    ├── CapacityError                  a step needed more room than its layer was made with
    └── NoResultError                  the input is fine, no answer exists or was found; the CLI exits with 1
        └── InfeasibleError            proven: no placement meets the constraints

A message names the two numbers that disagree; ``hint`` says how to mend it.
"""

from __future__ import annotations


class PoiseError(Exception):
    """Root of poise's errors.

    Parameters
    ----------
    message : what is wrong, with the numbers that disagree.
    hint : how to mend it, or ``""``.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class InputError(PoiseError, ValueError):
    """The caller's input is wrong."""


class TraceError(InputError):
    """A routing trace or load profile is malformed."""


class NoTrafficError(TraceError):
    """A record of an engine that nobody used: every load is 0."""


class ClusterError(InputError):
    """A cluster spec, preset or file is malformed."""


class ModelError(InputError):
    """A model preset, config or module is not one poise understands."""


class PlacementError(InputError):
    """A placement or home table breaks an invariant, or its file is malformed."""


class OptionError(InputError):
    """An option of a call or of the command line is out of range."""


class PluginError(InputError):
    """What another package offers by an entry point cannot be used; the message names the package."""


class UnavailableError(InputError):
    """The traffic of a frozen case is not here, or is not what the case was frozen on."""


class CommunicationError(PoiseError):
    """A rank was lost, or a collective failed or ran out of time."""


class CapacityError(PoiseError):
    """A step needed more room than its layer was made with; its outputs were NaN."""


class NoResultError(PoiseError):
    """The input is fine but no answer was found."""


class InfeasibleError(NoResultError):
    """Proven: no placement meets the constraints."""


def told(error: BaseException) -> str:
    """An error that is not poise's in one line: its type, and the beginning of what it says."""
    if isinstance(error, PoiseError):
        return error.message
    try:
        said = " ".join(str(error).split())
    except Exception:  # whose own text fails
        said = ""
    return type(error).__name__ + (f": {said[:300]}" if said else "")
