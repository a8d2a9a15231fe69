"""Speed and memory of clplat, paired with hand-written PyTorch loops and with peers. `python -m benchmarks`."""
