"""The Sana family: SanaPipeline teachers and SanaSprintPipeline students."""

import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_input, flow_time, guide, trigflow_output
from stepfold.teachers.contract import Condition, GuidanceKind, Student, concatenate
from stepfold.teachers.once import compute_once, forget

SIGMA_DATA = 0.5
NUM_FEATURES = 5  # feature maps for discriminator heads, as many as Sana-Sprint has


def trigflow_network(
    transformer: Any,
    x_unit: Tensor,
    t: Tensor,
    condition: Condition,
    guidance: Tensor | None,
    time_scale: float,
) -> Tensor:
    """F of a flow-predicting transformer (arXiv:2511.20410, Eq. 5-7).

    Args:
        transformer: predicts v = z - x_0 from x_FM at t_FM.
        x_unit: x / sigma_data [B, C, H, W].
        t: [B], in [0, pi/2].
        condition: B rows.
        guidance: scales [B] for a network that embeds them, else None.
        time_scale: what the transformer's own time counts to: 1 or 1000.

    Returns:
        F [B, C, H, W].
    """
    t_flow = flow_time(t)
    x_flow = flow_input(x_unit, t, 1.0)
    embedded = None if guidance is None else guidance * transformer.config.guidance_embeds_scale
    velocity = transformer(
        x_flow,
        encoder_hidden_states=condition.embeds,
        encoder_attention_mask=condition.mask,
        timestep=t_flow * time_scale,
        guidance=embedded,
        return_dict=False,
    )[0]
    return trigflow_output(x_flow, t_flow, velocity)


class SanaStudent(Student):
    """A SanaTransformer2DModel that embeds its guidance scale, with a head for the adaptive weight."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self.variance_head = nn.Linear(
            transformer.config.num_attention_heads * transformer.config.attention_head_dim, 1
        )
        nn.init.zeros_(self.variance_head.weight)
        nn.init.zeros_(self.variance_head.bias)

    def forward(self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        """See `Student`."""
        return trigflow_network(self.transformer, x_unit, t, condition, guidance, 1.0)

    def log_variance(self, t: Tensor, guidance: Tensor) -> Tensor:
        """See `Student`; it reads the time and guidance embedding, and trains it."""
        scale = self.transformer.config.guidance_embeds_scale
        dtype = self.variance_head.weight.dtype
        _, embedding = self.transformer.time_embed(flow_time(t), guidance=guidance * scale, hidden_dtype=dtype)
        return self.variance_head(embedding).squeeze(-1)

    def freeze_guidance(self) -> None:
        """See `Student`; an embedder that starts neutral stays so: a sampler may then say any scale."""
        self.transformer.time_embed.guidance_embedder.requires_grad_(False)

    def recompute_blocks(self) -> None:
        """See `Student`; diffusers' gradient checkpointing."""
        self.transformer.enable_gradient_checkpointing()


def of_the_prompt_alone(transformer: Any) -> list[nn.Module]:
    """The parts whose input is the prompt's: no time and no latent."""
    parts = [transformer.caption_projection, transformer.caption_norm]
    for block in transformer.transformer_blocks:
        attention = block.attn2
        parts += [part for part in (attention.to_k, attention.to_v, attention.norm_k) if part is not None]
    return parts


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


class SanaTeacher:
    """A SanaPipeline (or SanaSprintPipeline) folder or hub id as a TrigFlow teacher. See `contract.Teacher`."""

    def __init__(
        self,
        source: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        height: int | None = None,
        width: int | None = None,
        max_tokens: int = 300,
        null_mask: Literal["own", "prompt"] = "own",
        guidance_kind: GuidanceKind | Literal["auto"] = "auto",
        network_only: bool = False,
        null: Condition | None = None,
    ) -> None:
        """`network_only` leaves text encoder and VAE for when they are needed; it takes the unconditional `null`."""
        self.source, self.device, self.dtype = str(source), torch.device(device), dtype
        self.pipe: Any = load_pipeline(self.source, dtype, network_only)
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer: Any = self.pipe.transformer.to(self.device).eval().requires_grad_(False)
        compute_once(of_the_prompt_alone(self.transformer))
        config = self.transformer.config
        self.sigma_data = SIGMA_DATA
        embeds: GuidanceKind = "embedded" if config.guidance_embeds else "classifier_free"
        self.guidance_kind: GuidanceKind = embeds if guidance_kind == "auto" else guidance_kind
        if (self.guidance_kind == "embedded") != config.guidance_embeds:
            raise UserError(
                f"teacher guidance is {guidance_kind!r}, but this network calls for {embeds!r}; leave it at 'auto'"
            )
        self.default_guidance = float(inspect.signature(self.pipe.__call__).parameters["guidance_scale"].default)
        vae: Any = AutoencoderDC.load_config(self.source, subfolder="vae")
        factor = 2 ** (len(vae["encoder_block_out_channels"]) - 1)  # as the pipelines reckon it from a loaded VAE
        self.height, self.width = height or config.sample_size * factor, width or config.sample_size * factor
        for name, side in (("height", self.height), ("width", self.width)):
            if side % math.lcm(factor, 32):  # the pipelines themselves insist on 32
                raise UserError(f"{name} is {side}, but this pipeline needs a multiple of {math.lcm(factor, 32)}")
        self.latent_shape = (config.in_channels, self.height // factor, self.width // factor)
        # SanaPipeline multiplies the scheduler's 0..1000 by timestep_scale; SanaSprintPipeline passes 0..1 as it is.
        self.time_scale = 1.0 if isinstance(self.pipe, SanaSprintPipeline) else 1000.0 * config.timestep_scale
        schedule = self.pipe.scheduler.config
        self.shift = float(schedule.get("shift", schedule.get("flow_shift", 1.0)))
        blocks = self.transformer.transformer_blocks
        count = min(NUM_FEATURES, len(blocks))
        self.feature_blocks = [blocks[(i + 1) * len(blocks) // count - 1] for i in range(count)]
        self.feature_widths = (config.num_attention_heads * config.attention_head_dim,) * count
        self.max_tokens, self.null_mask = max_tokens, null_mask
        self._null = self._null_trimmed = None
        self._both: tuple[Condition, Condition] | None = None  # a condition, and it with the unconditional one before
        if self.guidance_kind == "classifier_free":
            self._null = null.to(self.device, dtype) if null else self._encode([""], instruct=False)
            self._null_trimmed = self._null.trimmed()

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], instruct: bool) -> Condition:
        instruction = inspect.signature(self.pipe.__call__).parameters["complex_human_instruction"].default
        options = {"do_classifier_free_guidance": False} if isinstance(self.pipe, SanaPipeline) else {}
        self._load_text_encoder()
        encode_prompt: Any = self.pipe.encode_prompt
        embeds, mask, *_ = encode_prompt(
            list(prompts),
            device=self.device,
            max_sequence_length=self.max_tokens,
            complex_human_instruction=instruction if instruct else None,
            **options,
        )
        return Condition(embeds.to(self.dtype), mask)

    def _load_text_encoder(self) -> None:
        if self.pipe.text_encoder is None:
            name = DiffusionPipeline.load_config(self.source)["text_encoder"][1]  # type: ignore[index]
            self.pipe.text_encoder = getattr(transformers, name).from_pretrained(
                self.source, subfolder="text_encoder", use_safetensors=True, dtype=self.dtype
            )
        self.pipe.text_encoder.to(self.device).eval().requires_grad_(False)

    @property
    def null_condition(self) -> Condition | None:
        """The unconditional branch's condition, one row, untrimmed; None for teachers without such a branch."""
        return self._null

    def encode(self, prompts: Sequence[str]) -> Condition:
        """See `Teacher`. Prompts get the pipeline's default instruction, as in use."""
        return self._encode(prompts, instruct=True).trimmed()

    def park_text_encoder(self) -> None:
        """See `Teacher`."""
        if self.pipe.text_encoder is not None:
            self.pipe.text_encoder.to("cpu")

    def forget_prompts(self) -> None:
        """See `Teacher`."""
        self._both = None
        forget(of_the_prompt_alone(self.transformer))

    def null(self, like: Condition) -> Condition:
        """The unconditional branch's condition for each row of `like`.

        With `null_mask="own"` it is masked by its own length, as diffusers' pipelines do; with `"prompt"` by the
        prompt's mask, as the public training code does.
        """
        assert self._null is not None and self._null_trimmed is not None
        if self.null_mask == "prompt":
            length = like.mask.shape[1]
            return Condition(self._null.embeds[:, :length].expand(len(like), -1, -1), like.mask)
        null = self._null_trimmed
        return Condition(null.embeds.expand(len(like), -1, -1), null.mask.expand(len(like), -1))

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        """See `Teacher`. Both branches of classifier-free guidance go through the network as one batch."""
        x_unit = x / self.sigma_data
        if self.guidance_kind == "embedded":
            F = trigflow_network(self.transformer, x_unit, t, condition, guidance, self.time_scale)
        elif self.guidance_kind == "none":
            F = trigflow_network(self.transformer, x_unit, t, condition, None, self.time_scale)
        else:
            if self._both is None or self._both[0] is not condition:
                self._both = (condition, concatenate([self.null(condition), condition]))
            both = self._both[1]
            F = trigflow_network(
                self.transformer, torch.cat([x_unit, x_unit]), torch.cat([t, t]), both, None, self.time_scale
            )
            unguided, guided = F.chunk(2)
            F = guide(unguided, guided, guidance)
        return (self.sigma_data * F).to(x.dtype)

    def features(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> list[Tensor]:
        """See `Teacher`. The outputs of evenly spaced blocks, without classifier-free guidance."""
        maps: list[Tensor] = []
        handles = [
            block.register_forward_hook(lambda _, args, output: maps.append(output)) for block in self.feature_blocks
        ]
        try:
            scales = guidance if self.guidance_kind == "embedded" else None
            trigflow_network(self.transformer, x / self.sigma_data, t, condition, scales, self.time_scale)
        finally:
            for handle in handles:
                handle.remove()
        return maps

    def _vae(self) -> Any:
        if self.pipe.vae is None:
            self.pipe.vae = AutoencoderDC.from_pretrained(
                self.source, subfolder="vae", use_safetensors=True, dtype=self.dtype
            )
        vae: Any = self.pipe.vae
        return vae.to(self.device).eval().requires_grad_(False)

    def release_decoder(self) -> None:
        """See `Teacher`."""
        self.pipe.vae = None

    @torch.no_grad()
    def decode(self, x0: Tensor, batch: int = 64) -> Tensor:
        """See `Teacher`."""
        vae = self._vae()
        parts = (
            vae.decode((part / self.sigma_data).to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
            for part in x0.split(batch)
        )
        return torch.cat([(part.float() / 2 + 0.5).clamp(0, 1) for part in parts])

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """See `Teacher`."""
        vae = self._vae()
        encoded = vae.encode((2 * pictures - 1).to(self.device, vae.dtype), return_dict=False)[0]
        return self.sigma_data * (encoded * vae.config.scaling_factor).float()

    def black_latent(self) -> Tensor:
        """See `Teacher`."""
        return self.encode_pictures(torch.zeros(1, 3, self.height, self.width))[0] / self.sigma_data

    def new_student(self) -> SanaStudent:
        """See `Teacher`."""
        if not math.isclose(self.time_scale, 1.0):
            raise UserError(
                f"this teacher's time counts to {self.time_scale:g}, and SanaSprintPipeline students need 1; "
                "use a teacher re-timed to [0, 1] (transformer config timestep_scale 0.001)"
            )
        student = SanaStudent(student_transformer(self.transformer))
        # Where w_phi settles for a tangent of unit norm: starting there, the weight's own gradient does not swamp the
        # time embedding's while w_phi climbs.
        nn.init.constant_(student.variance_head.bias, -math.log(math.prod(self.latent_shape)))
        return student.to(self.device)

    def save_student(self, student: Student, folder: Path) -> None:
        """See `Teacher`: a SanaSprintPipeline with the teacher's own encoder and autoencoder."""
        assert isinstance(student, SanaStudent)
        self._vae()
        self._load_text_encoder()
        parts: Any = dict(
            tokenizer=self.pipe.tokenizer,
            text_encoder=self.pipe.text_encoder,
            vae=self.pipe.vae,
            transformer=student.transformer,
            scheduler=SCMScheduler(prediction_type="trigflow", sigma_data=self.sigma_data),
        )
        SanaSprintPipeline(**parts).save_pretrained(folder, safe_serialization=True)


def load_pipeline(source: str, dtype: torch.dtype, network_only: bool) -> SanaPipeline | SanaSprintPipeline:
    """Loads a Sana pipeline from a folder or a hub id, all or without text encoder and VAE; safetensors only.

    Raises:
        UserError: the folder is not a whole Sana pipeline.
    """
    folder = Path(source)
    if folder.exists():
        check_folder(folder)
    try:
        config: Any = DiffusionPipeline.load_config(source)
    except OSError as error:
        raise UserError(
            f"teacher {source!r} is neither a pipeline folder nor a hub id that can be reached: {_first_line(error)}"
        ) from None
    names = {"SanaPipeline": SanaPipeline, "SanaSprintPipeline": SanaSprintPipeline}
    name = config.get("_class_name")
    if name not in names:
        raise UserError(f"teacher {source!r} is a {name}; this version distils {' and '.join(names)}")
    try:
        parts: dict[str, Any] = {"text_encoder": None, "vae": None} if network_only else {}
        return names[name].from_pretrained(source, dtype=dtype, use_safetensors=True, **parts)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"teacher {source!r} does not load: {_first_line(error)}; save it again with save_pretrained"
        ) from None


def check_folder(folder: Path) -> None:
    """Refuses a pipeline folder with a missing part or a file that could execute code when loaded."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"teacher folder {str(folder)!r} has no model_index.json; give a folder written by save_pretrained"
        )
    for path in folder.rglob("*"):
        if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}:
            raise UserError(
                f"teacher folder holds a pickle, {path.relative_to(folder)}, which could run code; "
                "convert it with save_pretrained(..., safe_serialization=True)"
            )
    try:
        parts = json.loads(index.read_text())
    except ValueError as error:
        raise UserError(f"{index} is not valid JSON ({error}); save the pipeline again with save_pretrained") from None
    if not isinstance(parts, dict):
        raise UserError(f"{index} describes no pipeline; save the pipeline again with save_pretrained")
    for part, spec in parts.items():
        present = isinstance(spec, list) and len(spec) == 2 and spec[0] is not None
        if present and not part.startswith("_") and not (folder / part).is_dir():
            raise UserError(f"teacher folder {str(folder)!r} lacks its part {part!r}; copy the whole pipeline folder")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
