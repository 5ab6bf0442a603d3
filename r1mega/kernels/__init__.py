"""Operations on tensors, one file each: no module, usable alone; a process group only where one is handed in.

``route`` (logits to experts, weights and ranks), ``scan`` (counts of tiles to first rows), ``permute`` (token rows to
expert order), ``combine`` (and back), ``linear`` (also grouped, with its own weight gradient), ``swiglu``,
``grouped_swiglu``, ``rms_norm``, ``rotate``, ``attention``, ``policy_head`` (a policy loss straight from hidden states;
its parts are ``policy_chunks`` and ``policy_tile``); ``parameter`` (how an operation sees a cut parameter), ``check``
(shapes and types that an operation is given), ``fake`` (tensors without numbers), ``native`` (the C++ kernels of
``csrc/``) and ``cuda`` (the CUDA kernels of ``csrc/cuda/``), used where they are built, ``triton`` (Triton's, for GPUs)
and ``overview`` (what ``r1mega kernels`` prints).
"""
