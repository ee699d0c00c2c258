"""Without a GPU, Triton kernels run in its interpreter; the variable must be set before Triton is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.manual_seed(0)
