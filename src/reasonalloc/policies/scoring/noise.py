from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Noise:
    seed: int
    stream: torch.Tensor
    round: torch.Tensor
