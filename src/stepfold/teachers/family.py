"""What a family of diffusers pipelines says about itself: network, texts, latents and guidance."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.teachers.contract import Condition, GuidanceKind
from stepfold.teachers.guiding import Guiding
from stepfold.teachers.schedules import Schedule, flow_shift, read_flow
from stepfold.teachers.tokens import TextReader, tokenizer_in, usual_tokens

Predict = Callable[[Any, Tensor, Tensor, Condition, Tensor | None], Tensor]
"""(network, x / sigma_data [B, ...], t [B], condition, guidance scales [B] for a network that embeds them) -> F."""


class Family(Guiding):
    """Abstract: the answers in which families differ, most with a usual one; `PipelineTeacher` asks for them.

    A family sets the first two and says the rest in its methods.

    Attributes:
        pipelines: classes that the family can load.
        network_part: name of the network's part in the pipeline.
        time_module: name of the network's part with `time_proj` and `timestep_embedder`, where it has one of these.
        loads_lora: whether the pipeline loads LoRAs.
        lora_blocks: parts of the names of the blocks that a LoRA is for.
        readers: the pipeline's tokenizers that its prompts' length depends on; the first one that is there counts.
        lowers: whether the pipeline reads prompts in small letters.
        fields: field of the network's config -> the values that are understood, and what any other means.
        stand_ins: parts whose configs the pipeline's class reads as it is made, even where the part itself comes later.
        picture_output: where a block that gives two streams has that of the picture.
        outputs: channels out for each channel in; with a learned variance 2.
        head: name of the network's last layer, a linear one with bias, where its config says `out_channels` freely.
        autoencoder_layout: what `to_autoencoder` does, in words that end "which is the last line below, ".
        time_field: field of the network's config, if any, that the network multiplies a time of [0, 1] by.
        unread: optional parts of the pipeline that are left out.
        rounds: whether the network rounds to bfloat16 within, whatever its weights are.
        video_autoencoder: whether the autoencoder takes videos where the pipeline makes pictures: one frame then.
        source: folder or hub id.
        index: the pipeline's model_index.json.
        transformer: the network: a transformer, or a UNet.
        work_dtype: of conditions, and of weights that are trained.
        frames: of a video; 1 where the pipeline makes pictures.
        factor: pixels a latent, along each side.
        schedule: the pipeline's noise schedule.
        velocities: how many the network gives at a time; several only that of a policy student.
    """

    pipelines: ClassVar[tuple[type, ...]] = ()
    network_part: ClassVar[str] = "transformer"
    time_module: ClassVar[str] = ""
    loads_lora: ClassVar[bool] = True
    lora_blocks: ClassVar[tuple[str, ...]] = ("block",)
    readers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    lowers: ClassVar[bool] = False
    fields: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}
    stand_ins: ClassVar[tuple[str, ...]] = ()
    picture_output: ClassVar[int] = -1
    outputs: ClassVar[tuple[int, ...]] = (1,)
    head: ClassVar[str] = ""
    autoencoder_layout: ClassVar[str] = ""
    time_field: ClassVar[str] = ""
    unread: ClassVar[tuple[str, ...]] = ()
    rounds: ClassVar[bool] = False
    video_autoencoder: ClassVar[bool] = False
    ode: Literal["flow", "trigflow"] = "flow"
    start_time: float = math.pi / 2

    source: str
    index: dict[str, Any]
    transformer: Any
    work_dtype: torch.dtype
    frames: int
    factor: int
    schedule: Schedule
    velocities: int

    @classmethod
    def time_scale_of(cls, network: Mapping[str, Any], schedule: Mapping[str, Any]) -> float:
        """What the network's own time counts to: 1 or 1000.

        Args:
            network: the network's config.
            schedule: the scheduler's.
        """
        return float(network.get(cls.time_field, 1000) if cls.time_field else schedule.get("num_train_timesteps", 1000))

    @property
    def time_scale(self) -> float:
        """What this network's own time counts to."""
        return self.time_scale_of(self.transformer.config, self.pipe.scheduler.config)

    def check_index(self) -> None:
        """Refuses, before it is loaded, a pipeline whose model_index.json says that the family does not understand it.

        Raises:
            UserError: what it is, and what would do.
        """

    def predictor(self) -> Predict:
        """How the network is called: a plain function, or a partial of one."""
        raise NotImplementedError

    def whole_network(self) -> nn.Module:
        """What `predictor` calls: the pipeline's part of the name `network_part`, or several parts as one module."""
        return getattr(self.pipe, self.network_part)

    def network_parts(self, network: Any) -> dict[str, Any]:
        """Name of a part of the pipeline -> that part of a network like the teacher's; `network_part` is the first."""
        return {self.network_part: network}

    def check_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        """Refuses LoRAs that are to be merged into the teacher.

        Raises:
            UserError: the pipeline loads none, or it is not known into which of its networks.
        """
        if loras and not self.loads_lora:
            raise UserError(f"{type(self.pipe).__name__} loads no LoRA; give a teacher with it merged, as a folder")

    def time_embedder(self, network: Any) -> Any:
        """Of a network like the teacher's, the part with `time_proj` and `timestep_embedder`, for `stepfold retime`.

        None where it cannot be re-timed; where it can, `predictor` is a partial with `time_scale`.
        """
        return getattr(network, self.time_module) if self.time_module else None

    @property
    def retimable(self) -> bool:
        """Whether `stepfold retime` takes it: its time counts to 1000, and its time embedder is known by itself."""
        return self.time_scale >= 10 and self.time_embedder(self.transformer) is not None

    def time_part(self, network: Any) -> str | None:
        """Name of the part of a student's network whose output is its time embedding, made outside the blocks.

        [B, D] or [B, 1, D]; None where there is no such part.
        """
        return f"{self.time_module}.timestep_embedder" if self.time_module else None

    def retimed_parts(self, network: Any) -> dict[str, Any]:
        """The parts of the pipeline that change when `network` reads times of [0, 1]."""
        if self.time_field:
            network.register_to_config(**{self.time_field: 1.0})
            return {self.network_part: network}
        own = self.pipe.scheduler.config
        changes: dict[str, Any] = {"num_train_timesteps": 1}
        if not own.get("use_dynamic_shifting", False):
            changes["shift"] = self.shift  # `flow_shift` in other classes
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(own, **changes)
        return {self.network_part: network, "scheduler": scheduler}

    @classmethod
    def guidance_kinds(cls, network: Mapping[str, Any], pipeline: Mapping[str, Any]) -> tuple[GuidanceKind, ...]:
        """What a network can do about guidance, the usual one first; configs are the network's and the pipeline's."""
        return ("classifier_free", "none")

    @property
    @override
    def network(self) -> nn.Module:
        return self.transformer

    @property
    @override
    def student_reads_guidance(self) -> bool:
        return self.guidance_kind == "embedded"

    def check_network(self, latent_channels: int) -> None:
        """Checks the network's config: what it reads, and how many channels.

        Args:
            latent_channels: of the autoencoder, as `autoencoder_channels` counts them.

        Raises:
            UserError: it wants more than a text, or does not fit the autoencoder.
        """
        config, name = self.transformer.config, type(self.transformer).__name__
        for field, (understood, what) in self.fields.items():
            if (value := config.get(field)) not in understood:
                raise UserError(f"this {name}'s config has {field}={value!r}: {what}; use a plain text-to-image model")
        taken, given = self.network_channels()
        if given not in [taken * self.velocities * each for each in self.outputs]:
            raise UserError(
                f"this {name} takes {taken} channels and gives {given}: it is for editing, or predicts something "
                "else beside; use a plain text-to-image model"
            )
        if (channels := self.geometry(self.factor)[0]) != latent_channels:
            raise UserError(
                f"this {name} draws latents of {channels} channels, but the autoencoder beside it decodes "
                f"{latent_channels}; use the autoencoder that the network was trained with"
            )

    def network_channels(self) -> tuple[int, int]:
        """How many channels the network takes and gives, counted alike."""
        config = self.transformer.config
        return config.in_channels, config.get("out_channels") or config.in_channels

    def autoencoder_channels(self, vae: dict[str, Any]) -> int:
        """Of the autoencoder's latents in the network's layout; `vae` is the autoencoder's config."""
        return vae.get("z_dim") or vae["latent_channels"]

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
        return usual_tokens(self.pipe, self.length_argument)

    def check_tokens(self, most: int) -> None:
        """Refuses a longer prompt than the pipeline reads.

        Raises:
            UserError: `max_tokens` is more than `most`.
        """
        if self.max_tokens > most:
            raise UserError(
                f"max_tokens is {self.max_tokens}, but this pipeline reads {most} tokens of a prompt; leave it out"
            )

    @classmethod
    def before_prompts(cls, pipe: Any) -> tuple[str, int]:
        """What the pipeline puts before each prompt, and how many of its tokens do not count to a prompt's length."""
        return "", 0

    @classmethod
    def reader_in(cls, pipe: Any, max_tokens: int | None = None) -> TextReader | None:
        """What reads the prompts in a pipeline, and cuts those that are too long; None where they are classes.

        Args:
            pipe: the pipeline; its networks are not needed.
            max_tokens: what it is told to read, where it can be told; None for the usual number.
        """
        there = [part for part in cls.readers if getattr(pipe, part) is not None]
        if not there:
            return None
        tokenizer = tokenizer_in(getattr(pipe, there[0]))
        told = cls.length_argument in inspect.signature(pipe.__call__).parameters and there[0] == cls.readers[0]
        usual = usual_tokens(pipe, cls.length_argument) if there[0] == cls.readers[0] else tokenizer.model_max_length
        most = (max_tokens or usual) if told else usual
        return TextReader(tokenizer, most, *cls.before_prompts(pipe), lowers=cls.lowers)

    def text_reader(self) -> TextReader | None:
        """What reads the prompts of this teacher."""
        return self.reader_in(self.pipe, self.max_tokens)

    def idle_parameters(self) -> tuple[str, ...]:
        """Parts of the names of a student's parameters that the first step cannot move."""
        return ()

    def of_the_prompt_alone(self) -> list[nn.Module]:
        """The network's parts whose one input is the prompt's: no time and no latent. See `once.compute_once`."""
        return []

    def block_stacks(self) -> dict[str, str]:
        """The network's lists of blocks, fewer in a smaller student -> what its config calls their lengths."""
        return {"transformer_blocks": "num_layers"}

    def feature_parts(self) -> list[tuple[nn.Module, int]]:
        """The network's blocks in order, each with the width of its output, which may serve as `features`."""
        config = self.transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        return [(block, width) for block in self.transformer.transformer_blocks]

    def feature_map(self, output: Any) -> Tensor:
        """What a block of `feature_parts` gives, as [B, tokens, width] or [B, width, H, W]."""
        return output[self.picture_output] if isinstance(output, tuple) else output

    def latent_scale(self, vae: Any) -> tuple[Any, Any]:
        """What the network's unit latents are the autoencoder's times and minus: numbers or [C, 1, ...].

        Args:
            vae: the autoencoder, for its config or its running statistics.

        Returns:
            scale, offset: unit latents are (latents - offset) * scale, with latents in the network's layout.
        """
        return vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0

    def to_autoencoder(self, latents: Tensor) -> Tensor:
        """Latents [B, ...] of the network's layout in the autoencoder's, such as patches put back in their places."""
        return latents

    def from_autoencoder(self, latents: Tensor) -> Tensor:
        """The inverse of `to_autoencoder`."""
        return latents

    def usual_guidance(self) -> float:
        """The scale of the pipeline's own call."""
        return float(inspect.signature(self.pipe.__call__).parameters[self.scale_argument].default)

    def usual_steps(self) -> int:
        """The number of steps of the pipeline's own call."""
        return int(inspect.signature(self.pipe.__call__).parameters["num_inference_steps"].default)

    def tokens_for_shift(self) -> int:
        """What the pipeline takes for the number of tokens where its sampler's shift depends on that."""
        *_, height, width = self.latent_shape
        return (height // 2) * (width // 2)

    @override
    def shift_at(self, num_steps: int) -> float:
        return flow_shift(self.pipe.scheduler, self.tokens_for_shift())

    def read_schedule(self) -> Schedule:
        """What the pipeline's scheduler says of its network.

        Raises:
            UserError: it is none that is understood for this network.
        """
        return read_flow(self.pipe.scheduler)
