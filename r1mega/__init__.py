"""r1mega: training of R1-scale mixture-of-experts models on PyTorch."""

__version__ = "0.1.0"
