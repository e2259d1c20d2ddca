"""Students of Sana that embed their guidance scale, as SanaSprintPipeline's network does."""

from functools import partial
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from typing_extensions import override

from stepfold.maths.formulations import flow_time
from stepfold.students.two_times import TargetEmbedder, told
from stepfold.teachers.contract import Condition, Student
from stepfold.teachers.sana import trigflow_network


class SanaStudent(Student):
    """A SanaTransformer2DModel that embeds its guidance scale; the adaptive weight reads the embedding too."""

    can_recompute = True
    predict = staticmethod(partial(trigflow_network, time_scale=1.0))

    def __init__(self, transformer: Any, weight_start: float = 0.0, time_part: str | None = None) -> None:
        """See `ModuleStudent`."""
        super().__init__()
        self.transformer = transformer
        config = transformer.config
        self.variance_head = nn.Linear(config.num_attention_heads * config.attention_head_dim, 1)
        nn.init.zeros_(self.variance_head.weight)
        nn.init.constant_(self.variance_head.bias, weight_start)
        self.target_embedder = TargetEmbedder(transformer, time_part) if time_part is not None else None
        self.reads_target = time_part is not None

    @override
    def forward(
        self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor, target: Tensor | None = None
    ) -> Tensor:
        network, embedder = self.transformer, self.target_embedder
        return told(network, embedder, target, lambda: self.predict(network, x_unit, t, condition, guidance))

    @override
    def log_variance(self, t: Tensor, guidance: Tensor, target: Tensor | None = None) -> Tensor:
        """Linear in the embedding of times and guidance, which it trains."""
        network, embedder = self.transformer, self.target_embedder
        scale, dtype = network.config.guidance_embeds_scale, self.variance_head.weight.dtype

        def embedded() -> tuple[Tensor, Tensor]:
            return network.time_embed(flow_time(t), guidance=guidance * scale, hidden_dtype=dtype)

        _, embedding = told(network, embedder, target, embedded)
        return self.variance_head(embedding).squeeze(-1)

    @override
    def freeze_guidance(self) -> None:
        """Freezes the guidance embedder. One that starts neutral stays so: a sampler may then give any scale."""
        self.transformer.time_embed.guidance_embedder.requires_grad_(False)

    @override
    def recompute_blocks(self) -> None:
        self.transformer.enable_gradient_checkpointing()


def student_transformer(teacher: Any) -> SanaTransformer2DModel:
    """A copy of the teacher's transformer that embeds its guidance scale and starts as the teacher.

    Only the last layer of the guidance embedder starts at zero: the output does not depend on guidance yet, but its
    gradient does, so it learns.
    """
    config = {key: value for key, value in teacher.config.items() if key != "_use_default_values"}  # else they win
    student: Any = SanaTransformer2DModel.from_config(config | {"guidance_embeds": True, "timestep_scale": 1.0})
    weights = {
        name.replace("time_embed.emb.timestep_embedder.", "time_embed.timestep_embedder."): value
        for name, value in teacher.state_dict().items()
    }
    missing, unexpected = student.load_state_dict(weights, strict=False)
    allowed = "time_embed.guidance_embedder."
    if unexpected or any(not name.startswith(allowed) for name in missing):
        raise AssertionError(f"student and teacher do not match: missing {missing}, unexpected {unexpected}")
    if not teacher.config.guidance_embeds:
        last = student.time_embed.guidance_embedder.linear_2
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return student


def plain_transformer(student: Any, guidance: float, timestep_scale: float) -> SanaTransformer2DModel:
    """A copy of a student's transformer for SanaPipeline, which tells it no guidance scale.

    The scale's embedding is added to the time's, so for one scale it is a bias of the time embedder's last layer.

    Args:
        student: embeds its guidance scale, and reads times in [0, 1].
        guidance: the scale that the copy stands for.
        timestep_scale: what takes the pipeline's timesteps to [0, 1].
    """
    config = {key: value for key, value in student.config.items() if key != "_use_default_values"}
    plain: Any = SanaTransformer2DModel.from_config(
        config | {"guidance_embeds": False, "timestep_scale": timestep_scale}
    )
    embedder = student.time_embed.guidance_embedder
    dtype, device = embedder.linear_1.weight.dtype, embedder.linear_1.weight.device
    scale = torch.tensor([guidance * student.config.guidance_embeds_scale], device=device)
    with torch.no_grad():
        embedding = embedder(student.time_embed.guidance_condition_proj(scale).to(dtype))[0]
    weights = {
        name.replace("time_embed.timestep_embedder.", "time_embed.emb.timestep_embedder."): value
        for name, value in student.state_dict().items()
        if not name.startswith("time_embed.guidance_embedder.")
    }
    bias = "time_embed.emb.timestep_embedder.linear_2.bias"
    plain.load_state_dict(weights | {bias: weights[bias] + embedding})
    return plain
