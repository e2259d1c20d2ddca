"""Your own network as a teacher: any torch module, whatever it predicts and on which noise schedule."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError, first_line
from stepfold.maths.formulations import (
    dxdt_from_denoised,
    edm_input,
    edm_sigma,
    flow_prediction,
    guide,
)
from stepfold.maths.noise_schedules import (
    FLOW,
    TRIGFLOW,
    Inverted,
    NoiseSchedule,
    Output,
    exploding,
    invert,
    own_prediction,
    refuse_pure_noise,
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


def schedule_network(
    network: Any,
    x_unit: Tensor,
    t: Tensor,
    condition: Condition,
    guidance: Tensor | None,
    *,
    inverted: Inverted,
    output: Output,
) -> Tensor:
    """F [B, ...] of a network (x, its own time, condition) -> one of five outputs, see `own_prediction`."""
    return own_prediction(x_unit, t, lambda x, time: network(x, time, condition), inverted, output)


def without_condition(
    network: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, predict: Predict
) -> Tensor:
    """F [B, ...] of a network (x, time), without a condition."""
    return predict(lambda x, time, _: network(x, time), x_unit, t, condition, guidance)


Ready = Literal["flow", "trigflow", "edm"]
Prediction = Literal[Ready, Output]
PREDICTIONS: dict[str, Predict] = {"flow": flow_network, "trigflow": own_trigflow_network, "edm": edm_network}


def predictor(
    prediction: Prediction, schedule: NoiseSchedule | None, data_std: float, sigma_max: float
) -> tuple[Predict, float]:
    """How a network is called, and the TrigFlow time at which its pure noise stands. Arguments as of `ModuleTeacher`.

    Raises:
        UserError: they do not go together, or the schedule is none; see `invert`.
    """
    ready = prediction in PREDICTIONS
    if not ready and prediction not in get_args(Output):
        known = ", ".join([*PREDICTIONS, *get_args(Output)])
        raise UserError(f"prediction is {prediction!r}, but a network predicts one of {known}; choose one")
    if ready and schedule is not None:
        raise UserError(
            f"prediction={prediction!r} has a noise schedule of its own; leave schedule out, or say what the network "
            f"predicts on yours: {', '.join(get_args(Output))}"
        )
    if not ready and schedule is None:
        raise UserError(
            f"prediction={prediction!r} needs the noise schedule that the network was trained on; give schedule=, for "
            "example NoiseSchedule(alpha, sigma, 0, 1)"
        )
    if prediction == "edm" and not 0 < sigma_max < math.inf:
        raise UserError(f"sigma_max is {sigma_max}; a denoiser starts at a finite noise level, for example 160")
    if ready and data_std == 1:
        return PREDICTIONS[prediction], math.atan(sigma_max)
    usual: dict[str, tuple[NoiseSchedule, Output]] = {"flow": (FLOW, "velocity"), "trigflow": (TRIGFLOW, "v")}
    if prediction == "edm":
        usual["edm"] = exploding(sigma_max), "data"
    given, output = usual.get(prediction) or (cast(NoiseSchedule, schedule), cast(Output, prediction))
    inverted = invert(given, data_std)
    refuse_pure_noise(inverted, output)
    predict = partial(schedule_network, inverted=inverted, output=output)
    return predict, min(inverted.highest, math.atan(sigma_max / data_std))


def no_conditions(prompts: Sequence[str]) -> Condition:
    """Rows without numbers, for networks that take no condition."""
    return Condition.whole(torch.zeros(len(prompts), 1, 0))


def described(
    prediction: Prediction,
    schedule: NoiseSchedule | None,
    data_std: float,
    sigma_max: float,
    shift: float,
    latent_shape: tuple[int, ...],
    guidance: float,
    nothing: Condition | None,
) -> str:
    """What a network is said to be, in one line: a run does not go on, nor is its student loaded, under another one."""
    said: dict[str, Any] = {"prediction": prediction, "data_std": data_std, "latent_shape": list(latent_shape)}
    if sigma_max < math.inf:
        said["sigma_max"] = sigma_max
    if schedule is not None:
        times = torch.linspace(schedule.first, schedule.last, 9, dtype=torch.float64)
        for name, of in (("alpha", schedule.alpha), ("sigma", schedule.sigma)):
            said[name] = [float(f"{float(value):.6g}") for value in torch.as_tensor(of(times)).expand(9)]
    if nothing is not None:
        said |= {"guidance": guidance, "nothing": round(float(nothing.embeds.double().sum()), 4)}
    return json.dumps(said | ({"shift": shift} if shift != 1 else {}))


class ModuleTeacher(Teacher):
    """A `contract.Teacher` around a module; its states have data and noise z of unit variance."""

    sigma_data = SIGMA_DATA
    ode: Literal["flow", "trigflow"] = "flow"
    feature_widths: tuple[int, ...] = ()

    def __init__(
        self,
        network: nn.Module,
        encode: Callable[[Sequence[str]], Condition] | None,
        latent_shape: tuple[int, ...],
        prediction: Prediction = "flow",
        *,
        schedule: NoiseSchedule | None = None,
        data_std: float = 1.0,
        nothing: Condition | None = None,
        guidance: float = 1.0,
        sigma_max: float = math.inf,
        shift: float = 1.0,
        max_tokens: int = 1,
        time_part: str | None = None,
    ) -> None:
        """Wraps a network; it is frozen, and its students are copies.

        Args:
            network: (x [B, ...], its own time [B], condition of B rows) -> [B, ...]; without `encode`, (x, time).
            encode: prompts -> condition, one row a prompt; None for a network that takes no condition. A prompt is a
                line of text; what it stands for, a text, numbers or an image's name, is for `encode` to say.
            latent_shape: of one sample.
            prediction: what the network returns. With a schedule of its own: "flow", z - x_0 at (1 - t) x_0 + t z;
                "trigflow", F at cos t x_0 + sin t z; "edm", x_0 at x_0 + sigma z, told sigma. On any `schedule`:
                "velocity", "noise", "score", "v" or "data", see `noise_schedules.own_prediction`.
            schedule: alpha and sigma of the network's own time, where `prediction` is one of those five.
            data_std: standard deviation of the data that the network was trained on. Samples have unit variance:
                `data_std` times them is the network's data.
            nothing: the condition of no prompt, one row. With it the network is walked with classifier-free guidance,
                two rows a sample; its students take one and stand for the guided network.
            guidance: the scale w of F_nothing + w (F_prompt - F_nothing), unless the setting `space.guidance` gives
                another one.
            sigma_max: the largest noise level that the network knows; pure noise stands there. A denoiser has none that
                is infinite: EDM's own is 80, with `data_std` 0.5.
            shift: of its own flow sampler.
            max_tokens: what `encode` pads to; compiled runs want equal shapes.
            time_part: name of the network's part whose output is its time embedding [B, D], for students told two
                times; such as "time_embedder" or "net.0".

        Raises:
            UserError: a guidance without the condition of nothing, or more than one row of that; a denoiser without
                `sigma_max`; a prediction without its schedule; a schedule that is none.
        """
        if not isinstance(network, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(f"the network is a {type(network).__name__}; give a torch.nn.Module")
        if isinstance(latent_shape, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(f"latent_shape is {latent_shape}; give that of one sample, such as ({latent_shape},)")
        if nothing is None and guidance != 1:
            raise UserError(
                f"guidance={guidance:g} needs the condition that the network takes for no prompt; give it as `nothing`"
            )
        if nothing is not None and encode is None:
            raise UserError("`nothing` is for a network that takes conditions; give its `encode`, or leave nothing out")
        if nothing is not None and len(nothing) != 1:
            raise UserError(f"`nothing` has {len(nothing)} rows; give one, as `encode` makes it of one prompt")
        self.nothing, self.default_guidance = nothing, guidance
        self._time_part = time_part
        self.guidance_kind: GuidanceKind = "none" if nothing is None else "classifier_free"
        self._network = network.eval().requires_grad_(False)
        self.latent_shape, self.latent_shapes = latent_shape, (latent_shape,)
        self.predict, self.start_time = predictor(prediction, schedule, data_std, sigma_max)
        self.takes_prompts, self.encode_prompts = encode is not None, encode or no_conditions
        if encode is None:
            self.predict = partial(without_condition, predict=self.predict)
        self.shift, self.max_tokens = shift, max_tokens
        self.reading = described(prediction, schedule, data_std, sigma_max, shift, latent_shape, guidance, nothing)

    @property
    def half(self) -> torch.dtype | None:
        """The half precision that the network is in, None for float32 and float64."""
        found = {weight.dtype for weight in self.network.parameters() if weight.is_floating_point()}
        return next((dtype for dtype in found if dtype.itemsize < 4), None)

    def with_network(self, network: nn.Module) -> "ModuleTeacher":
        """The same reading of another network, which stays as it is."""
        other = copy.copy(self)
        other._network = network
        return other

    def check(self, prompts: Sequence[str], name: str = "network") -> None:
        """Encodes two prompts and calls the network once.

        Args:
            prompts: two.
            name: of the network, in errors.

        Raises:
            UserError: what comes out is no condition of two rows, or no [2, ...] like what went in; or the call fails.
        """
        condition = self.encode_prompts(prompts)
        if not isinstance(condition, Condition) or len(condition) != len(prompts):
            given = f"{len(condition)} rows" if isinstance(condition, Condition) else f"a {type(condition).__name__}"
            raise UserError(f"`encode` gives {given} for {len(prompts)} prompts; give a Condition with a row for each")

        def compare(_: nn.Module, given: tuple[Any, ...], found: Any) -> None:
            shape = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            if shape != list(given[0].shape):
                raise UserError(
                    f"the {name} returns {shape} for x {list(given[0].shape)}; it has to return a tensor of x's "
                    "shape, and latent_shape has to be that of one sample"
                )

        parameter = next(self.network.parameters(), torch.empty(0))
        x = torch.ones(len(prompts), *self.latent_shape, device=parameter.device)  # in float32, as a run calls it
        t = torch.full((len(prompts),), self.start_time / 2, device=x.device)
        hook = self.network.register_forward_hook(compare)
        try:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half is not None):
                self.velocity(x, t, self._beside_network(condition), torch.ones_like(t))
        except UserError:
            raise
        except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as error:
            fix = "give network.float()" if "dtype" in str(error) else "see ModuleTeacher for its arguments"
            raise UserError(
                f"the {name} cannot be called with x {list(x.shape)}, its time [{len(t)}] and the condition: "
                f"{first_line(error)}; {fix}"
            ) from error
        finally:
            hook.remove()

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
