"""`stepfold export`: a student becomes something else."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from stepfold.commands.options import StudentArgument
from stepfold.jobs.exporting import run_export


def export(
    student: StudentArgument,
    to: Annotated[
        str,
        typer.Option("--to", help="pipeline, lora, single-file, onnx, openvino, web or anyflow.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File or folder to write. Default: beside the student, e.g. student-onnx.", show_default=False
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Fold a flow map for exactly so many steps (pipeline, lora).", show_default=False),
    ] = None,
    keys: Annotated[
        Literal["diffusers", "comfy", "kohya", "peft"] | None,
        typer.Option(
            help="Names in a LoRA: diffusers (the default), comfy for ComfyUI, kohya for the web UIs, peft for a "
            "folder that PEFT loads.",
            show_default=False,
        ),
    ] = None,
    with_loras: Annotated[
        bool,
        typer.Option("--with-loras", help="Carry the teacher's LoRAs too: a file for the base model alone (lora)."),
    ] = False,
    runtime: Annotated[
        Path | None,
        typer.Option(
            help="Folder dist of onnxruntime-web, for --to web. Default: node_modules/onnxruntime-web/dist.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16"] | None,
        typer.Option(
            help="Precision of the weights (pipeline, lora, single-file). Default: the student's own, merged LoRAs "
            "float32.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a student as a pipeline, a LoRA file, a single file for ComfyUI, an onnx graph or a page.

    - `pipeline`: a folder for plain diffusers; a LoRA student is merged into its teacher's network.

    - `lora`: the one file of a LoRA student, for `load_lora_weights`. `--keys comfy` is for ComfyUI, `--keys kohya` for
      ComfyUI, Forge and other web UIs. `--keys peft` makes a folder for PEFT. `--with-loras` adds the LoRAs of the
      teacher, so that the file needs the base model alone.

    - `single-file`: the network under the names of its original checkpoint, for ComfyUI's Load Diffusion Model.

    A file gets its card and, for ComfyUI, a workflow beside it.

    - `onnx`: the network as a graph, for onnxruntime (extra onnx).

    - `openvino`: the network for OpenVINO, in float32 (extra openvino).

    - `web`: a page that samples in the browser without a server, for students of the bundled teacher (extra onnx).

    - `anyflow`: a flow map of Wan for diffusers' AnyFlowPipeline, in any of its card's numbers of steps.

    stepfold export runs/mine/student --to pipeline

    stepfold export runs/mine/student --to lora --keys kohya --out models/loras/mine.safetensors

    stepfold export runs/mine/student --to lora --with-loras --out mine-whole.safetensors

    stepfold export runs/mine/student --to single-file --dtype float16 --out models/diffusion_models/mine.safetensors

    stepfold export runs/map/student --to pipeline --steps 4

    stepfold export emoji-student --to web --out page --runtime node_modules/onnxruntime-web/dist
    """
    from stepfold.display import quiet_libraries

    quiet_libraries()
    target = run_export(
        student, to, out, force=force, steps=steps, keys=keys, runtime=runtime, dtype=dtype, with_loras=with_loras
    )
    typer.echo(f"{to}: {target}")
    if target.is_file():
        from stepfold.export.beside import card_of, workflow_of

        workflow = workflow_of(target)
        typer.echo(f"ComfyUI: {workflow if workflow.is_file() else f'no workflow; {card_of(target)} says why'}")
        typer.echo(f"the file has no scheduler and no times in it: {card_of(target)} says how to sample with it")
