"""Your own network as a teacher: any torch module that predicts a flow-matching velocity, TrigFlow's F or EDM's x_0."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import (
    dxdt_from_denoised,
    edm_input,
    edm_sigma,
    flow_prediction,
    guide,
)
from stepfold.maths.routes import even_flow_times, few_step_times
from stepfold.teachers.contract import NO_NULL, Condition, GuidanceKind, SamplerName, Teacher, concatenate
from stepfold.teachers.family import Predict
from stepfold.teachers.pipeline import SIGMA_DATA


def flow_network(network: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
    """F [B, ...] of a network (x_FM, t in [0, 1], condition) -> z - x_0, where x_FM = (1 - t) x_0 + t z."""
    return flow_prediction(x_unit, t, lambda x_flow, t_flow: network(x_flow, t_flow, condition))


def own_trigflow_network(
    network: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None
) -> Tensor:
    """F [B, ...] of a network that predicts it, from x = cos t x_0 + sin t z and t in [0, pi/2]."""
    return network(x_unit, t, condition)


def edm_network(network: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
    """F [B, ...] of a denoiser (x_0 + sigma z, sigma, condition) -> x_0."""
    return dxdt_from_denoised(x_unit, t, network(edm_input(x_unit, t), edm_sigma(t, 1.0), condition))


Prediction = Literal["flow", "trigflow", "edm"]
PREDICTIONS: dict[Prediction, Predict] = {"flow": flow_network, "trigflow": own_trigflow_network, "edm": edm_network}


class ModuleTeacher(Teacher):
    """A `contract.Teacher` around a module; data of unit variance, noise z of unit variance."""

    sigma_data = SIGMA_DATA
    ode: Literal["flow", "trigflow"] = "flow"
    feature_widths: tuple[int, ...] = ()

    def __init__(
        self,
        network: nn.Module,
        encode: Callable[[Sequence[str]], Condition],
        latent_shape: tuple[int, ...],
        prediction: Prediction = "flow",
        *,
        nothing: Condition | None = None,
        guidance: float = 1.0,
        sigma_max: float = math.inf,
        shift: float = 1.0,
        max_tokens: int = 1,
        time_part: str | None = None,
    ) -> None:
        """Wraps a network; it is frozen, and its students are copies.

        Args:
            network: (x [B, ...], t [B], condition of B rows) -> [B, ...], as `flow_network`, `own_trigflow_network` or
                `edm_network` describes.
            encode: prompts -> condition, one row a prompt.
            latent_shape: of one sample.
            prediction: "flow", a velocity of flow matching; "trigflow", F; "edm", the picture.
            nothing: the condition of no prompt, one row. With it the network is walked with classifier-free guidance,
                two rows a sample; its students take one and stand for the guided network.
            guidance: the scale w of F_nothing + w (F_prompt - F_nothing), unless the setting `space.guidance` gives
                another one.
            sigma_max: the largest noise level that the network knows; pure noise stands there. A denoiser has none that
                is infinite: EDM's own is 80 over data of standard deviation 0.5, so 160.
            shift: of its own flow sampler.
            max_tokens: what `encode` pads to; compiled runs want equal shapes.
            time_part: name of the network's part whose output is its time embedding [B, D], for students told two
                times; such as "time_embedder" or "net.0".

        Raises:
            UserError: a guidance without the condition of nothing, or more than one row of that; a denoiser without
                `sigma_max`.
        """
        if nothing is None and guidance != 1:
            raise UserError(
                f"guidance={guidance:g} needs the condition that the network takes for no prompt; give it as `nothing`"
            )
        if prediction == "edm" and not 0 < sigma_max < math.inf:
            raise UserError(f"sigma_max is {sigma_max}; a denoiser starts at a finite noise level, for example 160")
        if nothing is not None and len(nothing) != 1:
            raise UserError(f"`nothing` has {len(nothing)} rows; give one, as `encode` makes it of one prompt")
        self.nothing, self.default_guidance = nothing, guidance
        self._time_part = time_part
        self.guidance_kind: GuidanceKind = "none" if nothing is None else "classifier_free"
        self._network = network.eval().requires_grad_(False)
        self.encode_prompts, self.latent_shape, self.latent_shapes = encode, latent_shape, (latent_shape,)
        self.predict, self.start_time = PREDICTIONS[prediction], math.atan(sigma_max)
        self.shift, self.max_tokens = shift, max_tokens

    @property
    @override
    def network(self) -> nn.Module:
        return self._network

    @property
    @override
    def student_reads_guidance(self) -> bool:
        return False

    @torch.no_grad()
    @override
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encodes on the network's device."""
        return self._beside_network(self.encode_prompts(prompts))

    def _beside_network(self, condition: Condition) -> Condition:
        parameter = next(self.network.parameters(), None)
        return condition if parameter is None else condition.to(parameter.device, condition.embeds.dtype)

    @override
    def velocity(
        self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, with_gradient: bool = False
    ) -> Tensor:
        """Both branches of the guidance go through the network as one batch."""
        with torch.set_grad_enabled(with_gradient):
            if self.nothing is None or guidance is None:
                F = self.predict(self.network, x / self.sigma_data, t, condition, None)
            else:
                F = guide(*self._branches(x / self.sigma_data, t, condition), self.guidance_weight(guidance))
            return (self.sigma_data * F).to(x.dtype)

    @torch.no_grad()
    @override
    def branches(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        without, with_prompt = self._branches(x / self.sigma_data, t, condition)
        return (self.sigma_data * without).to(x.dtype), (self.sigma_data * with_prompt).to(x.dtype)

    def _branches(self, x_unit: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """F [B, ...] of either branch; of a network without guidance the same twice."""
        if self.nothing is None:
            F = self.predict(self.network, x_unit, t, condition, None)
            return F, F
        self.nothing = self._beside_network(self.nothing)
        both = concatenate([self.nothing.expand(len(x_unit)), condition])
        without, with_prompt = self.predict(
            self.network, torch.cat([x_unit, x_unit]), torch.cat([t, t]), both, None
        ).chunk(2)
        return without, with_prompt

    @override
    def null(self, like: Condition) -> Condition:
        """`nothing`, as often as `like` has rows."""
        if self.nothing is None:
            raise UserError(NO_NULL)
        self.nothing = self._beside_network(self.nothing)
        return self.nothing.expand(len(like))

    def time_part(self, network: nn.Module) -> str | None:
        """The name that it was given."""
        return self._time_part

    @override
    def decode(self, x0: Tensor, *, with_gradient: bool = False) -> Tensor:
        """The latents themselves, of unit variance: a network of one's own has no autoencoder."""
        return x0 / self.sigma_data if with_gradient else (x0 / self.sigma_data).detach()

    def _missing(self, *args: Any, **options: Any) -> Any:
        """A network of one's own has no autoencoder, no sampler of DDIM's, and nothing inside it is known."""
        raise NotImplementedError

    ddim_times = features = encode_pictures = black_latent = release_decoder = _missing

    @property
    @override
    def exact_branches(self) -> bool:
        return True

    @override
    def student_times(self, num_steps: int, sampler: SamplerName) -> list[float]:
        consistency = sampler == "consistency"
        times = few_step_times(num_steps) if consistency else even_flow_times(num_steps, self.shift)[:-1].tolist()
        return [min(time, self.start_time) if self.start_time < math.pi / 2 else time for time in times]

    @override
    def park_text_encoder(self) -> None:
        """Does nothing: the encoder is the caller's."""

    @override
    def clear_prompt_cache(self) -> None:
        """Does nothing: there is no cache."""
