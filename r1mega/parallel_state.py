"""Which rank works with which: :class:`Layout` (arithmetic) and :class:`ParallelState` (live process groups).

The world is cut twice, the same way Megatron cuts it ("parallel folding"), innermost first::

    dense layers    world = tp  x cp x dp  x pp
    experts         world = etp x ep x edp x pp

A pipeline stage holds the same ranks in both cuts. ``Layout`` needs no torch; ``ParallelState`` imports it when it
is built. Nothing here is global: whoever needs a group is handed the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from r1mega.config import ConfigError, ParallelConfig, divisors, require

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp", "pp")
COMBINED_GROUPS = {
    "dp_cp": ("dp", "cp"),
    "tp_cp": ("tp", "cp"),
    "tp_dp_cp": ("tp", "dp", "cp"),
    "tp_pp": ("tp", "pp"),
    "etp_ep": ("etp", "ep"),
    "etp_ep_pp": ("etp", "ep", "pp"),
}
GROUP_NAMES = ("tp", "cp", "dp", "pp", "ep", "etp", "edp", *COMBINED_GROUPS)


@dataclass(frozen=True)
class Layout:
    """A cut of ``world_size`` ranks. Raises :class:`ConfigError` where the sizes do not fit together.

    Args:
        world_size: number of processes.
        tp: tensor parallel size of the dense layers.
        pp: pipeline parallel size.
        cp: context parallel size.
        ep: expert parallel size.
        etp: tensor parallel size inside an expert.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        require(self.world_size >= 1, "world_size", self.world_size, "must be 1 or more")
        for name in ("tp", "pp", "cp", "ep", "etp"):
            require(getattr(self, name) >= 1, f"parallel.{name}", getattr(self, name), "must be 1 or more")
        self._require_divides("pp", "tp", "cp")
        self._require_divides("pp", "etp", "ep")

    def _require_divides(self, *names: str) -> None:
        """The product of the sizes must divide the world; the first size that does not fit is named."""
        rest = self.world_size
        for name in names:
            size = getattr(self, name)
            if rest % size:
                others = " x ".join(f"{n}={getattr(self, n)}" for n in names[: names.index(name)])
                left = f" / ({others}) = {rest}" if others else ""
                raise ConfigError(
                    f"parallel.{name}={size}: must divide the number of processes, {self.world_size}{left}; "
                    f"try {divisors(rest)}"
                )
            rest //= size

    @classmethod
    def from_config(cls, config: ParallelConfig, world_size: int) -> Layout:
        return cls(world_size, tp=config.tp, pp=config.pp, cp=config.cp, ep=config.ep, etp=config.etp)

    @property
    def dp(self) -> int:
        """Data parallel size of the dense layers."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data parallel size of the experts: how many copies of each expert there are."""
        return self.world_size // (self.etp * self.ep * self.pp)

    def size(self, name: str) -> int:
        """Number of ranks in a group called ``name``."""
        return prod(getattr(self, axis) for axis in _axes_of(name))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where ``rank`` stands on each axis: ``{"tp": 0, "cp": 0, "dp": 1, "pp": 0, "etp": 0, "ep": 1, "edp": 0}``."""
        require(0 <= rank < self.world_size, "rank", rank, f"must be between 0 and {self.world_size - 1}")
        found = {}
        for axes in (DENSE_AXES, EXPERT_AXES):
            rest = rank
            for axis in axes:
                rest, found[axis] = divmod(rest, getattr(self, axis))
        return found

    def groups(self, name: str) -> list[list[int]]:
        """All groups called ``name``: ranks that differ on the axes of ``name`` only, ascending.

        Args:
            name: an axis (``tp cp dp pp ep etp edp``) or one of ``dp_cp tp_cp tp_dp_cp tp_pp etp_ep etp_ep_pp``.
        """
        axes = _axes_of(name)
        cut = EXPERT_AXES if any(axis in ("etp", "ep", "edp") for axis in axes) else DENSE_AXES
        fixed = [axis for axis in cut if axis not in axes]
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            coordinates = self.coordinates(rank)
            found.setdefault(tuple(coordinates[axis] for axis in fixed), []).append(rank)
        return list(found.values())


def _axes_of(name: str) -> tuple[str, ...]:
    require(name in GROUP_NAMES, "group", name, f"must be one of {', '.join(GROUP_NAMES)}")
    return COMBINED_GROUPS.get(name, (name,))


class ParallelState:
    """The process groups of one rank, made once and handed down.

    Needs an initialised ``torch.distributed`` whose world has ``layout.world_size`` ranks; building it is a
    collective call. The two cuts are two device meshes, outermost axis first: ``mesh`` has the axes
    ``("pp", "dp", "cp", "tp")``, ``expert_mesh`` has ``("pp", "edp", "ep", "etp")``.

    Args:
        layout: the cut.
        device: where the tensors of this rank live; its type decides the meshes' device type.
    """

    def __init__(self, layout: Layout, device: torch.device | None = None) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        require(
            dist.get_world_size() == layout.world_size,
            "world_size",
            layout.world_size,
            f"torch.distributed has {dist.get_world_size()} processes",
        )
        self.layout = layout
        self.rank = dist.get_rank()
        self.device = device or torch.device("cpu")
        self.mesh: DeviceMesh
        self.expert_mesh: DeviceMesh
        for attribute, axes in (("mesh", DENSE_AXES), ("expert_mesh", EXPERT_AXES)):
            shape = tuple(getattr(layout, axis) for axis in reversed(axes))
            setattr(self, attribute, init_device_mesh(self.device.type, shape, mesh_dim_names=tuple(reversed(axes))))
        self._combined: dict[str, ProcessGroup] = {}

    @classmethod
    def single_process(cls, device: torch.device | None = None) -> ParallelState:
        """A world of one process; ``torch.distributed`` is initialised for it unless it is already."""
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return cls(Layout(1), device)

    @cached_property
    def coordinates(self) -> dict[str, int]:
        """Where this rank stands on each axis."""
        return self.layout.coordinates(self.rank)

    def size(self, name: str) -> int:
        """Number of ranks in this rank's group ``name``."""
        return self.layout.size(name)

    def rank_in(self, name: str) -> int:
        """Position of this rank in its group ``name``."""
        if name in COMBINED_GROUPS:
            return self.ranks(name).index(self.rank)
        return self.coordinates[name]

    def ranks(self, name: str) -> list[int]:
        """Global ranks of this rank's group ``name``."""
        return next(ranks for ranks in self.layout.groups(name) if self.rank in ranks)

    def group(self, name: str) -> ProcessGroup:
        """This rank's process group ``name``. A combined group is made at its first use, which is a collective call."""
        import torch.distributed as dist

        if name in DENSE_AXES:
            return self.mesh.get_group(name)
        if name in EXPERT_AXES:
            return self.expert_mesh.get_group(name)
        if name not in self._combined:
            self._combined[name], _ = dist.new_subgroups_by_enumeration(self.layout.groups(name))
        return self._combined[name]
