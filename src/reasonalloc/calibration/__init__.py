"""Calibration: measure what a model's layers and heads need, while it thinks. Engines drive it."""

from reasonalloc.calibration.probe import DemandProbe, ProbeSettings
from reasonalloc.calibration.prompts import ProbePrompt, built_in_prompts, read_prompts
from reasonalloc.calibration.settings import CalibrationSettings

__all__ = [
    "CalibrationSettings",
    "DemandProbe",
    "ProbePrompt",
    "ProbeSettings",
    "built_in_prompts",
    "read_prompts",
]
