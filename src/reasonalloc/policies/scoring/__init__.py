"""Token scorers: which tokens of a head are worth keeping. One small file per method."""

from reasonalloc.policies.scoring.h2o import H2O
from reasonalloc.policies.scoring.knorm import Knorm
from reasonalloc.policies.scoring.noise import Noise
from reasonalloc.policies.scoring.random import Random
from reasonalloc.policies.scoring.rkv import RKV
from reasonalloc.policies.scoring.scorer import SCORERS, Observation, Scorer, register_scorer
from reasonalloc.policies.scoring.snapkv import SnapKV
from reasonalloc.policies.scoring.streaming import StreamingLLM
from reasonalloc.policies.scoring.tova import TOVA
from reasonalloc.policies.scoring.vase import QueryFreeVaSE, VaSE

__all__ = [
    "H2O",
    "RKV",
    "SCORERS",
    "TOVA",
    "Knorm",
    "Noise",
    "Observation",
    "QueryFreeVaSE",
    "Random",
    "Scorer",
    "SnapKV",
    "StreamingLLM",
    "VaSE",
    "register_scorer",
]
