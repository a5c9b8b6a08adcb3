"""Budgets: exact integer arithmetic over layers and heads. Imports torch alone, knows no model."""

from reasonalloc.policies.allocation.apportion import apportion, robustify
from reasonalloc.policies.allocation.curves import marginal_gain
from reasonalloc.policies.allocation.demand import attention_demand, attention_demands
from reasonalloc.policies.allocation.heads import (
    HEAD_ALLOCATORS,
    AdaKVHeads,
    HeadAllocator,
    HeadSplit,
    ThresholdHeads,
    UniformHeads,
    register_head_allocator,
)
from reasonalloc.policies.allocation.layers import (
    LAYER_ALLOCATORS,
    DynamicLayers,
    LayerAllocator,
    PyramidLayers,
    UniformLayers,
    WaveLayers,
    register_layer_allocator,
)
from reasonalloc.policies.allocation.loss import LossCurveHeads, LossCurveLayers
from reasonalloc.policies.allocation.miss import MissCurveHeads, MissCurveLayers
from reasonalloc.policies.allocation.offline_heads import FixedHeads
from reasonalloc.policies.allocation.profile import DemandProfile, MissGrid, PromptDemand, merge
from reasonalloc.policies.allocation.random_split import RandomHeads, RandomLayers
from reasonalloc.policies.allocation.sensitivity import SensitivityHeads, SensitivityLayers
from reasonalloc.policies.allocation.shape import ModelShape

__all__ = [
    "HEAD_ALLOCATORS",
    "LAYER_ALLOCATORS",
    "AdaKVHeads",
    "DemandProfile",
    "DynamicLayers",
    "FixedHeads",
    "HeadAllocator",
    "HeadSplit",
    "LayerAllocator",
    "LossCurveHeads",
    "LossCurveLayers",
    "MissCurveHeads",
    "MissCurveLayers",
    "MissGrid",
    "ModelShape",
    "PromptDemand",
    "PyramidLayers",
    "RandomHeads",
    "RandomLayers",
    "SensitivityHeads",
    "SensitivityLayers",
    "ThresholdHeads",
    "UniformHeads",
    "UniformLayers",
    "WaveLayers",
    "apportion",
    "attention_demand",
    "attention_demands",
    "marginal_gain",
    "merge",
    "register_head_allocator",
    "register_layer_allocator",
    "robustify",
]
