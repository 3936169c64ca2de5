"""What is predicted from what, and the loss that says how well."""

from m3i_large.objective.config import InputConfig, MixConfig, ObjectiveConfig, TermConfig
from m3i_large.objective.objective import Objective

__all__ = ["InputConfig", "MixConfig", "Objective", "ObjectiveConfig", "TermConfig"]
