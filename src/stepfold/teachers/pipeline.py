"""What families of diffusers pipelines share as teachers; a family adds how network and encoders are called."""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from stepfold.errors import UserError, first_line
from stepfold.maths.formulations import flow_time, guide
from stepfold.maths.routes import even_flow_times, few_step_times
from stepfold.teachers.contract import Condition, GuidanceKind, SamplerName, concatenate
from stepfold.teachers.folders import load_index, load_network, load_pipeline, merge_lora
from stepfold.teachers.once import compute_once, forget
from stepfold.teachers.schedules import Schedule, flow_shift, read_flow

SIGMA_DATA = 0.5
DECODED_AT_ONCE = 512 * 512  # pixels
NUM_FEATURES = 5  # feature maps for discriminator heads

Predict = Callable[[Any, Tensor, Tensor, Condition, Tensor | None], Tensor]
"""(network, x / sigma_data [B, ...], t [B], condition, guidance scales [B] for a network that embeds them) -> F."""


def in_precision(predict: Predict, dtype: torch.dtype) -> Predict:
    """For a network of weights in half precision: the call runs under autocast, times and states stay as they are."""
    return (
        predict if dtype in (torch.float32, torch.float64) else partial(_under_autocast, predict=predict, dtype=dtype)
    )


def _under_autocast(
    network: Any,
    x_unit: Tensor,
    t: Tensor,
    condition: Condition,
    guidance: Tensor | None,
    *,
    predict: Predict,
    dtype: torch.dtype,
) -> Tensor:
    with torch.autocast(x_unit.device.type, dtype):
        return predict(network, x_unit, t, condition, guidance)


class PipelineTeacher:
    """A diffusers pipeline, from a folder or a hub id, as a TrigFlow teacher. See `contract.Teacher`.

    A family sets the first two and says the rest in its methods.

    Attributes:
        pipelines: classes that the family can load.
        network_part: name of the network's part in the pipeline.
        even_ladder: the pipeline's own sampler walks noise levels 1, 1 - 1/n, ..., 1/n.
        output: where the pipeline's result has what it made.
        loads_lora: whether the pipeline loads LoRAs.
        lora_blocks: parts of the names of the blocks that a LoRA is for.
        frames: of a video; 1 where the pipeline makes pictures.
        transformer: the network: a transformer, or a UNet.
    """

    pipelines: ClassVar[tuple[type, ...]] = ()
    network_part: ClassVar[str] = "transformer"
    even_ladder: bool = False
    output: ClassVar[Literal["images", "frames"]] = "images"
    loads_lora: ClassVar[bool] = True
    lora_blocks: ClassVar[tuple[str, ...]] = ("block",)
    ode: Literal["flow", "trigflow"] = "flow"
    start_time: float = math.pi / 2

    def __init__(
        self,
        source: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        height: int | None = None,
        width: int | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        frames: int | None = None,
        max_tokens: int | None = None,
        null_mask: Literal["own", "prompt"] = "own",
        guidance_kind: GuidanceKind | Literal["auto"] = "auto",
        network_only: bool = False,
        null: Condition | None = None,
        lora: str | None = None,
        variant: str | None = None,
    ) -> None:
        """`network_only` leaves text encoders and VAE for when they are needed; it takes the unconditional `null`.

        Raises:
            UserError: the folder is not whole, or the network cannot do what is asked for.
        """
        self.source, self.device, self.dtype, self.variant = str(source), torch.device(device), dtype, variant
        self.work_dtype = torch.promote_types(dtype, torch.float32)  # of conditions, and of weights that are trained
        self.sigma_data = SIGMA_DATA
        self.index = load_index(self.source)
        self.check_index()
        self.pipe: Any = load_pipeline(self.source, self.index, self.pipelines, dtype, network_only, variant)
        if lora and not self.loads_lora:
            raise UserError(f"{type(self.pipe).__name__} loads no LoRA; give a teacher with it merged, as a folder")
        if lora:
            merge_lora(self.pipe, lora, self._read_text_encoders)
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer: Any = getattr(self.pipe, self.network_part).to(self.device).eval().requires_grad_(False)
        compute_once(self.of_the_prompt_alone())
        kinds = self.guidance_kinds()
        self.guidance_kind: GuidanceKind = kinds[0] if guidance_kind == "auto" else guidance_kind
        if self.guidance_kind not in kinds:
            raise UserError(
                f"teacher guidance is {guidance_kind!r}, but this network calls for {' or '.join(map(repr, kinds))}; "
                "leave it at 'auto'"
            )
        defaults = inspect.signature(self.pipe.__call__).parameters
        self.default_guidance = float(defaults["guidance_scale"].default)
        self.takes_length = "max_sequence_length" in defaults
        self.max_tokens = self.usual_tokens() if max_tokens is None else max_tokens
        self.null_mask = null_mask

        vae: Any = self._vae_class().load_config(self.source, subfolder="vae")
        self.factor = self.pixels_a_latent(vae)
        usual_height, usual_width = self.geometry(self.factor)[2:]
        self.height, self.width = height or usual_height, width or usual_width
        self.frames, self.latent_frames = self.time_axis(frames, vae)
        self.latent_shape = self.shape_at(self.height, self.width)
        self.latent_shapes = tuple(self.shape_at(*size) for size in sizes or [(self.height, self.width)])
        self.schedule = self.read_schedule()
        self.shift = flow_shift(self.pipe.scheduler, self.tokens_for_shift())
        self.plain_predict = self.predictor()
        self.predict = in_precision(self.plain_predict, dtype)

        parts = self.feature_parts()
        count = min(NUM_FEATURES, len(parts))
        chosen = [parts[(i + 1) * len(parts) // count - 1] for i in range(count)]
        self.feature_blocks, self.feature_widths = [part for part, _ in chosen], tuple(width for _, width in chosen)

        self._null = self._null_trimmed = None
        self._both: tuple[Condition, Condition] | None = None  # a condition, and it with the unconditional one before
        if self.guidance_kind == "classifier_free":
            self._null = null.to(self.device, self.work_dtype) if null else self._encode_null()
            self._null_trimmed = self._null.trimmed()

    # What a family says.

    @classmethod
    def time_scale_of(cls, pipeline: str, network: Mapping[str, Any], schedule: Mapping[str, Any]) -> float:
        """What the network's own time counts to: 1 or 1000.

        Args:
            pipeline: the name of the pipeline's class.
            network: the network's config.
            schedule: the scheduler's.
        """
        return float(schedule.get("num_train_timesteps", 1000))

    @property
    def time_scale(self) -> float:
        """What this network's own time counts to."""
        return self.time_scale_of(type(self.pipe).__name__, self.transformer.config, self.pipe.scheduler.config)

    def check_index(self) -> None:
        """Refuses, before it is loaded, a pipeline whose model_index.json says that the family does not understand it.

        Raises:
            UserError: what it is, and what would do.
        """

    def predictor(self) -> Predict:
        """How the network is called: a plain function, or a partial of one."""
        raise NotImplementedError

    def time_embedder(self, network: Any) -> Any:
        """Of a network like the teacher's, the part with `time_proj` and `timestep_embedder`, for `stepfold retime`.

        None where it cannot be re-timed; where it can, `predictor` is a partial with `time_scale`.
        """
        return None

    def time_part(self, network: Any) -> str | None:
        """Name of the part of a student's network whose output is its time embedding [B, D], made outside the blocks.

        None where there is no such part.
        """
        return None

    def retimed_parts(self, network: Any) -> dict[str, Any]:
        """The parts of the pipeline that change when `network` reads times of [0, 1]."""
        own = self.pipe.scheduler.config
        changes: dict[str, Any] = {"num_train_timesteps": 1}
        if not own.get("use_dynamic_shifting", False):
            changes["shift"] = self.shift  # `flow_shift` in other classes
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(own, **changes)
        return {self.network_part: network, "scheduler": scheduler}

    def guidance_kinds(self) -> tuple[GuidanceKind, ...]:
        """What this network can do about guidance, the usual one first."""
        return ("classifier_free", "none")

    @property
    def num_train_timesteps(self) -> int:
        """What the pipeline's scheduler counts to: 1 of a re-timed network whose own time it is."""
        return self.pipe.scheduler.config.num_train_timesteps

    @property
    def network(self) -> nn.Module:
        """See `Teacher`."""
        return self.transformer

    @property
    def student_reads_guidance(self) -> bool:
        """See `Teacher`."""
        return self.guidance_kind == "embedded"

    def pixels_a_latent(self, vae: dict[str, Any]) -> int:
        """Along each side of a picture; `vae` is the autoencoder's config."""
        return 2 ** (len(vae.get("encoder_block_out_channels") or vae["block_out_channels"]) - 1)

    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        """Latent channels, what a picture's sides must be multiples of, its usual height and width in pixels.

        Args:
            factor: pixels a latent, along each side.
        """
        raise NotImplementedError

    def time_axis(self, frames: int | None, vae: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
        """Frames of a video, and the latents' extra dimension that stands for them: of pictures 1, and none.

        Args:
            frames: as asked for; None for the usual number.
            vae: the autoencoder's config.
        """
        if frames not in (None, 1):
            raise UserError(f"teacher.frames is {frames}, but {type(self.pipe).__name__} makes pictures; leave it out")
        return 1, ()

    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Prompts as in use -> condition; text encoders are loaded."""
        raise NotImplementedError

    def encode_nothing(self) -> Condition:
        """The condition of the unconditional branch, one row."""
        return self.encode_texts([""])

    @property
    def examples(self) -> tuple[str, ...]:
        """Prompts to try the teacher with; none where it takes any text."""
        return ()

    def check_prompts(self, prompts: Iterable[str]) -> None:
        """Refuses prompts that it cannot encode, before a run begins.

        Raises:
            UserError: the first of them, and what is allowed.
        """

    def usual_tokens(self) -> int:
        """How long a prompt may be unless the settings say."""
        if not self.takes_length:
            return int(self.pipe.tokenizer.model_max_length)
        return int(inspect.signature(self.pipe.__call__).parameters["max_sequence_length"].default)

    def in_call(self, prompt: str) -> Any:
        """A prompt as the first argument of the pipeline's call."""
        return prompt

    def idle_parameters(self) -> tuple[str, ...]:
        """Parts of the names of a student's parameters that the first step cannot move."""
        return ()

    def of_the_prompt_alone(self) -> list[nn.Module]:
        """The network's parts whose one input is the prompt's: no time and no latent. See `once.compute_once`."""
        return []

    def block_stacks(self) -> dict[str, str]:
        """The network's lists of blocks, fewer in a smaller student -> what its config calls their lengths."""
        return {"transformer_blocks": "num_layers"}

    def call_options(self) -> dict[str, Any]:
        """Arguments that each call of the pipeline needs besides the usual ones."""
        return {}

    def feature_parts(self) -> list[tuple[nn.Module, int]]:
        """The network's blocks in order, each with the width of its output, which may serve as `features`."""
        config = self.transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        return [(block, width) for block in self.transformer.transformer_blocks]

    def latent_scale(self, vae: Any) -> tuple[Any, Any]:
        """What the network's unit latents are the autoencoder's times and minus: numbers or [C, 1, ...].

        Args:
            vae: the autoencoder's config.

        Returns:
            scale, offset: unit latents are (latents - offset) * scale.
        """
        return vae.scaling_factor, vae.get("shift_factor") or 0.0

    def guided(self, x_unit: Tensor, t: Tensor, without: Tensor, with_prompt: Tensor, guidance: Tensor) -> Tensor:
        """F of the two branches of classifier-free guidance -> F under guidance, as the pipeline does it by default.

        Args:
            x_unit, t: as of `Predict`.
            without, with_prompt: F of either branch [B, ...].
            guidance: scales [B].
        """
        return guide(without, with_prompt, guidance)

    def pack(self, latents: Tensor) -> Tensor:
        """Latents [B, ...] as the pipeline's own sampler has them."""
        return latents

    def unpack(self, latents: Tensor) -> Tensor:
        """The inverse of `pack`."""
        return latents

    def plain_scheduler(self) -> Any:
        """The scheduler of first-order steps, which `sample_teacher` repeats."""
        return FlowMatchEulerDiscreteScheduler(self.num_train_timesteps, shift=self.shift)

    def own_steps(self, num_steps: int) -> dict[str, Any]:
        """Arguments with which the pipeline takes so many steps of its own ladder."""
        return {"num_inference_steps": num_steps}

    def tokens_for_shift(self) -> int:
        """What the pipeline takes for the number of tokens where its sampler's shift depends on that."""
        *_, height, width = self.latent_shape
        return (height // 2) * (width // 2)

    def read_schedule(self) -> Schedule:
        """What the pipeline's scheduler says of its network.

        Raises:
            UserError: it is none that is understood for this network.
        """
        return read_flow(self.pipe.scheduler)

    def ddim_times(self, num_steps: int) -> Tensor:
        """See `Teacher`."""
        raise NotImplementedError

    def student_times(self, num_steps: int, sampler: SamplerName) -> list[float]:
        """See `Teacher`."""
        if sampler == "consistency":
            return few_step_times(num_steps)
        return even_flow_times(num_steps, self.shift)[:-1].tolist()

    # What they share.

    def shape_at(self, height: int, width: int) -> tuple[int, ...]:
        """The latent shape of pictures of a size in pixels.

        Raises:
            UserError: the pipeline cannot make them.
        """
        channels, multiple, *_ = self.geometry(self.factor)
        for name, side in (("height", height), ("width", width)):
            if side < multiple or side % multiple:
                near = max(1, round(side / multiple)) * multiple
                raise UserError(f"{name} is {side}, but this pipeline needs a multiple of {multiple}; {near} is near")
        return (channels, *self.latent_frames, height // self.factor, width // self.factor)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """See `Teacher`. Prompts are treated as the pipeline treats them by default.

        Raises:
            UserError: the tokenizer or a text encoder breaks on them, as damaged ones do.
        """
        self._load_text_encoders()
        try:
            return self.encode_texts(list(prompts)).trimmed()
        except (UserError, torch.OutOfMemoryError):
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"the tokenizer or text encoder of teacher {self.source!r} cannot encode a prompt "
                f"({first_line(error)}); save it again with save_pretrained"
            ) from error

    @torch.no_grad()
    def _encode_null(self) -> Condition:
        self._load_text_encoders()
        return self.encode_nothing()

    def _text_encoders(self) -> list[str]:
        return [name for name, spec in self.index.items() if name.startswith("text_encoder") and spec[0] is not None]

    def _read_text_encoders(self) -> None:
        for name in self._text_encoders():
            if getattr(self.pipe, name) is None:
                setattr(self.pipe, name, self._read_network(name))

    def _read_network(self, part: str) -> Any:
        return load_network(self.source, part, self.index[part], self.dtype, self.variant)

    def _load_text_encoders(self) -> None:
        self._read_text_encoders()
        for name in self._text_encoders():
            getattr(self.pipe, name).to(self.device).eval().requires_grad_(False)

    @property
    def null_condition(self) -> Condition | None:
        """The unconditional branch's condition, one row, untrimmed; None for teachers without such a branch."""
        return self._null

    def park_text_encoder(self) -> None:
        """See `Teacher`."""
        for name in self._text_encoders():
            if (encoder := getattr(self.pipe, name)) is not None:
                encoder.to("cpu")

    def clear_prompt_cache(self) -> None:
        """See `Teacher`."""
        self._both = None
        forget(self.of_the_prompt_alone())

    def null(self, like: Condition) -> Condition:
        """The unconditional branch's condition for each row of `like`.

        With `null_mask="own"` it is masked by its own length, as diffusers' pipelines do; with `"prompt"` by the
        prompt's mask, as the public training code does.
        """
        assert self._null is not None and self._null_trimmed is not None
        if self.null_mask == "prompt":
            null = self._null.first_tokens(like.mask.shape[1]).expand(len(like))
            return Condition(null.embeds, like.mask, null.pooled)
        return self._null_trimmed.expand(len(like))

    def velocity(
        self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor, *, with_gradient: bool = False
    ) -> Tensor:
        """See `Teacher`. Both branches of classifier-free guidance go through the network as one batch."""
        with torch.set_grad_enabled(with_gradient):
            x_unit = x / self.sigma_data
            if self.guidance_kind == "classifier_free":
                F = self.guided(x_unit, t, *self._branches(x_unit, t, condition), guidance)
            else:
                F = self._unguided(x_unit, t, condition, guidance)
            return (self.sigma_data * F).to(x.dtype)

    @torch.no_grad()
    def branches(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """See `Teacher`."""
        without, with_prompt = self._branches(x / self.sigma_data, t, condition)
        return (self.sigma_data * without).to(x.dtype), (self.sigma_data * with_prompt).to(x.dtype)

    @property
    def exact_branches(self) -> bool:
        """See `Teacher`."""
        return self.guidance_kind != "embedded"

    def _unguided(self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        """F [B, ...] of one row a sample; a network that embeds guidance is told the scales [B]."""
        scales = guidance if self.guidance_kind == "embedded" else None
        return self.predict(self.transformer, x_unit, t, condition, scales)

    def _branches(self, x_unit: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """F [B, ...] without and with the prompt, as `branches` says; two rows a sample, in one batch."""
        if self.guidance_kind == "none":
            F = self._unguided(x_unit, t, condition, t)
            return F, F
        if self._both is None or self._both[0] is not condition:
            first = condition if self.guidance_kind == "embedded" else self.null(condition)
            self._both = (condition, concatenate([first, condition]))
        guided = self.default_guidance if self.default_guidance > 1 else 2.0
        scales = torch.cat([torch.full_like(t, guided), torch.ones_like(t)])
        F = self._unguided(torch.cat([x_unit, x_unit]), torch.cat([t, t]), self._both[1], scales)
        first, with_prompt = F.chunk(2)
        if self.guidance_kind == "embedded":
            return with_prompt - (first - with_prompt) / (guided - 1), with_prompt
        return first, with_prompt

    def features(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> list[Tensor]:
        """See `Teacher`. The outputs of evenly spaced blocks, without classifier-free guidance."""
        maps: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            features = output[-1] if isinstance(output, tuple) else output  # text tokens come first, if at all
            maps.append(features.flatten(2).mT if features.ndim == 4 else features)

        handles = [block.register_forward_hook(keep) for block in self.feature_blocks]
        try:
            self._unguided(x / self.sigma_data, t, condition, guidance)
        finally:
            for handle in handles:
                handle.remove()
        return maps

    def _vae_class(self) -> Any:
        return getattr(diffusers, self.index["vae"][1])

    def _read_vae(self) -> Any:
        if self.pipe.vae is None:
            self.pipe.vae = self._read_network("vae")
        return self.pipe.vae

    def _vae(self) -> Any:
        return self._read_vae().to(self.device).eval().requires_grad_(False)

    def autoencoder_scale(self) -> tuple[Any, Any]:
        """`latent_scale` of the pipeline's own autoencoder."""
        return self.latent_scale(self._read_vae().config)

    def release_decoder(self) -> None:
        """See `Teacher`."""
        self.pipe.vae = None

    @torch.no_grad()
    def decode(self, x0: Tensor, batch: int | None = None) -> Tensor:
        """See `Teacher`; so many at once as have the pixels of one picture of 512 x 512, or `batch`."""
        vae, batch = self._vae(), batch or max(1, DECODED_AT_ONCE // (self.height * self.width))
        scale, offset = self.autoencoder_scale()
        parts = (
            vae.decode((part / self.sigma_data / scale + offset).to(vae.dtype), return_dict=False)[0]
            for part in x0.split(batch)
        )
        return torch.cat([(part.float() / 2 + 0.5).clamp(0, 1) for part in parts])

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """See `Teacher`. The mean, where the autoencoder gives a distribution."""
        vae = self._vae()
        encoded = vae.encode((2 * pictures - 1).to(self.device, vae.dtype), return_dict=False)[0]
        latents = encoded if isinstance(encoded, Tensor) else encoded.mode()
        scale, offset = self.autoencoder_scale()
        return self.sigma_data * ((latents - offset) * scale).float()

    def black_latent(self, shape: tuple[int, ...]) -> Tensor:
        """See `Teacher`."""
        height, width = (self.factor * side for side in shape[-2:])
        return self.encode_pictures(torch.zeros(1, 3, height, self.frames * width))[0] / self.sigma_data

    def inputs(self, prompts: Sequence[str], draws: Sequence[torch.Generator]) -> dict[str, Any]:
        """The arguments that tell a pipeline of this family its prompts and its noise.

        Args:
            prompts: B strings.
            draws: B generators on the CPU; each draws its prompt's unit noise.
        """
        noise = torch.stack([torch.randn(self.latent_shape, generator=draw) for draw in draws])
        return {"prompt": list(prompts), "latents": self.pack(noise.to(self.device, self.dtype))}

    def latents_of(self, pipe: Any, prompts: Sequence[str], draws: Sequence[torch.Generator], **call: Any) -> Tensor:
        """Unit latents [B, ...] that a pipeline of this family makes in its own loop; for arguments see `inputs`."""
        made = pipe(**self.inputs(prompts, draws), output_type="latent", return_dict=False, **call)
        return self.unpack(made[0])

    def pipeline_latents(
        self,
        prompts: Sequence[str],
        draws: Sequence[torch.Generator],
        guidance: float,
        num_steps: int,
        scheduler: Any = None,
    ) -> Tensor:
        """`latents_of` the teacher's pipeline with a scheduler; `plain_scheduler` if None."""
        old, self.pipe.scheduler = self.pipe.scheduler, scheduler or self.plain_scheduler()
        self._load_text_encoders()
        self._vae()
        try:
            call = self.usual_call() | self.own_steps(num_steps) | {"guidance_scale": guidance}
            return self.latents_of(self.pipe, prompts, draws, **call)
        finally:
            self.pipe.scheduler = old

    # How its pipeline takes a student's steps, and how it is saved.

    def student_scheduler(self, sampler: SamplerName) -> Any:
        """The scheduler with which the saved pipeline takes a student's steps.

        It shifts the noise levels that it is given, so its own shift is 1, and the card's call lists shifted ones.
        """
        fresh = sampler == "consistency"
        return FlowMatchEulerDiscreteScheduler(self.num_train_timesteps, shift=1.0, stochastic_sampling=fresh)

    def lora_scheduler(self, sampler: SamplerName) -> Any:
        """The scheduler with which the teacher's own pipeline takes a LoRA student's steps.

        Raises:
            UserError: that pipeline cannot sample so.
        """
        return self.student_scheduler(sampler)

    def lora_call(self, times: Sequence[float], guidance: float, sampler: SamplerName) -> dict[str, Any]:
        """Arguments with which the teacher's own pipeline takes a LoRA student's steps at the given times."""
        return self.student_call(times, guidance, sampler)

    def student_class(self, sampler: SamplerName) -> type:
        """The pipeline class that a student is saved as."""
        return type(self.pipe)

    def student_parts(self, sampler: SamplerName) -> dict[str, Any]:
        """The parts of a student's pipeline besides its network."""
        return self.pipe.components | {"scheduler": self.student_scheduler(sampler)}

    def student_call(self, times: Sequence[float], guidance: float, sampler: SamplerName) -> dict[str, Any]:
        """Arguments with which the saved pipeline takes a student's steps at the given times."""
        sigmas = flow_time(torch.tensor(times, dtype=torch.float64)).clamp(max=1.0).tolist()
        scale = guidance if self.guidance_kind == "embedded" else 1.0  # 1: one network call a step
        return self.usual_call() | {"sigmas": sigmas, "guidance_scale": scale}

    def usual_call(self) -> dict[str, Any]:
        """Arguments that each call of the pipeline is given: sizes, and what the family needs."""
        length = {"max_sequence_length": self.max_tokens} if self.takes_length else {}
        return {"height": self.height, "width": self.width} | length | self.call_options()

    def save_retimed(self, network: Any, folder: Path) -> None:
        """Writes this teacher with a network that reads times of [0, 1] in the place of its own."""
        self.write_pipeline(type(self.pipe), lambda: self.pipe.components | self.retimed_parts(network), folder)

    def index_extras(self) -> dict[str, Any]:
        """Entries of model_index.json that the pipeline's class reads but does not write."""
        return {}

    def write_pipeline(self, kind: Any, parts: Callable[[], dict[str, Any]], folder: Path) -> None:
        """Writes a pipeline folder.

        Args:
            kind: the pipeline's class.
            parts: called when text encoders and autoencoder have been read.
            folder: made if it does not exist.
        """
        self._read_vae()
        self._read_text_encoders()
        kind(**parts()).save_pretrained(folder, safe_serialization=True)
        if extras := self.index_extras():
            index = folder / "model_index.json"
            index.write_text(json.dumps(json.loads(index.read_text(encoding="utf-8")) | extras, indent=2) + "\n")
