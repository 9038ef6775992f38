"""Our operators: each with a float32-math reference here, and kernels in csrc/ where they are built."""

from sorahpc.ops._library import backend, use_reference
from sorahpc.ops.embed import add_sincos3d, sincos3d, timestep_embedding
from sorahpc.ops.flow_patchify import flow_patchify, noise
from sorahpc.ops.modulate import gated_residual, modulate
from sorahpc.ops.pack import positions3d
from sorahpc.ops.patchify import patchify, unpatchify
from sorahpc.ops.rope import qk_norm_rope3d, rope3d

__all__ = [
    "add_sincos3d",
    "backend",
    "flow_patchify",
    "gated_residual",
    "modulate",
    "noise",
    "patchify",
    "positions3d",
    "qk_norm_rope3d",
    "rope3d",
    "sincos3d",
    "timestep_embedding",
    "unpatchify",
    "use_reference",
]
