import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # without a GPU, its kernels are tested on the CPU

torch.set_num_threads(1)
