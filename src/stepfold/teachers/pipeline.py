"""What families of diffusers pipelines share as teachers; a family adds how network and encoders are called."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError, first_line
from stepfold.teachers.calls import set_parts
from stepfold.teachers.contract import NO_NULL, Condition, GuidanceKind, concatenate
from stepfold.teachers.family import Predict
from stepfold.teachers.folders import DEVICE_ERRORS, load_index, load_pipeline, part_config
from stepfold.teachers.lora_merging import merge_lora
from stepfold.teachers.once import compute_once, forget
from stepfold.teachers.parts import PipelineParts
from stepfold.teachers.quantised import Quantised, quantise

SIGMA_DATA = 0.5
DECODED_AT_ONCE = 512 * 512  # pixels
NUM_FEATURES = 5  # feature maps for discriminator heads


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


class PipelineTeacher(PipelineParts):
    """A diffusers pipeline, from a folder or a hub id, as a TrigFlow teacher: what all families share."""

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
        encodes_only: bool = False,
        null: Condition | None = None,
        loras: Sequence[tuple[str, float]] = (),
        variant: str | None = None,
        quantised: Quantised = "none",
        encoders_quantised: Quantised = "none",
        velocities: int = 1,
    ) -> None:
        """`network_only` leaves text encoders and VAE for when they are needed; it takes the unconditional `null`.

        `encodes_only` leaves the network on the CPU. `loras` are files, folders or hub ids, each with its scale.

        Raises:
            UserError: the folder is not whole, or the network cannot do what is asked for.
        """
        self.source, self.device, self.dtype, self.variant = str(source), torch.device(device), dtype, variant
        self.work_dtype = torch.promote_types(dtype, torch.float32)  # of conditions, and of weights that are trained
        self.sigma_data, self.velocities = SIGMA_DATA, velocities
        self.index = load_index(self.source)
        self.check_index()
        self.pipe: Any = load_pipeline(
            self.source, self.index, self.pipelines, dtype, network_only, variant,
            unread=self.unread, stand_ins=self.stand_ins,
        )  # fmt: skip
        self.check_loras(loras)
        plain = [merge_lora(self.pipe, lora, scale, self._read_text_encoders) for lora, scale in loras]
        self.loras_in_diffusers = all(plain)
        self.pipe.set_progress_bar_config(disable=True)
        place = torch.device("cpu") if encodes_only else self.device
        network = quantise(self.whole_network(), quantised, self.lora_blocks, place)
        self.transformer: Any = network.to(place).eval().requires_grad_(False)
        compute_once(self.of_the_prompt_alone())
        kinds = self.guidance_kinds(self.transformer.config, self.pipe.config)
        self.guidance_kind: GuidanceKind = kinds[0] if guidance_kind == "auto" else guidance_kind
        if self.guidance_kind not in kinds:
            raise UserError(
                f"teacher guidance is {guidance_kind!r}, but this network calls for {' or '.join(map(repr, kinds))}; "
                "leave it at 'auto'"
            )
        self.default_guidance = self.usual_guidance()
        self.takes_length = self.length_argument in inspect.signature(self.pipe.__call__).parameters
        self.max_tokens = self.usual_tokens() if max_tokens is None else max_tokens
        self.null_mask, self.encoders_quantised = null_mask, encoders_quantised
        vae = part_config(self.source, self.index, "vae")
        self.factor = self.pixels_a_latent(vae)
        self.check_network(self.autoencoder_channels(vae))
        usual_height, usual_width = self.geometry(self.factor)[2:]
        self.height, self.width = height or usual_height, width or usual_width
        self.frames, self.latent_frames = self.time_axis(frames, vae)
        self.latent_shape = self.shape_at(self.height, self.width)
        self.latent_shapes = tuple(self.shape_at(*size) for size in sizes or [(self.height, self.width)])
        self.schedule = self.read_schedule()
        self.shift = self.shift_at(self.usual_steps())
        self.plain_predict = self.predictor()
        self.predict = in_precision(self.plain_predict, dtype)
        parts = self.feature_parts()
        count = min(NUM_FEATURES, len(parts))
        chosen = [parts[(i + 1) * len(parts) // count - 1] for i in range(count)]
        self.feature_blocks, self.feature_widths = [part for part, _ in chosen], tuple(width for _, width in chosen)

        self._answered = False
        self._null = self._null_trimmed = None
        self._both: tuple[Condition, Condition] | None = None  # a condition, and it with the unconditional one before
        if self.guidance_kind == "classifier_free":
            self._null = null.to(self.device, self.work_dtype) if null else self._encode_null()
            self._null_trimmed = self._null.trimmed()

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
    @override
    def encode(self, prompts: Sequence[str], images: Sequence[Tensor] | None = None) -> Condition:
        """Prompts are treated as the pipeline treats them by default; `images` are those of `with_images`.

        Raises:
            UserError: the tokenizer or a text encoder breaks on them, as damaged ones do.
        """
        self._load_text_encoders()
        try:
            return self.with_images(self.encode_texts(list(prompts)).trimmed(), images)
        except (UserError, *DEVICE_ERRORS):
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

    @property
    def null_condition(self) -> Condition | None:
        """The unconditional branch's condition, one row, untrimmed; None for teachers without such a branch."""
        return self._null

    @override
    def clear_prompt_cache(self) -> None:
        self._both = None
        forget(self.of_the_prompt_alone())

    @override
    def null(self, like: Condition) -> Condition:
        """The unconditional branch's condition for each row of `like`.

        An image stays: guidance is by the text. With `null_mask="own"` it is masked by its own length, as diffusers'
        pipelines do; with `"prompt"` by the prompt's mask, as the public training code does.

        Raises:
            UserError: a teacher without classifier-free guidance.
        """
        if self._null is None or self._null_trimmed is None:
            raise UserError(NO_NULL)
        null = self._null_trimmed.expand(len(like))
        if self.null_mask == "prompt":
            null = replace(self._null.padded(like.mask.shape[1]).expand(len(like)), mask=like.mask)
        return replace(null, second=like.second) if self.reads_images else null

    @override
    def velocity(
        self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, with_gradient: bool = False
    ) -> Tensor:
        """Both branches of classifier-free guidance go through the network as one batch."""
        with torch.set_grad_enabled(with_gradient):
            x_unit = x / self.sigma_data
            weight = self.weight_at(t, guidance)
            if weight is not None:
                F = self.guided_branches(x_unit, t, *self._branches(x_unit, t, condition), weight)
            else:
                F = self._unguided(x_unit, t, condition, torch.ones_like(t) if guidance is None else guidance)
            return (self.sigma_data * F).to(x.dtype)

    @torch.no_grad()
    @override
    def branches(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        without, with_prompt = self._branches(x / self.sigma_data, t, condition)
        return (self.sigma_data * without).to(x.dtype), (self.sigma_data * with_prompt).to(x.dtype)

    @property
    @override
    def exact_branches(self) -> bool:
        return self.guidance_kind != "embedded"

    def _unguided(self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        """F [B, ...] of one row a sample; a network that embeds guidance is told the scales [B].

        Raises:
            UserError: the network breaks at its first call, as one does whose text encoder is another model's.
        """
        scales = guidance if self.guidance_kind == "embedded" else None
        try:
            F = self.call_network(x_unit, t, condition, scales)
        except (UserError, *DEVICE_ERRORS):
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if self._answered or type(error).__module__.startswith("torch."):  # the compiler's, which says it itself
                raise
            raise UserError(
                f"the network of teacher {self.source!r} cannot be called with what its text encoders give "
                f"({first_line(error)}); the folder's parts do not belong together, or a config was changed by hand"
            ) from error
        self._answered = True
        return F

    def call_network(self, x_unit: Tensor, t: Tensor, condition: Condition, scales: Tensor | None) -> Tensor:
        """F [B, ...] of the network, whose rows may be at different times; see `Predict`."""
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

    @override
    def features(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> list[Tensor]:
        """The outputs of evenly spaced blocks, without classifier-free guidance."""
        return self.maps_of(self.feature_blocks, x, t, condition, guidance)

    def maps_of(
        self, blocks: Sequence[nn.Module], x: Tensor, t: Tensor, condition: Condition, guidance: Tensor
    ) -> list[Tensor]:
        """The outputs of some blocks of the network, as `features`."""
        maps: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            features = self.feature_map(output)
            maps.append(features.flatten(2).mT if features.ndim == 4 else features)

        handles = [block.register_forward_hook(keep) for block in blocks]
        try:
            self._unguided(x / self.sigma_data, t, condition, guidance)
        finally:
            for handle in handles:
                handle.remove()
        return maps

    def autoencoder_latents(self, unit: Tensor) -> Tensor:
        """Unit latents [B, ...] as the autoencoder decodes them."""
        scale, offset = self.autoencoder_scale()
        return self.to_autoencoder(unit / scale + offset)

    def unit_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `autoencoder_latents`."""
        scale, offset = self.autoencoder_scale()
        return (self.from_autoencoder(latents) - offset) * scale

    @override
    def decode(self, x0: Tensor, batch: int | None = None, *, with_gradient: bool = False) -> Tensor:
        """Decodes `batch` at once; by default as many as have the pixels of one picture of 512 x 512."""
        vae, batch = self._vae(), batch or max(1, DECODED_AT_ONCE // (self.height * self.width))
        with torch.set_grad_enabled(with_gradient):
            latents = (self.autoencoder_latents(part / self.sigma_data).to(vae.dtype) for part in x0.split(batch))
            if self.video_autoencoder:
                parts = (vae.decode(part.unsqueeze(2), return_dict=False)[0].squeeze(2) for part in latents)
            else:
                parts = (vae.decode(part, return_dict=False)[0] for part in latents)
            return torch.cat([(part.float() / 2 + 0.5).clamp(0, 1) for part in parts])

    @torch.no_grad()
    @override
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Takes the mean where the autoencoder gives a distribution."""
        vae = self._vae()
        pictures = (2 * pictures - 1).to(self.device, vae.dtype)
        encoded = vae.encode(pictures.unsqueeze(2) if self.video_autoencoder else pictures, return_dict=False)[0]
        latents = encoded if isinstance(encoded, Tensor) else encoded.mode()
        latents = latents.squeeze(2) if self.video_autoencoder else latents
        return self.sigma_data * self.unit_latents(latents).float()

    @override
    def black_latent(self, shape: tuple[int, ...]) -> Tensor:
        height, width = (self.factor * side for side in shape[-2:])
        return self.encode_pictures(torch.zeros(1, 3, height, self.frames * width))[0] / self.sigma_data

    def pipeline_latents(
        self,
        prompts: Sequence[str],
        draws: Sequence[torch.Generator],
        guidance: float,
        num_steps: int,
        scheduler: Any = None,
    ) -> Tensor:
        """`latents_of` the teacher's pipeline with a scheduler; `plain_scheduler` if None."""
        parts = {"scheduler": scheduler or self.plain_scheduler(num_steps)} | self.own_parts(guidance)
        old = set_parts(self.pipe, parts)
        self._load_text_encoders()
        self._vae()
        try:
            call = self.usual_call() | self.own_steps(num_steps) | self.own_guidance(guidance)
            return self.latents_of(self.pipe, prompts, draws, **call)
        finally:
            set_parts(self.pipe, old)
