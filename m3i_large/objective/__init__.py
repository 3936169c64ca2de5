"""What is predicted from what, and the loss that says how well."""

from typing import TYPE_CHECKING, Any

from m3i_large.objective.config import InputConfig, MixConfig, ObjectiveConfig, TermConfig

if TYPE_CHECKING:
    from m3i_large.objective.objective import Objective

__all__ = ["InputConfig", "MixConfig", "Objective", "ObjectiveConfig", "TermConfig"]


def __getattr__(name: str) -> Any:
    """Imports torch when the objective itself is asked for: a recipe needs the configs alone."""
    if name != "Objective":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from m3i_large.objective.objective import Objective

    return Objective
