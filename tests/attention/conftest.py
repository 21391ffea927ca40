from __future__ import annotations

import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter. Triton reads this once, when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
