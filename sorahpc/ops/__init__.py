"""Our operators: each with a float32-math reference here, and kernels in csrc/ where they are built."""

from sorahpc.ops._library import backend, chosen, use_reference
from sorahpc.ops.embed import add_sincos3d, sincos3d, timestep_embedding
from sorahpc.ops.flow_patchify import flow_patchify, noise
from sorahpc.ops.modulate import modulate, residual_norm
from sorahpc.ops.pack import positions3d
from sorahpc.ops.patchify import patchify, unpatchify
from sorahpc.ops.rope import qk_norm_rope3d, rope3d
from sorahpc.ops.stream_copy import stream_copy

__all__ = [
    "add_sincos3d",
    "backend",
    "chosen",
    "flow_patchify",
    "modulate",
    "noise",
    "patchify",
    "positions3d",
    "qk_norm_rope3d",
    "residual_norm",
    "rope3d",
    "sincos3d",
    "stream_copy",
    "timestep_embedding",
    "unpatchify",
    "use_reference",
]
