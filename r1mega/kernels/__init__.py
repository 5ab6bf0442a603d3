"""Operations on tensors, one file each: no process group, no module, usable alone."""
