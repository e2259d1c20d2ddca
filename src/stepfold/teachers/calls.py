"""How a family's pipeline is called: its own steps and a student's, and what stands in for its latents."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from typing_extensions import override

from stepfold.maths.formulations import flow_time, trigflow_time
from stepfold.maths.routes import even_flow_times, few_step_times
from stepfold.teachers.contract import SamplerName, Teacher

LAST_LEVEL = 2 / 3
"""Noise level of a student's last step, of two or more."""


def parts_of(pipe: Any) -> dict[str, Any]:
    """What makes a pipeline again: its components, and the options that its class takes beside them."""
    taken = inspect.signature(type(pipe).__init__).parameters
    return {name: value for name, value in pipe.config.items() if name in taken} | pipe.components


def set_parts(pipe: Any, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Gives a pipeline other parts, by their names; returns those that it had."""
    old = {name: getattr(pipe, name) for name in parts}
    for name, part in parts.items():
        setattr(pipe, name, part)
    return old


def by_equal_factors() -> Any:
    """A scheduler for `OwnLevels.fresh_scheduler`: levels fall from 1 to LAST_LEVEL by equal factors.

    Its lowest one is 1 in 1000, and it shifts that twice.
    """
    shift = (999 * LAST_LEVEL / (1 - LAST_LEVEL)) ** 0.5
    return FlowMatchEulerDiscreteScheduler(shift=shift, use_exponential_sigmas=True, stochastic_sampling=True)


def scheduler_times(scheduler: Any, **steps: Any) -> list[float]:
    """The times of a flow-matching scheduler's own steps, without the final 0; `steps` as its `set_timesteps` takes."""
    scheduler.set_timesteps(**steps)
    return trigflow_time(scheduler.sigmas[:-1].double()).tolist()


class PipelineCalls(Teacher):
    """Abstract: the part of `Family` that knows the pipeline's arguments, schedulers and layouts.

    Attributes:
        even_ladder: the pipeline's own sampler walks noise levels 1, 1 - 1/n, ..., 1/n.
        rises_to: where the network's time is largest, and where its flow velocity points.
        output: where the pipeline's result has what it made.
        scale_argument: name of the guidance scale in the pipeline's call.
        one_by_one: whether the pipeline is called with a prompt at once: in a batch it has padding attended to.
        prompt_argument: name of the prompt in the pipeline's call, where another argument comes first; else empty.
        fixed_options: arguments that each call of the pipeline needs, whichever the model.
        negative_prompt: that of the unconditional branch, where the pipeline needs it for guidance; else None.
        pipe: the pipeline.
        device: where its networks are.
        dtype: of their weights.
        height, width: of pictures, in pixels.
        length_argument: name of the longest prompt's length in the pipeline's call.
        takes_length: whether the call has it.
    """

    even_ladder: bool = False
    rises_to: ClassVar[Literal["noise", "data"]] = "noise"
    output: ClassVar[Literal["images", "image", "frames"]] = "images"
    one_by_one: ClassVar[bool] = False
    scale_argument: ClassVar[str] = "guidance_scale"
    prompt_argument: ClassVar[str] = ""
    fixed_options: ClassVar[Mapping[str, Any]] = {}
    negative_prompt: ClassVar[str | None] = None
    length_argument: ClassVar[str] = "max_sequence_length"

    pipe: Any
    device: torch.device
    dtype: torch.dtype
    height: int
    width: int
    takes_length: bool

    @property
    def num_train_timesteps(self) -> int:
        """What the pipeline's scheduler counts to: 1 of a re-timed network whose own time it is."""
        return self.pipe.scheduler.config.num_train_timesteps

    @classmethod
    def after_loading(cls, lora: bool) -> list[str]:
        """Lines of code that plain diffusers needs after the pipeline's `from_pretrained`, of a README.

        A line may have `{dtype}`, which `from_pretrained` is not told then.

        Args:
            lora: whether it is the teacher's pipeline, which a LoRA student is put into.
        """
        return []

    def in_call(self, prompt: str) -> Any:
        """A prompt as the first argument of the pipeline's call."""
        return prompt

    def call_options(self) -> dict[str, Any]:
        """Arguments that each call of the pipeline needs besides the usual ones."""
        return dict(self.fixed_options)

    def pack(self, latents: Tensor) -> Tensor:
        """Latents [B, ...] as the pipeline's own sampler has them."""
        return latents

    def unpack(self, latents: Tensor) -> Tensor:
        """The inverse of `pack`."""
        return latents

    def given(self, noise: Tensor) -> Tensor:
        """Unit noise [B, ...] as the pipeline's call takes it; its own sampler's layout unless it packs by itself."""
        return self.pack(noise)

    def made(self, latents: Tensor) -> Tensor:
        """Unit latents [B, ...] of what the pipeline's call returns as latents."""
        return self.unpack(latents)

    def plain_scheduler(self, num_steps: int | None = None) -> Any:
        """The scheduler of first-order steps, which `sample_teacher` repeats; None for the usual number of them."""
        shift = self.shift if num_steps is None else self.shift_at(num_steps)
        return FlowMatchEulerDiscreteScheduler(self.num_train_timesteps, shift=shift)

    def own_steps(self, num_steps: int) -> dict[str, Any]:
        """Arguments with which the pipeline takes so many steps of its own ladder."""
        return {"num_inference_steps": num_steps}

    @override
    def ddim_times(self, num_steps: int) -> Tensor:
        raise NotImplementedError

    @override
    def student_times(self, num_steps: int, sampler: SamplerName) -> list[float]:
        if sampler == "consistency":
            return few_step_times(num_steps)
        return even_flow_times(num_steps, self.shift_at(num_steps))[:-1].tolist()

    def inputs(self, prompts: Sequence[str], draws: Sequence[torch.Generator]) -> dict[str, Any]:
        """The arguments that tell a pipeline of this family its prompts and its noise.

        Args:
            prompts: B strings.
            draws: B generators on the CPU; each draws its prompt's unit noise.
        """
        noise = torch.stack([torch.randn(self.latent_shape, generator=draw) for draw in draws])
        latents = self.given(noise.to(self.device, self.dtype))
        return {"prompt": list(prompts), "latents": latents} | self.negatives(len(prompts))

    @classmethod
    def negatives(cls, count: int) -> dict[str, Any]:
        """The argument with the negative prompts of so many prompts, where the pipeline needs them for guidance."""
        return {} if cls.negative_prompt is None else {"negative_prompt": [cls.negative_prompt] * count}

    def latents_of(self, pipe: Any, prompts: Sequence[str], draws: Sequence[torch.Generator], **call: Any) -> Tensor:
        """Unit latents [B, ...] that a pipeline of this family makes in its own loop; for arguments see `inputs`."""
        if self.one_by_one and len(prompts) > 1:
            each = [
                self.latents_of(pipe, [prompt], [draw], **call) for prompt, draw in zip(prompts, draws, strict=True)
            ]
            return torch.cat(each)
        made = pipe(**self.inputs(prompts, draws), output_type="latent", return_dict=False, **call)
        return self.made(made[0])

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
        return parts_of(self.pipe) | {"scheduler": self.student_scheduler(sampler)}

    def student_call(self, times: Sequence[float], guidance: float, sampler: SamplerName) -> dict[str, Any]:
        """Arguments with which the saved pipeline takes a student's steps at the given times."""
        sigmas = flow_time(torch.tensor(times, dtype=torch.float64)).clamp(max=1.0).tolist()
        return self.usual_call() | {"sigmas": sigmas} | self.student_guidance(guidance)

    def usual_call(self) -> dict[str, Any]:
        """Arguments that each call of the pipeline is given: sizes, and what the family needs."""
        length = {self.length_argument: self.max_tokens} if self.takes_length else {}
        return {"height": self.height, "width": self.width} | length | self.call_options()

    def own_guidance(self, guidance: float) -> dict[str, Any]:
        """Arguments with which the pipeline takes steps of its own at a scale."""
        return {self.scale_argument: guidance}

    def own_parts(self, guidance: float) -> dict[str, Any]:
        """Parts with which the pipeline takes steps of its own at a scale, where one of them holds the scale."""
        return {}

    def student_guidance(self, guidance: float) -> dict[str, Any]:
        """Arguments with which the pipeline calls a student: at its scale if it embeds one, else guidance off."""
        return {self.scale_argument: guidance if self.guidance_kind == "embedded" else self.no_guidance}

    def index_extras(self) -> dict[str, Any]:
        """Entries of model_index.json that the pipeline's class reads but does not write."""
        return {}


class OwnLevels(PipelineCalls):
    """Abstract: of a pipeline whose call takes no noise levels, so that a student's are its scheduler's own."""

    def fresh_scheduler(self) -> Any:
        """The scheduler of a consistency student, whose levels are right for every number of steps."""
        raise NotImplementedError

    @override
    def student_scheduler(self, sampler: SamplerName) -> Any:
        """Students that are no consistency functions take the teacher's."""
        return self.fresh_scheduler() if sampler == "consistency" else self.plain_scheduler()

    @override
    def student_times(self, num_steps: int, sampler: SamplerName) -> list[float]:
        """Those of the scheduler, told what the pipeline tells it."""
        even = {"sigmas": [1 - i / num_steps for i in range(num_steps)]}
        steps = even if self.even_ladder else {"num_inference_steps": num_steps}
        return scheduler_times(self.student_scheduler(sampler), **steps)

    @override
    def student_call(self, times: Sequence[float], guidance: float, sampler: SamplerName) -> dict[str, Any]:
        """Leaves the times to the scheduler, which knows them."""
        return self.usual_call() | {"num_inference_steps": len(times)} | self.student_guidance(guidance)
