"""The Diffusion Transformer (Peebles and Xie 2023) over a pack of spacetime patches, split by tensor and sequence.

    patch embed -> depth x [ adaLN-Zero self-attention with per-head RMS norm of q, k and 3D RoPE
                           ; cross-attention to the text ; adaLN-Zero MLP ] -> final adaLN -> linear

Shape letters: L tokens of the pack, l tokens on this rank (L/tp under sequence parallelism, else L), S samples,
Lt text tokens, M model dim, N heads, n heads on this rank, D head dim, P patch volume x channels.

Tensor-parallel rules, each with a gradient-parity test: linears between heads or hidden units are split; embedders,
adaLN and the last layer are replicated, work on this rank's tokens, and are marked so that their gradients are summed;
the text is replicated; the output is gathered with a backward that does not sum the copies of the loss.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from sorahpc import ops
from sorahpc.config import ModelConfig
from sorahpc.distributed import checkpoint, megatron
from sorahpc.distributed.mesh import Mesh
from sorahpc.errors import CheckpointError
from sorahpc.models.attention import pack_attention

TIMESTEP_DIM = 256  # dims of the sinusoid in front of the timestep MLP, as in DiT


class Attention(nn.Module):
    """Multi-head attention with per-head RMS norm of q and k. Self-attention, or to a replicated text."""

    def __init__(self, model: ModelConfig, config: object, mesh: Mesh, *, cross: bool) -> None:
        super().__init__()
        self.cross, self.head_dim, self.eps = cross, model.head_dim, model.norm_eps
        if cross:
            self.linear_q = megatron.column_linear(config, mesh, model.dim, model.dim)
            self.linear_kv = megatron.column_linear(
                config, mesh, model.dim, 2 * model.dim, parts=2, replicated_input=True
            )
        else:
            self.linear_qkv = megatron.column_linear(config, mesh, model.dim, 3 * model.dim, parts=3)
        # Megatron knows these by name: replicated over tp, but fed by local heads only, so their gradients are summed.
        self.q_layernorm = nn.RMSNorm(model.head_dim, eps=model.norm_eps)
        self.k_layernorm = nn.RMSNorm(model.head_dim, eps=model.norm_eps)
        # Zero at first, so that a block starts as the identity also where no gate guards it.
        self.linear_proj = megatron.row_linear(config, mesh, model.dim, model.dim, zero=cross)

    def forward(self, x: Tensor, pack: Pack, text: Tensor | None = None) -> Tensor:
        """x [l, M], text [Lt, M] -> [l, M]."""
        # The fused projections lie head by head, (q, k, v) of a head together, so that a split keeps heads whole.
        if self.cross:
            q = self.linear_q(x)[0].unflatten(-1, (-1, self.head_dim))  # [L, n, D]
            k, v = self.linear_kv(text)[0].unflatten(-1, (-1, 2, self.head_dim)).unbind(2)  # [Lt, n, D]
        else:
            q, k, v = self.linear_qkv(x)[0].unflatten(-1, (-1, 3, self.head_dim)).unbind(2)  # [L, n, D]
        q_norm, k_norm = self.q_layernorm, self.k_layernorm
        if self.cross or pack.rope is None:
            q, k = q_norm(q), k_norm(k)
        else:
            q, k = ops.qk_norm_rope3d(q, k, q_norm.weight, k_norm.weight, pack.grids, *pack.rope, eps=self.eps)
        out = pack_attention(q, k, v, pack.lens, pack.text_lens if self.cross else pack.lens)  # [L, n, D]
        return self.linear_proj(out.flatten(1))[0]


class Mlp(nn.Module):
    def __init__(self, model: ModelConfig, config: object, mesh: Mesh) -> None:
        super().__init__()
        hidden = model.mlp_dim
        self.linear_fc1 = megatron.column_linear(config, mesh, model.dim, hidden)
        self.linear_fc2 = megatron.row_linear(config, mesh, hidden, model.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x)[0], approximate="tanh"))[0]


class Block(nn.Module):
    """One layer; starts as the identity: gates and the cross-attention's projection are zero."""

    def __init__(self, model: ModelConfig, config: object, mesh: Mesh) -> None:
        super().__init__()
        self.eps = model.norm_eps
        self.self_attention = Attention(model, config, mesh, cross=False)
        self.cross_attention = Attention(model, config, mesh, cross=True)
        self.mlp = Mlp(model, config, mesh)
        self.ada_ln = megatron.replicated(_zeroed(nn.Linear(model.dim, 6 * model.dim)), mesh)

    def forward(
        self, x: Tensor, branch: Tensor | None, gate: Tensor | None, c: Tensor, text: Tensor, pack: Pack
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [l, M], the last block's branch [l, M] and its gate [S, M], c [S, M] activated condition, text [Lt, M].

        Each residual is added by whoever normalises next, in one pass over memory in place of two, so what this block
        adds last is handed on: returns x, branch, gate.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada_ln(c).chunk(6, dim=-1)  # [S, M] each
        lens, eps = pack.local_lens, self.eps
        if branch is None:
            normed = ops.modulate(x, shift1, scale1, lens, eps)
        else:
            x, normed = ops.residual_norm(x, branch, lens, gate, shift1, scale1, eps)
        x, normed = ops.residual_norm(x, self.self_attention(normed, pack), lens, gate1, eps=eps)
        x, normed = ops.residual_norm(x, self.cross_attention(normed, pack, text), lens, None, shift2, scale2, eps)
        return x, self.mlp(normed), gate2


class Clip(nn.Module):
    """CLIP's part of the condition: its tokens go to cross-attention beside T5's, its pooled embedding to the
    modulation, as in Stable Diffusion 3 (arXiv 2403.03206) and FLUX."""

    def __init__(self, model: ModelConfig, text_dim: int, pooled_dim: int, mesh: Mesh) -> None:
        super().__init__()
        self.text_norm = nn.RMSNorm(text_dim, eps=model.norm_eps)
        self.text_embed = _xavier(nn.Linear(text_dim, model.dim))
        self.pooled_norm = nn.RMSNorm(pooled_dim, eps=model.norm_eps)
        self.pooled_embed = nn.Sequential(nn.Linear(pooled_dim, model.dim), nn.SiLU(), nn.Linear(model.dim, model.dim))
        for layer in (self.pooled_embed[0], self.pooled_embed[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        megatron.replicated(self.pooled_norm, mesh)
        megatron.replicated(self.pooled_embed, mesh)

    def forward(self, text: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """text [Lc, text_dim] -> [Lc, M], pooled [S, pooled_dim] -> [S, M]."""
        return self.text_embed(self.text_norm(text)), self.pooled_embed(self.pooled_norm(pooled))


class Pack:
    """Lengths and grids of a pack as the layers need them; built once a forward pass."""

    def __init__(self, grids: Tensor, text_lens: list[int], model: ModelConfig, mesh: Mesh) -> None:
        self.grids, self.text_lens = grids, text_lens
        self.lens: list[int] = grids.prod(-1).tolist()
        self.rope = (model.rope_axes, model.theta) if model.position != "sincos3d" else None
        starts = torch.cumsum(torch.tensor([0, *self.lens]), 0)
        self.first = 0  # of this rank's tokens
        if mesh.sp:  # its part of each sample; zero for most
            share = int(starts[-1]) // mesh.tp_size
            self.first = mesh.tp_rank * share
            starts = (starts - self.first).clamp(0, share)
        self.local_lens = starts.diff()


class DiT(nn.Module):
    """Predicts the velocity of a pack's tokens.

    Args:
        model: sizes.
        mesh: of this process; weights are created on its device, cut for its tp rank, the same for any tp size.
        channels: of the latent.
        text_dim: of the text encoder. clip_text_dim, clip_pooled_dim: of CLIP's; 0 without it.
        dtype: of the parameters and activations (norms and modulation compute in float32).
        seed: of the initial weights.
    """

    def __init__(
        self, model: ModelConfig, mesh: Mesh, *, channels: int, text_dim: int, clip_text_dim: int = 0,
        clip_pooled_dim: int = 0, dtype: torch.dtype, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.mesh, self.channels, self.text_dim, self.dtype = model, mesh, channels, text_dim, dtype
        self.config = config = megatron.layer_config(model, mesh, dtype)
        self.patch_dim = patch_dim = channels * model.patch[0] * model.patch[1] * model.patch[2]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # every rank draws the same whole weights, and keeps its part
            self.x_embed = megatron.replicated(_xavier(nn.Linear(patch_dim, model.dim)), mesh)
            self.t_embed = nn.Sequential(nn.Linear(TIMESTEP_DIM, model.dim), nn.SiLU(), nn.Linear(model.dim, model.dim))
            for layer in (self.t_embed[0], self.t_embed[2]):
                nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            megatron.replicated(self.t_embed, mesh)
            # Encoders differ in scale by orders of magnitude; its gradients arrive whole through linear_kv.
            self.text_norm = nn.RMSNorm(text_dim, eps=model.norm_eps)
            self.text_embed = _xavier(nn.Linear(text_dim, model.dim))
            self.blocks = nn.ModuleList(Block(model, config, mesh) for _ in range(model.depth))
            self.final_ada_ln = megatron.replicated(_zeroed(nn.Linear(model.dim, 2 * model.dim)), mesh)
            self.final = megatron.replicated(_zeroed(nn.Linear(model.dim, patch_dim)), mesh)
            self.clip = Clip(model, clip_text_dim, clip_pooled_dim, mesh) if clip_text_dim else None
        self.to(device=mesh.device, dtype=dtype)

    def parts(self) -> list[tuple[str, nn.Module]]:
        """What a profile tells apart, outer before inner: a block's own time is what lies between its layers."""
        found: list[tuple[str, nn.Module]] = [
            ("patch embedding", self.x_embed),
            ("timestep embedding", self.t_embed),
            ("text embedding", self.text_embed),
            *([("CLIP embedding", self.clip)] if self.clip is not None else []),
            ("last layer", self.final),
        ]
        for block in self.blocks:
            found.append(("residuals, norms, modulation", block))
            found += [(name.replace("_", " "), layer) for name, layer in block.named_children()]
        return found

    def forward(
        self, tokens: Tensor, t: Tensor, grids: Tensor, text: Tensor, text_lens: list[int],
        clip_text: Tensor | None = None, clip_lens: list[int] | None = None, clip_pooled: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Velocity of every token.

        Args:
            tokens: [L, P] noisy patches of all samples, one after the other, the same on every tp rank.
            t: [S] timesteps in [0, 1].
            grids: int64 CPU [S, 3], patch counts; their products sum to L.
            text: [Lt, text_dim] text embeddings of all samples, one after the other.
            text_lens: text tokens a sample, at least one each.
            clip_text, clip_lens: the same of CLIP. clip_pooled: [S, clip_pooled_dim]. None where the model has no CLIP.

        Returns:
            float32 [L, P], whole on every tp rank.

        Raises:
            ValueError: lengths that don't fit together.
        """
        length = len(tokens)
        same = len(t) == len(grids) == len(text_lens)
        if not same or int(grids.prod(-1).sum()) != length or sum(text_lens) != len(text):
            raise ValueError(
                f"DiT: {length} tokens, grids of {int(grids.prod(-1).sum())}, {len(text)} text tokens, lengths of "
                f"{sum(text_lens)}; {len(t)} timesteps, {len(grids)} grids, {len(text_lens)} texts"
            )
        if (self.clip is None) != (clip_text is None or clip_lens is None or clip_pooled is None):
            raise ValueError(f"DiT: CLIP's texts: expected {'none' if self.clip is None else 'all three'}")
        if clip_text is not None and clip_lens is not None and clip_pooled is not None:
            if not len(clip_lens) == len(clip_pooled) == len(t) or sum(clip_lens) != len(clip_text):
                raise ValueError(
                    f"DiT: {len(clip_text)} CLIP tokens, lengths of {sum(clip_lens)}; {len(t)} timesteps, "
                    f"{len(clip_lens)} CLIP texts, {len(clip_pooled)} pooled"
                )
        if self.mesh.sp and (short := -length % self.mesh.tp_size):
            # Ranks hold equal shares of tokens: a dummy sample of fewer than tp tokens fills the last one.
            tokens = F.pad(tokens, (0, 0, 0, short))
            t, text, text_lens = F.pad(t, (0, 1)), F.pad(text, (0, 0, 0, 1)), [*text_lens, 1]
            grids = torch.cat((grids, torch.tensor([[1, 1, short]])))
            if clip_text is not None and clip_lens is not None and clip_pooled is not None:
                clip_text, clip_pooled = F.pad(clip_text, (0, 0, 0, 1)), F.pad(clip_pooled, (0, 0, 0, 1))
                clip_lens = [*clip_lens, 1]

        c = self.t_embed(ops.timestep_embedding(t, TIMESTEP_DIM).to(self.dtype))  # [S, M]
        text = self.text_embed(self.text_norm(text.to(self.dtype)))  # [Lt, M]
        if self.clip is not None and clip_text is not None and clip_lens is not None and clip_pooled is not None:
            tokens_too, pooled = self.clip(clip_text.to(self.dtype), clip_pooled.to(self.dtype))
            both = zip(text.split(text_lens), tokens_too.split(clip_lens), strict=True)
            text = torch.cat([part for sample in both for part in sample])
            text_lens = [a + b for a, b in zip(text_lens, clip_lens, strict=True)]
            c = c + pooled
        c = F.silu(c)
        pack = Pack(grids, text_lens, self.model, self.mesh)
        x = self.x_embed(megatron.local_tokens(tokens.to(self.dtype), self.mesh))  # [l, M]
        if self.model.position != "rope3d":
            x = ops.add_sincos3d(x, grids, self.model.theta, first=pack.first)
        branch, gate = None, None
        for block in self.blocks:
            x, branch, gate = block(x, branch, gate, c, text, pack)
        shift, scale = self.final_ada_ln(c).chunk(2, dim=-1)
        assert branch is not None
        _, x = ops.residual_norm(x, branch, pack.local_lens, gate, shift, scale, self.model.norm_eps)
        x = self.final(x)  # [l, P]
        return megatron.gather_tokens(x.float(), self.mesh)[:length]


def load_ema_for_sampling(folder: Path, local_rank: int = 0) -> tuple[DiT, checkpoint.Meta]:
    """The model of a checkpoint with its averaged weights, in eval mode, in this process alone.

    Makes a process group of one rank; `megatron.stop` leaves it. The device is the GPU where there is one (bfloat16),
    else the CPU (float32).

    Raises:
        CheckpointError: incomplete, altered, or unsafe.
    """
    mesh = megatron.start(local_rank=local_rank)
    meta = checkpoint.verify(folder, mesh)
    try:  # the other sections may be of another version: nothing of them is needed
        config = ModelConfig.model_validate(meta.config["model"])
    except (KeyError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{folder}: its section `model` is not ours: {reason}; the checkpoint is refused"
        ) from None
    dims = {"clip_text_dim": meta.clip_text_dim, "clip_pooled_dim": meta.clip_pooled_dim}
    model = DiT(config, mesh, channels=meta.channels, text_dim=meta.text_dim, dtype=torch.float32, **dims)
    checkpoint.load_ema(folder, model, mesh)
    model.dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    return model.to(model.dtype).eval().requires_grad_(False), meta


def _zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _xavier(layer: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
