"""The settings of a run: validated, with presets, to and from yaml."""

import itertools
import re
import reprlib
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from stepfold.errors import UserError
from stepfold.jumps import PolicySettings, SemigroupSettings, TargetSettings, check_targets
from stepfold.near_names import nearest, renamed
from stepfold.scores import (
    AnchorSettings,
    DecoupledSettings,
    FakeSettings,
    IdentitySettings,
    MatchingSettings,
    RewardSettings,
    RolloutSettings,
    check_scores,
)
from stepfold.sections import Section, TeacherSettings, check_quantised
from stepfold.settings import (
    LARGEST,
    AdversarialSettings,
    ConsistencySettings,
    DiscreteSettings,
    EvaluationSettings,
    ObjectiveName,
    OptimiserSettings,
    SpaceSettings,
    StudentSettings,
    TrainingSettings,
    VelocitySettings,
)


class Config(Section):
    """All settings of one run."""

    seed: int = Field(default=0, ge=0, lt=2**63, description="of every draw; equal seeds give equal runs")
    prompts: str | None = Field(
        default=None,
        description="text, one a line, or jsonl, csv, tsv, parquet; default: the bundled teacher's",
    )
    conditions: str | None = Field(
        default=None,
        description="folder that `stepfold prompts encode` made of the prompts: the text encoder stays out of memory",
    )
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    space: SpaceSettings = SpaceSettings()
    objective: Literal[ObjectiveName, "auto"] = Field(
        default="auto",
        description="continuous-time consistency, discrete consistency between route times, velocity matching; "
        "regression on pairs of a walk's states, two legs for one jump (semigroup), the teacher's velocity where the "
        "student lands (lagrange), two scores compared (matching, decoupled, identity), the teacher's velocity along "
        "the student's own path (policy); auto: continuous for a teacher "
        "whose time is on [0, 1], discrete for one whose time counts to 1000",
    )
    target: TargetSettings = TargetSettings()
    consistency: ConsistencySettings = ConsistencySettings()
    discrete: DiscreteSettings = DiscreteSettings()
    velocity: VelocitySettings = VelocitySettings()
    semigroup: SemigroupSettings = SemigroupSettings()
    policy: PolicySettings = PolicySettings()
    adversarial: AdversarialSettings = AdversarialSettings()
    rollout: RolloutSettings = RolloutSettings()
    fake: FakeSettings = FakeSettings()
    matching: MatchingSettings = MatchingSettings()
    decoupled: DecoupledSettings = DecoupledSettings()
    identity: IdentitySettings = IdentitySettings()
    anchor: AnchorSettings = AnchorSettings()
    reward: RewardSettings = RewardSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _source_of_prompts(self) -> "Config":
        if self.space.images is not None and "images" not in self.space.weights:
            raise ValueError("space.images is for space.kind=images; give both or neither")
        if self.space.images is not None and self.prompts is not None:
            raise ValueError("prompts are the images' own captions with space.kind=images; leave --prompts out")
        if "images" in self.space.weights and self.teacher.sizes is not None:
            raise ValueError("images are all read at one size with space.kind=images; leave teacher.sizes out")
        if "images" in self.space.weights and self.conditions is not None:
            raise ValueError("conditions are those of a prompts file; leave them out with space.kind=images")
        if "images" not in self.space.weights and self.prompts is None and self.teacher.source != "emoji":
            raise ValueError(
                "prompts is missing; give --prompts FILE (only the bundled teacher has prompts of its own)"
            )
        return self

    @model_validator(mode="after")
    def _more_than_one_time(self) -> "Config":
        space = self.space
        alone = space.route_steps - (not space.keep_first) == 1 and "generation" not in space.weights
        if self.objective == "discrete" and alone:
            raise ValueError(
                "objective=discrete with one time a latent would be one teacher step straight to t = 0; give "
                "space.route_steps=16, or objective=continuous"
            )
        return self

    @model_validator(mode="after")
    def _targets_fit(self) -> "Config":
        check_targets(self)
        check_scores(self)
        check_quantised(self)
        return self

    @property
    def student_in_half(self) -> bool:
        """Whether the student computes in bfloat16 whatever its precision: a LoRA on weights that are stored so."""
        return self.student.lora > 0 and self.teacher.dtype == "bfloat16"

    @model_validator(mode="after")
    def _precise_student(self) -> "Config":
        if self.student_in_half and self.training.tangent == "finite_difference":
            raise ValueError(
                "a LoRA student with teacher.dtype=bfloat16 does not go with tangent=finite_difference, since rounding "
                "swamps the difference; leave tangent at auto, or teacher.dtype at float32"
            )
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> "Config":
        phases = self.training.phases
        if (total := sum(phase.steps for phase in phases)) > self.training.steps:
            raise ValueError(
                f"training.phases take {total} steps, but training.steps is {self.training.steps}; "
                f"give training.steps={total} or more"
            )
        for phase in phases:
            if phase.set.get("objective") == "auto":
                raise ValueError("a phase names its objective; give continuous, discrete, velocity or another one")
        if phases:
            try:
                phases_of(self)
            except UserError as error:
                raise ValueError(f"in a phase, {error}") from None
        return self

    @model_validator(mode="after")
    def _shardable(self) -> "Config":
        if self.training.shard == "none":
            return self
        way_out = f"does not go with training.shard={self.training.shard}; leave that at none, or "
        if self.student.lora:
            raise ValueError(f"student.lora {way_out}give the student all weights, student.lora=0")
        if self.adversarial.weight:
            raise ValueError(f"adversarial.weight {way_out}set adversarial.weight=0")
        if self.fake.updates:
            raise ValueError(f"fake.updates {way_out}set fake.updates=0")
        if self.optimiser.name != "adamw":
            raise ValueError(f"optimiser.name={self.optimiser.name} {way_out}set optimiser.name=adamw")
        if self.training.compile:
            raise ValueError(f"training.compile {way_out}set training.compile=false")
        return self


def phases_of(config: Config) -> list[tuple[int, Config]]:
    """The parts of a run: (first step, the settings of its steps), in order.

    Raises:
        UserError: a phase's settings are out of range.
    """
    found, first = [], 0
    for phase in config.training.phases:
        values = config.model_dump()
        values["training"]["phases"] = ()
        for key, value in phase.set.items():
            _assign(values, key, value)
        found.append((first, validate(values)))
        first += phase.steps
    plain = config.model_copy(update={"training": config.training.model_copy(update={"phases": ()})})
    return [*found, (first, plain)] if first < config.training.steps or not found else found


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    folder = resources.files("stepfold") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def preset_purpose(name: str) -> str:
    """The first sentence of the comment that a shipped preset begins with."""
    text = (resources.files("stepfold") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return re.split(r"(?<=\.) ", " ".join(line.removeprefix("# ") for line in comment))[0]


def load_config(preset: str | Config, changes: Sequence[str] = (), **top: Any) -> Config:
    """A preset, changed by `key=value` strings, such as `training.steps=100`.

    Args:
        preset: a name from `preset_names`, the path of a yaml file, or settings themselves.
        changes: dotted keys with yaml values.
        **top: dotted keys (with `__` for the dot) that are set unless None.

    Raises:
        UserError: unknown preset or key, or a value out of range.

    Examples:
        >>> config = load_config("demo", ["training.steps=100"], seed=3)
        >>> config.training.steps, config.objective, config.seed
        (100, 'discrete', 3)
    """
    values = preset.model_dump() if isinstance(preset, Config) else _preset_values(preset)
    for change in [changes] if isinstance(changes, str) else changes:
        key, sep, value = change.partition("=")
        if not sep:
            raise UserError(f"--set {change!r} is not key=value; for example --set training.steps=100")
        _assign(values, key.strip(), _parse_yaml(value, change))
    for key, value in top.items():
        if value is not None:
            _assign(values, key.replace("__", "."), value)
    return validate(values)


def last_of_each(changes: Sequence[str]) -> list[str]:
    """`key=value` strings without those that a later one of the same key replaces."""
    return list({change.partition("=")[0].strip(): change for change in changes}.values())


def _preset_values(preset: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """A preset's settings over those of the one that its own key `preset` names, if it has that key."""
    if preset in above:
        raise UserError(f"preset {preset} builds on itself ({' -> '.join((*above, preset))}); name another one in it")
    if preset in preset_names():
        text = (resources.files("stepfold") / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
    elif _is_file(preset) or preset.endswith((".yaml", ".yml")):
        text = _read(Path(preset))
    else:
        raise UserError(f"unknown preset {preset!r}{nearest(preset, preset_names())}; or give a yaml file")
    values = _parse_yaml(text, preset) or {}
    if not isinstance(values, dict):
        raise UserError(f"{preset} holds no settings; it must be a yaml mapping such as `training: {{steps: 100}}`")
    if "preset" not in values:
        return values
    below = values.pop("preset")
    if not isinstance(below, str):
        raise UserError(f"setting preset is {_short(below)}; it must be the name of one preset, or of a yaml file")
    return _over(_preset_values(below, (*above, preset)), values)


def _over(below: dict[str, Any], values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`below` with `values` in place of its own, section by section; a setting that is a mapping is replaced whole."""
    both = below | values
    for key, value in values.items():
        is_section = isinstance(value, dict) and f"{prefix}{key}" not in setting_names()
        if is_section and isinstance(below.get(key), dict):
            both[key] = _over(below[key], value, f"{prefix}{key}.")
    return both


def validate(values: dict[str, Any]) -> Config:
    """Checks settings and turns the first problem into one line."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"] if "[" not in str(part))  # a union names its members too
        if problem["type"] == "extra_forbidden":
            raise UserError(f"unknown setting {key!r}{nearest(key, setting_names())}") from None
        if not key:
            raise UserError(str(problem["msg"]).removeprefix("Value error, ")) from None
        message = str(problem["msg"]).removeprefix("Value error, ")
        given = "" if isinstance(problem["input"], dict) else f" is {_short(problem['input'])}"
        raise UserError(f"setting {key}{given}: {message}") from None


def setting_names(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted setting names."""
    names = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            names += setting_names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def to_yaml(config: Config) -> str:
    """The settings as yaml, complete, in order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(config: Config, base: Config) -> dict[str, Any]:
    """The settings, nested, that are not the same in `base`."""
    own: dict[str, Any] = {}
    below = base.model_dump(mode="json")
    for key, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            value = {name: each for name, each in value.items() if each != below[key][name]}
        if value != below[key] and value != {}:
            own[key] = value
    return own


def yaml_of(values: dict[str, Any]) -> str:
    """Nested settings as yaml, short sections in one line."""
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)


def from_yaml(path: Path) -> Config:
    """The settings that `to_yaml` wrote, in this version or an earlier one."""
    return validate(renamed(_parse_yaml(_read(path), str(path))))


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    if key not in setting_names():
        raise UserError(f"unknown setting {key!r}{nearest(key, setting_names())}")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(
                f"setting {section} is {_short(values)}, but it is a section; write `{section}: {{{name}: ...}}`"
            )
    values[name] = value


def _short(value: Any) -> str:
    """A value for an error message; aliases make a few lines of yaml into lists of millions."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a number of more digits than that" if abs(value) > 10**40 else str(value)
    return repr(value) if isinstance(value, int | float) else reprlib.repr(value)[:200]


def _is_file(name: str) -> bool:
    """Whether there is such a file; a name that no file can have is none."""
    with suppress(OSError, ValueError):
        return Path(name).is_file()
    return False


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path} has more than {LARGEST_FILE:,} bytes; settings take a few thousand")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a yaml file that is there, saved as UTF-8") from None


LARGEST_FILE = 2**20


class _Loader(yaml.SafeLoader):
    """Safe, with YAML 1.2's booleans: `no` and `off`, which are values of ours, stay words.

    Without merging of mappings, by which a few lines become millions of entries.
    """

    def flatten_mapping(self, node: Any) -> None:
        """Refuses `<<`."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("mappings are not merged with << here, write them out")


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        # PyYAML's constructors raise what theirs do: ValueError for a 13th month, AttributeError for `!!timestamp x`
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        where = where if len(where) < 200 else f"{where[:100]}..."
        raise UserError(f"{where} is not valid yaml ({reason}); stepfold distill --dry-run prints an example") from None
