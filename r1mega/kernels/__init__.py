"""Operations on tensors, one file each: no process group, no module, usable alone.

``linear`` (also grouped, with its own weight gradient), ``swiglu``, ``rms_norm``, ``attention``, ``permute`` (token
rows to routed rows and back), ``parameter`` (how an operation sees a cut parameter).
"""
