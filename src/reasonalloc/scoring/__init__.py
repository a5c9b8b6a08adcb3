"""Token scorers: which tokens of a head are worth keeping. One small file per method."""

from reasonalloc.scoring.h2o import H2O
from reasonalloc.scoring.knorm import Knorm
from reasonalloc.scoring.random import Random
from reasonalloc.scoring.rkv import RKV
from reasonalloc.scoring.scorer import SCORERS, Observation, Scorer, register_scorer
from reasonalloc.scoring.snapkv import SnapKV
from reasonalloc.scoring.streaming import StreamingLLM
from reasonalloc.scoring.tova import TOVA
from reasonalloc.scoring.vase import QueryFreeVaSE, VaSE

__all__ = [
    "H2O",
    "RKV",
    "SCORERS",
    "TOVA",
    "Knorm",
    "Observation",
    "QueryFreeVaSE",
    "Random",
    "Scorer",
    "SnapKV",
    "StreamingLLM",
    "VaSE",
    "register_scorer",
]
