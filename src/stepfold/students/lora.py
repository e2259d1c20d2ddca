"""LoRA students: the teacher's own network, its weights shared, with small matrices beside its layers."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stepfold.errors import UserError
from stepfold.maths.policy import Policy
from stepfold.sampling.recipe import Recipe
from stepfold.sampling.samplers import in_diffusers
from stepfold.students.intact import check_shapes, read_weights, shapes_in, shapes_of
from stepfold.students.networks import NetworkStudent
from stepfold.students.policy import HEAD, head_of, load_head, save_policy, widen
from stepfold.students.two_times import load_embedder, save_embedder
from stepfold.students.whole import time_part, weight_start
from stepfold.teachers.contract import Student, deepcopy_sharing
from stepfold.teachers.once import compute_afresh
from stepfold.teachers.pipeline import PipelineTeacher

ALL_WEIGHTS = "give --lora 0, and a smaller rate, such as --lr 1e-5 with --set optimiser.name=came"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


def lora_files(teacher: PipelineTeacher) -> dict[str, str]:
    """Part of the teacher's pipeline -> the file of a student's folder that has its matrices."""
    parts = teacher.network_parts(teacher.transformer)
    return {part: LORA_WEIGHTS if part == teacher.network_part else f"{part}_lora.safetensors" for part in parts}


def lora_student(
    teacher: PipelineTeacher,
    rank: int,
    *,
    convolutions: bool = False,
    two_times: bool = False,
    for_export: bool = True,
    policy: Policy | None = None,
) -> NetworkStudent:
    """A student that shares the teacher's weights; its LoRA matrices start at nothing, so it starts as the teacher.

    Args:
        teacher: whose network is shared; stays as it is.
        rank: of the matrices, on every linear layer of the teacher's `lora_blocks`.
        convolutions: whether the 1 x 1 convolutions of those blocks get matrices too. They hold 47% of Sana's weights.
        two_times: whether the student is told its target time too; the second embedder is trained whole.
        for_export: whether the teacher's pipeline must be able to load it; a critic's network is thrown away.
        policy: the form of a policy student's policy; its last layer is trained whole.

    Raises:
        UserError: peft is not installed, the teacher's pipeline loads no such LoRA, or its network has no place for a
            second time or gives one velocity only.
    """
    if for_export and not teacher.loads_lora:
        raise UserError(f"{type(teacher.pipe).__name__} loads no LoRA; train all weights: {ALL_WEIGHTS}")
    if find_spec("peft") is None:
        raise UserError("student.lora needs peft; pip install peft")
    shared = [*teacher.transformer.parameters(), *teacher.transformer.buffers()]
    network = deepcopy_sharing(teacher.transformer, shared)
    compute_afresh(network.modules())
    for part in teacher.network_parts(network).values():
        add_matrices(teacher, part, rank, convolutions, for_export)
    if policy:
        widen(network, head_of(teacher), policy.nodes)
    part = time_part(teacher, network) if two_times else None
    student = NetworkStudent(network, teacher.predict, weight_start(teacher.latent_shape), part).to(teacher.device)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(teacher.work_dtype)
    taken = {tensor.data_ptr() for tensor in shared}
    student.policy = policy
    student.shared = frozenset(name for name, tensor in student.state_dict().items() if tensor.data_ptr() in taken)
    return student


def add_matrices(teacher: PipelineTeacher, network: Any, rank: int, convolutions: bool, for_export: bool) -> None:
    """Gives one of the pipeline's networks its matrices; arguments as of `lora_student`."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = lora_layers(teacher, network, convolutions)
    if for_export and convolutions and not any(is_pointwise(layer) for layer in layers.values()):
        raise UserError(
            f"a {type(network).__name__} has no 1 x 1 convolutions in its blocks; leave student.lora_convolutions off"
        )
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
    if teacher.loads_lora:
        network.add_adapter(config)
    else:  # diffusers gives networks whose pipelines load no LoRA no such method
        inject_adapter_in_model(config, network)


def lora_layers(teacher: PipelineTeacher, network: Any, convolutions: bool) -> dict[str, Any]:
    """Name -> layer of one of the pipeline's networks that gets matrices; arguments as of `lora_student`."""
    return {
        name: layer
        for name, layer in network.named_modules()
        if any(part in name for part in teacher.lora_blocks)
        and (isinstance(layer, nn.Linear) or (convolutions and is_pointwise(layer)))
    }


def is_pointwise(module: nn.Module) -> bool:
    """Whether it is a 1 x 1 convolution over all channels: a linear layer at every place of a picture."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def save_lora(teacher: PipelineTeacher, student: Student, folder: Path, recipe: Recipe) -> None:
    """Writes a LoRA student in diffusers' own format, its second embedder if it has one, and its scheduler.

    Each network of the pipeline has a file of its own, under the names of the first.
    """
    from peft import get_peft_model_state_dict

    network: Any = student.get_submodule("transformer")
    parts = teacher.network_parts(network)
    for part, file in lora_files(teacher).items():
        options = {f"{teacher.network_part}_lora_layers": get_peft_model_state_dict(parts[part])}
        teacher.pipe.save_lora_weights(folder, weight_name=file, **options)
    teacher.lora_scheduler(in_diffusers(recipe.sampler)).save_config(folder / "scheduler")
    save_embedder(student, folder)
    save_policy(teacher, student, folder, recipe, lora=True)


def lora_shapes(teacher: PipelineTeacher, network: Any, rank: int, convolutions: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor that the file of a network's matrices has.

    Args:
        teacher: whose networks get matrices.
        network: one of them, without matrices yet.
        rank, convolutions: as of `lora_student`.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, layer in lora_layers(teacher, network, convolutions).items():
        linear = isinstance(layer, nn.Linear)
        inputs, outputs = (layer.in_features, layer.out_features) if linear else (layer.in_channels, layer.out_channels)
        kernel, layer_name = () if linear else (1, 1), f"{teacher.network_part}.{name}"
        found[f"{layer_name}.lora_A.weight"] = (rank, inputs, *kernel)
        found[f"{layer_name}.lora_B.weight"] = (outputs, rank, *kernel)
    return found


def read_matrices(
    teacher: PipelineTeacher, folder: Path, rank: int, *, convolutions: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Part of the teacher's pipeline -> its matrices in a student's folder, under the names of their file.

    Arguments as of `lora_student`; the teacher's networks have no matrices.

    Raises:
        UserError: a file is missing, damaged, or does not have the student's own matrices and no others. The libraries
            leave out what they do not know, and start at nothing where there is none.
    """
    found, parts = {}, teacher.network_parts(teacher.transformer)
    for part, file in lora_files(teacher).items():
        check_file(path := folder / file)
        found[part] = read_weights(path)
        check_shapes(path, shapes_of(found[part]), lora_shapes(teacher, parts[part], rank, convolutions))
    if (head := folder / HEAD).is_file():
        shapes_in(head)  # refused where it is cut
    return found


def check_file(file: Path) -> None:
    """Refuses a folder without the student's matrices, such as an export for PEFT.

    Raises:
        UserError: they are not there.
    """
    if not file.is_file():
        raise UserError(
            f"{file.parent} lacks {file.name}; give the student's own folder, not an export, or copy it again"
        )


def load_lora(
    teacher: PipelineTeacher,
    folder: Path,
    rank: int,
    *,
    convolutions: bool = False,
    two_times: bool = False,
    policy: Policy | None = None,
) -> NetworkStudent:
    """The LoRA student that `save_lora` wrote; arguments as of `lora_student`.

    Raises:
        UserError: a file is missing, damaged or not the student's.
    """
    from peft import set_peft_model_state_dict

    matrices = read_matrices(teacher, folder, rank, convolutions=convolutions)
    student = lora_student(teacher, rank, convolutions=convolutions, two_times=two_times, policy=policy)
    load_embedder(student, folder)
    load_head(teacher, student.transformer, folder, policy)
    parts, prefix = teacher.network_parts(student.transformer), f"{teacher.network_part}."
    for part, weights in matrices.items():
        set_peft_model_state_dict(parts[part], {name.removeprefix(prefix): weights[name] for name in weights})
    return student
