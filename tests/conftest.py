import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network

os.environ.setdefault("TRITON_INTERPRET", "1")  # CUDA kernels are tested on the CPU

import torch

torch.set_num_threads(1)
