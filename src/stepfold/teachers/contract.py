"""What a teacher and a student are to the rest of the code. Everything past this border speaks TrigFlow."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from stepfold.errors import UserError
from stepfold.maths.policy import Policy

Module = TypeVar("Module", bound=nn.Module)
Scale = TypeVar("Scale", float, Tensor)
GuidanceKind = Literal["classifier_free", "embedded", "none"]
SamplerName = Literal["consistency", "flow", "flow_map", "policy"]
PictureScore = Callable[[Tensor, Sequence[str]], Tensor]
"""(pictures [M, 3, H, W] in [0, 1] with a graph, prompts [M]) -> scores [M] with a graph to the pictures.

A network without an autoencoder has its latents of unit variance as pictures."""
NO_NULL = (
    "this teacher has no classifier-free guidance, and so no branch without a prompt; leave matching.fake_guidance and "
    "fake.guidance at 1 and fake.unprompted at 0"
)


@dataclass(frozen=True)
class Condition:
    """What the networks are conditioned on: the text encoders' output.

    Attributes:
        embeds: [B, L, D].
        mask: int64 [B, L], 1 where attention may look.
        pooled: [B, P], of the whole prompt, for networks that take such a vector.
        second: of the same B prompts, for networks that read two texts, or an image's latents as tokens; its length is
            its own, and its mask may be all zeros.
    """

    embeds: Tensor
    mask: Tensor
    pooled: Tensor | None = None
    second: "Condition | None" = None

    @staticmethod
    def whole(embeds: Tensor, pooled: Tensor | None = None) -> "Condition":
        """One in which attention looks everywhere, at padding too."""
        return Condition(embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device), pooled)

    @staticmethod
    def ragged(texts: Sequence[Tensor]) -> "Condition":
        """Of B texts [L_i, D], with zeros behind the shorter ones."""
        embeds = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
        lengths = torch.tensor([len(text) for text in texts], device=embeds.device)
        return Condition(embeds, (torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]).long())

    @cached_property
    def lengths(self) -> list[int]:
        """L_i of each text; read from the device once, since a trajectory asks at each of its steps."""
        return self.mask.sum(1).tolist()

    def texts(self) -> list[Tensor]:
        """The B texts [L_i, D] that were given to `ragged`, for networks that take no mask."""
        return [row[:length] for row, length in zip(self.embeds, self.lengths, strict=True)]

    def __len__(self) -> int:
        return len(self.embeds)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        """With `change` made to every tensor; each has the samples in its first dimension."""
        pooled = None if self.pooled is None else change(self.pooled)
        second = None if self.second is None else self.second.each(change)
        return Condition(change(self.embeds), change(self.mask), pooled, second)

    def rows(self, index: Tensor | slice) -> "Condition":
        """The samples that `index` selects, in its order."""
        return self.each(lambda values: values[index])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Condition":
        """On a device, the embeddings in a dtype."""
        return self.each(lambda values: values.to(device, dtype if values.is_floating_point() else None))

    def repeat_interleave(self, times: int) -> "Condition":
        """Each sample `times` times in a row."""
        return self.each(lambda values: values.repeat_interleave(times, 0))

    def expand(self, count: int) -> "Condition":
        """Of one sample, `count`."""
        return self.each(lambda values: values.expand(count, *values.shape[1:]))

    def where(self, chosen: Tensor, other: "Condition") -> "Condition":
        """The rows of `other` where `chosen`, bool [B], and the own ones elsewhere."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        both = concatenate([self.padded(length), other.padded(length)])
        own = torch.arange(len(self), device=chosen.device)
        return both.rows(own + len(self) * chosen)

    def first_tokens(self, length: int) -> "Condition":
        """Without the positions from `length` on; the second text stays whole."""
        return replace(self, embeds=self.embeds[:, :length], mask=self.mask[:, :length])

    def trimmed(self) -> "Condition":
        """Without the positions that no sample of the batch attends to; they would only cost time."""
        attended = self.mask.any(0).nonzero()
        second = None if self.second is None else self.second.trimmed()
        return replace(self.first_tokens(int(attended.max()) + 1 if len(attended) else 1), second=second)

    def padded(self, length: int, second: int = 0) -> "Condition":
        """With masked positions appended up to `length`; a second text that is shorter than `second`, up to that."""
        extra, other = length - self.mask.shape[1], self.second
        if other is not None and other.mask.shape[1] < second:
            other = other.padded(second)
        pad = nn.functional.pad
        return replace(self, embeds=pad(self.embeds, (0, 0, 0, extra)), mask=pad(self.mask, (0, extra)), second=other)


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """One batch out of several, padded to the longest, and to one position at least."""
    length = max(1, *(c.mask.shape[1] for c in conditions))
    parts = [c.padded(length) for c in conditions]
    pooled = [c.pooled for c in parts if c.pooled is not None]
    second = [c.second for c in parts if c.second is not None]
    return Condition(
        torch.cat([c.embeds for c in parts]),
        torch.cat([c.mask for c in parts]),
        torch.cat(pooled) if pooled else None,
        concatenate(second) if second else None,
    )


class PartlyCalled(nn.Module):
    """A network of which a call may leave whole parts out, as its samples' times say."""


class Student(nn.Module):
    """Abstract: a trainable flow map X(x, t, s) = cos(t - s) x - sin(t - s) sigma_data F(x / sigma_data, t, s).

    At s = 0 it is the consistency function f(x, t). A student told one time ignores s.

    Attributes:
        sampler: what it is sampled with; a run sets it.
        shared: names of parameters and buffers that are the teacher's own, not copies: frozen, and not saved.
        reads_target: whether the student is told two times, t and the target time s.
        can_recompute: whether its blocks are known, so that `recompute_blocks` works.
        policy: the form of its policy, of a student that gives N F at a time along the channels; None for others.
    """

    sampler: SamplerName = "consistency"
    shared: frozenset[str] = frozenset()
    reads_target: bool = False
    can_recompute: bool = False
    policy: Policy | None = None

    @abstractmethod
    def forward(
        self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """F of a batch.

        Args:
            x_unit: x / sigma_data [B, ...].
            t: [B], time of the state, in [0, pi/2].
            condition: B rows.
            guidance: scales [B], the teacher's pipeline's.
            target: s [B], time to jump to, in [0, t]; None for 0. A student told one time ignores it.

        Returns:
            F [B, ...].
        """
        raise NotImplementedError

    @abstractmethod
    def log_variance(self, t: Tensor, guidance: Tensor, target: Tensor | None = None) -> Tensor:
        """-w_phi [B] of the adaptive weight. Arguments as of `forward`."""
        raise NotImplementedError

    def freeze_guidance(self) -> None:
        """Freezes what reads the guidance scale: a run with one scale has nothing to teach it."""

    def recompute_blocks(self) -> None:
        """Switches activation checkpointing on: the backward pass computes each block's forward again.

        Raises:
            UserError: a student that does not say how.
        """
        raise UserError(
            f"{type(self).__name__} has no blocks to recompute; leave training.checkpointing off and training.tangent "
            "at auto, or lower training.micro_batch to save memory"
        )


def deepcopy_sharing(module: Module, shared: Iterable[Tensor]) -> Module:
    """A copy of a module that has the very same tensors where they are among `shared`."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


class Teacher(Protocol):
    """A frozen diffusion or flow model, its text encoder and its autoencoder.

    A guidance scale s is everywhere the one that the teacher's pipeline is called with.
    """

    sigma_data: float
    guidance_kind: GuidanceKind
    default_guidance: float  # of its pipeline
    no_guidance: float = 1.0  # the scale that turns guidance off in its pipeline: its weight is 1
    latent_shape: tuple[int, ...]  # of previews and samples
    latent_shapes: tuple[tuple[int, ...], ...]  # that training draws from
    max_tokens: int  # of a prompt
    second_tokens: int = 0  # of a second text
    start_time: float  # where pure noise stands: pi/2, or a little below
    ode: Literal["flow", "trigflow"]  # coordinates in which its own sampler takes straight steps; trigflow is DDIM
    shift: float  # of the teacher's own flow sampler at its usual number of steps
    feature_widths: tuple[int, ...]  # of `features`

    @property
    def network(self) -> nn.Module:
        """What `velocity` calls."""
        raise NotImplementedError

    @property
    def student_reads_guidance(self) -> bool:
        """Whether a student of it can be told which scale it stands for."""
        raise NotImplementedError

    def guidance_weight(self, scale: Scale) -> Scale:
        """The weight w of v_u + w (v_c - v_u) that a scale s of the pipeline means: s, or s + 1 in some pipelines."""
        return scale

    def guidance_scale(self, weight: Scale) -> Scale:
        """The scale of the pipeline that means a weight: the inverse of `guidance_weight`, which adds a constant."""
        return weight - self.guidance_weight(0.0)

    def shift_at(self, num_steps: int) -> float:
        """The shift of the teacher's own flow sampler, where that depends on its number of steps."""
        return self.shift

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompts -> condition, one row a prompt."""
        raise NotImplementedError

    def park_text_encoder(self) -> None:
        """Takes the text encoder off the device until `encode` needs it again."""
        raise NotImplementedError

    def student_times(self, num_steps: int, sampler: SamplerName) -> list[float]:
        """The times of a student's steps without the final 0, as its pipeline takes them."""
        raise NotImplementedError

    def ddim_times(self, num_steps: int) -> Tensor:
        """Float64 [num_steps + 1], falling to 0: the times of DDIM's steps, for teachers that sample with it."""
        raise NotImplementedError

    def velocity(
        self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, with_gradient: bool = False
    ) -> Tensor:
        """dx/dt under guidance.

        Args:
            x: [B, ...].
            t: [B], in [0, pi/2].
            condition: B rows.
            guidance: scales [B]; None for a scale of 1, which costs half under classifier-free guidance.
            with_gradient: whether the result has a graph to x and t; the teacher's weights never get a gradient.

        Returns:
            [B, ...], of x's dtype.
        """
        raise NotImplementedError

    def branches(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """dx/dt without and with the prompt, (v_u, v_c), both [B, ...], from one call of the network; no gradient.

        v_u + w (v_c - v_u) with w = `guidance_weight(s)` is `velocity` at every scale s, but for families with a
        guidance rule of their own. A teacher without guidance gives v_c twice. One with embedded guidance has no v_u:
        it is extrapolated, so that the rule holds at w = 1 and at `default_guidance` (at 2 where that is 1 or less),
        and is an approximation elsewhere.
        """
        raise NotImplementedError

    def null(self, like: Condition) -> Condition:
        """The condition of no prompt, for each row of `like`.

        Raises:
            UserError: a teacher without classifier-free guidance, whose network knows none.
        """
        raise NotImplementedError

    @property
    def exact_branches(self) -> bool:
        """Whether v_u of `branches` is the network's own, not an extrapolation over embedded scales."""
        raise NotImplementedError

    def clear_prompt_cache(self) -> None:
        """Lets go of what `velocity` kept of its last prompts for the next call; nothing else depends on it."""
        raise NotImplementedError

    def features(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> list[Tensor]:
        """What the network sees inside at x [B, ...], t [B]: maps [B, tokens, width], with a gradient to x."""
        raise NotImplementedError

    def decode(self, x0: Tensor, *, with_gradient: bool = False) -> Tensor:
        """Clean latents (of standard deviation sigma_data) [B, ...] -> pictures [B, 3, H, W] in [0, 1]."""
        raise NotImplementedError

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] -> clean latents (of standard deviation sigma_data) [B, ...]."""
        raise NotImplementedError

    def black_latent(self, shape: tuple[int, ...]) -> Tensor:
        """z_black: the unit-variance latent of an all-black picture, of one of its latent shapes."""
        raise NotImplementedError

    def release_decoder(self) -> None:
        """Takes the autoencoder out of memory; `decode` and `black_latent` load it again."""
        raise NotImplementedError
