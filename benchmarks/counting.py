"""Peak memory of a training step by count: the package's own step on tensors without numbers, of any size, anywhere.

The tensors are torch's fake ones; the bytes that they would take are added up as they come and go. What a device takes
besides is not in the count: workspaces of its libraries, what its allocator rounds up, and what is inside of a text
encoder while it works (its weights are). AdamW is the fused one, as on a GPU.
"""

import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from models import (
    DC_AE_F32C32,
    DC_AE_TINY,
    FLUX,
    FLUX_SCHEDULE,
    FLUX_VAE,
    GEMMA_2B,
    GEMMA_TINY,
    MAX_TOKENS,
    TRANSFORMERS,
    Size,
)
from step_rows import Precision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves
from transformers import Gemma2Config, Gemma2Model

from stepfold import assets
from stepfold.config import Config
from stepfold.objectives.contract import Networks
from stepfold.objectives.denoising import FAKE
from stepfold.prompts.reading import open_prompts
from stepfold.students.lora import lora_student
from stepfold.students.starting import make_fake
from stepfold.students.whole import new_student
from stepfold.teachers import pipeline
from stepfold.teachers.contract import Condition, Student, deepcopy_sharing
from stepfold.teachers.loading import load_teacher
from stepfold.training.critics import fake_loss, fake_states, new_critics
from stepfold.training.draws import Batch, draw
from stepfold.training.optimisers import add_group, make_optimiser
from stepfold.training.precision import student_attention, student_precision, walk_precision
from stepfold.training.states import collect
from stepfold.training.step import move_average
from stepfold.training.terms import add_gradients, terms_of

CPU = torch.device("cpu")


class CountedBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations make within it.

    Attributes:
        now: bytes of those that are still there.
        peak: the most that there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts what it returns; a tensor that shares its memory is counted once."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._counted:
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        self._counted.add(number)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, number, size)

    def _remove(self, number: int, size: int) -> None:
        self._counted.remove(number)
        self.now -= size


class Repeats:
    """Calls of a teacher's network that take what one before took: only the first of them runs.

    A call without gradients takes as much above what is there, and leaves as much, as another of the same shapes. One
    that leaves more than its result, as the first of a prompt does, runs again.

    Attributes:
        runs: calls that ran.
    """

    def __init__(self, counted: CountedBytes, call: Callable[..., Tensor]) -> None:
        self.counted, self.call, self.runs = counted, call, 0
        self._taken: dict[Any, tuple[int, torch.Size, torch.dtype]] = {}

    def __call__(self, *args: Any) -> Tensor:
        """As `call`, of which the same is counted."""
        if torch.is_grad_enabled():
            return self.call(*args)
        counted, key = self.counted, [(v.shape, v.dtype) if isinstance(v, Tensor) else v for v in tree_leaves(args)]
        if (key := repr([value for value in key if not isinstance(value, Condition)])) in self._taken:
            above, shape, dtype = self._taken[key]
            counted.peak = max(counted.peak, counted.now + above)
            return torch.empty(shape, dtype=dtype)
        began, highest = counted.now, counted.peak
        counted.peak = began
        out, self.runs = self.call(*args), self.runs + 1
        if counted.now - began == out.untyped_storage().nbytes():
            self._taken[key] = counted.peak - began, out.shape, out.dtype
        counted.peak = max(counted.peak, highest)
        return out


def count_few(size: Size, config: Config, cached: bool, few: int = 3) -> dict[str, float]:
    """As `count_step`, on `few` of the network's equal blocks and on twice as many: the rest is as what those add."""
    stacks = {name: count for name, count in config_of(size).items() if name in ("num_layers", "num_single_layers")}
    first = count_step(size, config, cached, dict.fromkeys(stacks, few))
    total = dict(first)
    for stack, count in stacks.items():
        more = count_step(size, config, cached, dict.fromkeys(stacks, few) | {stack: 2 * few})
        total = {what: total[what] + (count - few) / few * (more[what] - first[what]) for what in total}
    return total


def config_of(size: Size) -> dict[str, Any]:
    """Of the network of a size."""
    return FLUX if size == "flux" else TRANSFORMERS[size]


def count_step(size: Size, config: Config, cached: bool, blocks: Mapping[str, int] | None = None) -> dict[str, float]:
    """GiB that a step takes at its peak, and what stays between two steps.

    Args:
        size: of the model.
        config: the settings.
        cached: whether conditions come from a cache, so that neither text encoder nor autoencoder is in memory.
        blocks: numbers of blocks in the network's config, where they are others than the size's.
    """
    training, fake, counted = config.training, FakeTensorMode(allow_non_fake_inputs=True), CountedBytes()
    from_images = "images" in config.space.weights
    prompts = open_prompts(assets.PROMPTS)
    in_place = patch.object(nn.Module, "to", lambda module, *_, **__: module)
    with tempfile.TemporaryDirectory() as folder, in_place:
        described = described_pipe(size, Path(folder), config_of(size) | dict(blocks or {}))
        with fake, counted:
            pipe = with_fake_weights(described, getattr(torch, config.teacher.dtype), encoders=not cached)
        with patch.object(pipeline, "load_pipeline", lambda *_, **__: pipe):
            settings = config.teacher.model_copy(update={"source": folder})
            teacher = load_teacher(settings, CPU, null=fake_condition(size, 1))
        teacher.call_network = Repeats(counted, teacher.call_network)
        times = {count: teacher.student_times(count, "consistency") for count in range(1, config.rollout.steps + 1)}
        teacher.student_times = lambda num_steps, _: times[num_steps]  # tensors without numbers have none
        batch = draw(0, prompts, teacher, config, CPU)
        if not from_images or config.space.cache_latents:
            teacher.release_decoder()
        with fake, counted:
            with addresses(bool(config.student.lora)):
                student = lora_student(teacher, config.student.lora) if config.student.lora else new_student(teacher)
            average = deepcopy_sharing(student, [p for p in student.parameters() if not p.requires_grad])
            average.requires_grad_(False)
            with addresses(config.fake.kind == "lora"):
                critics = new_critics([config], teacher, CPU, lambda: make_fake(teacher, config.fake))
            networks_of_run = [student, *(critic for critic in critics.values() if isinstance(critic, Student))]
            for network in networks_of_run if training.checkpointing else ():
                network.recompute_blocks()
            trained = [p for p in student.parameters() if p.requires_grad]
            optimiser = make_optimiser(trained, config.optimiser)
            if config.optimiser.name == "adamw":
                optimiser = torch.optim.AdamW(trained, fused=True)
            for name, critic in critics.items():
                add_group(optimiser, name, [p for p in critic.parameters() if p.requires_grad], None)
            precision: Any = Precision(CPU, training.precision == "bf16", cached=not training.checkpointing)

            for parameter in [p for group in optimiser.param_groups for p in group["params"]]:
                parameter.grad = torch.zeros_like(parameter)
            optimiser.step()  # its states are there from now on
            optimiser.zero_grad(set_to_none=True)
            counted.peak = counted.now
            x0, count = None, len(batch.index)
            if from_images and config.space.cache_latents:
                x0 = torch.randn(count, *teacher.latent_shape)
            elif from_images:
                x0 = teacher.encode_pictures(torch.rand(count, 3, teacher.height, teacher.width))
            networks = Networks(
                student, teacher, critics,
                tangent="block" if training.checkpointing else "one_pass",
                precision=partial(student_precision, precision, training.precision),
                walk_precision=partial(walk_precision, training.walk_precision, CPU, teacher.network),
            )  # fmt: skip
            with addresses(bool(config.student.lora or critics)):
                condition = fake_condition(size, count)
                if FAKE in critics:
                    update_fake(networks, batch, condition, config, optimiser)
                terms = terms_of(config)
                states = collect(dict.fromkeys(term.space for term in terms), batch, condition, networks, config, x0=x0)
                teacher.clear_prompt_cache()
                add_gradients(terms, networks, states, batch.draws, config, 0, precision)
                torch.nn.utils.clip_grad_norm_(student.parameters(), config.optimiser.clip)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                move_average(average, student, training.ema)
            del states, condition, x0
    peak = counted.peak / 2**30
    return {"peak_gib": peak, "before_gib": 0.0, "above_gib": peak, "between_steps_gib": counted.now / 2**30}


def addresses(on: bool) -> Any:
    """Within it tensors without numbers have addresses, by which PEFT and caches of prompts tell shared ones.

    Copies of whole networks are made outside: of a tensor with an address torch copies the storage as well.
    """
    by_storage = patch.object(Tensor, "data_ptr", lambda tensor: tensor.untyped_storage()._cdata)
    return by_storage if on else nullcontext()


def update_fake(
    networks: Networks, batch: Batch, condition: Condition, config: Config, optimiser: torch.optim.Optimizer
) -> None:
    """One update of the fake score, as `training.step.update_critic` makes it; several take no more memory."""
    states = fake_states(networks, batch, condition, config, 0, {})
    loss = fake_loss(networks, batch, states, config).value.mean()
    with student_attention(config.training.precision, CPU):
        loss.backward(inputs=[p for p in networks.critics[FAKE].parameters() if p.requires_grad])
    torch.nn.utils.clip_grad_norm_(networks.critics[FAKE].parameters(), config.optimiser.clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def described_pipe(size: Size, folder: Path, config: dict[str, Any]) -> Any:
    """A pipeline without any weights, and in `folder` what a teacher reads of one besides them."""
    if size == "flux":
        return described_flux(folder, config)
    tiny = size == "tiny"
    with torch.device("meta"):
        networks: dict[str, Any] = {
            "transformer": SanaTransformer2DModel(**config),
            "vae": AutoencoderDC(**(DC_AE_TINY if tiny else DC_AE_F32C32)),
            "text_encoder": Gemma2Model(Gemma2Config(**(GEMMA_TINY if tiny else GEMMA_2B))),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0 if tiny else 3.0)
    pipe: Any = SanaPipeline(**networks, tokenizer=cast(Any, None), scheduler=scheduler)
    pipe.save_config(folder)
    for name in ("transformer", "vae", "scheduler"):
        getattr(pipe, name).save_config(folder / name)
    networks["text_encoder"].config.save_pretrained(folder / "text_encoder")
    return pipe


def described_flux(folder: Path, config: dict[str, Any]) -> Any:
    """The same of FLUX.1-dev, whose text encoders are left out."""
    with torch.device("meta"):
        transformer, vae = FluxTransformer2DModel(**config), AutoencoderKL(**FLUX_VAE)
    scheduler = FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULE)
    absent: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe: Any = FluxPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **absent)
    pipe.save_config(folder)
    for name in ("transformer", "vae", "scheduler"):
        getattr(pipe, name).save_config(folder / name)
    return pipe


def with_fake_weights(pipe: Any, dtype: torch.dtype, encoders: bool) -> Any:
    """The pipeline with networks of fake tensors; to be called in their mode.

    Text encoder and autoencoder are in bfloat16, as users load them on a GPU. The first is as many weights and no more.
    """
    with default_dtype(dtype):
        pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config)
    if pipe.text_encoder is None:
        pipe.vae = None
        return pipe
    count = sum(parameter.numel() for parameter in pipe.text_encoder.parameters())
    with default_dtype(torch.bfloat16):
        pipe.vae = AutoencoderDC.from_config(pipe.vae.config) if encoders else None
        pipe.text_encoder = nn.ParameterList([torch.empty(count)]) if encoders else None
    return pipe


def fake_condition(size: Size, count: int) -> Condition:
    """Of prompts that fill all tokens."""
    tokens = MAX_TOKENS[size]
    if size == "flux":
        width = FLUX["joint_attention_dim"]
        return Condition.whole(torch.zeros(count, tokens, width), torch.zeros(count, FLUX["pooled_projection_dim"]))
    embeds = torch.zeros(count, tokens, TRANSFORMERS[size]["caption_channels"])
    return Condition(embeds, torch.ones(count, tokens, dtype=torch.long))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it new floating point tensors are of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
