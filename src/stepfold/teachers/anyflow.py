"""What diffusers' AnyFlowPipeline, for networks of Wan's kind that are told both times, is built of."""

from typing import Any

from torch import Tensor

from stepfold.maths.formulations import flow_time


def timesteps(t: Tensor) -> Tensor:
    """What the network is told of times t [B], as it counts them: to 1000."""
    return 1000 * flow_time(t)


def anyflow_classes() -> tuple[Any, Any, Any]:
    """Pipeline, network and scheduler of diffusers for networks of Wan's kind that are told both times."""
    from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

    return AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler
