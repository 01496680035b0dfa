"""One thread: the towers here are tiny, and waiting for a busy second core costs far more than it gives."""

import torch

torch.set_num_threads(1)
