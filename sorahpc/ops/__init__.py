"""Our operators: each with a float32-math reference here, and kernels in csrc/ where they are built."""

from sorahpc.ops.embed import sincos3d, timestep_embedding
from sorahpc.ops.modulate import gated_residual, modulate
from sorahpc.ops.rope import positions3d, rope3d

__all__ = ["gated_residual", "modulate", "positions3d", "rope3d", "sincos3d", "timestep_embedding"]
