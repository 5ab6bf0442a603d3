"""Operations on tensors, one file each: no process group, no module, usable alone.

``route`` (logits to experts, weights and ranks), ``permute`` (token rows to expert order and back), ``linear`` (also
grouped, with its own weight gradient), ``swiglu``, ``rms_norm``, ``attention``; ``parameter`` (how an operation sees a
cut parameter), ``native`` (the C++ kernels of ``csrc/``) and ``cuda`` (the CUDA kernels of ``csrc/cuda/``), used where
they are built, and ``overview`` (what ``r1mega kernels`` prints).
"""
