import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network

import torch

torch.set_num_threads(1)
