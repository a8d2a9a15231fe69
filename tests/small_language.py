"""Answers and families of the small language models that are tested."""

import torch

END = 2
ANSWERS = torch.tensor([[5, 6, 7, END], [5, END, -1, -1], [9, 8, END, -1], [END, -1, -1, -1]])  # (C, A)
FAMILIES = ["llama", "t5"]
