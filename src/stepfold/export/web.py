"""A student as a page that samples in the browser: its graphs and onnxruntime-web, in one folder."""

import base64
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepfold import assets
from stepfold.errors import UserError
from stepfold.export.onnx import check_libraries, network_graph, to_program, tracing
from stepfold.students.card import CARD, Card, write_card
from stepfold.students.loading import load_merged
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.sana import GemmaTexts
from stepfold.training.runs import writing

PAGE = Path(__file__).parent / "page"
RUNTIME = {"ort.mjs": "ort.webgpu.bundle.min.mjs", "ort.wasm": "ort-wasm-simd-threaded.asyncify.wasm"}
"""Name in the page -> file of onnxruntime-web; they compute on the CPU, and on the GPU of a browser with WebGPU."""

USUAL_RUNTIME = Path("node_modules/onnxruntime-web/dist")
NUM_STEPS = (1, 2, 4)
HALVED_FROM = 1024  # values of a weight; smaller ones stay in float32

README = """# A few-step student of `{teacher}`, as a page

Open `index.html` in a browser. The student samples there: no server computes, and the page asks no other host for
anything. It works from a disk and from any host of static files.

| file | holds |
|---|---|
| `index.html`, `page.js` | the page: tokens, noise, steps and pixels |
| `student.js` | the times of each number of steps, the vocabulary |
| `graphs.js` | text encoder, network and decoder as onnx graphs, with weights in float16 |
| `runtime.js` | onnxruntime-web (MIT licence), from `npm install onnxruntime-web`; tested with 1.30 |
| `{card}` | the student's card, which the page does not read |

The graphs compute in float32, on the CPU by WebAssembly, or on the GPU where the browser has WebGPU. An address that
ends in `index.html?wasm` takes the CPU.
"""


class TextGraph(nn.Module):
    """A text encoder behind an instruction: embeddings of the prompt's own tokens."""

    def __init__(self, encoder: nn.Module, max_tokens: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.max_tokens = max_tokens

    def forward(self, ids: Tensor, ids_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and their mask, int64 [1, N] -> embeds [1, L, D] and mask [1, L]: the first token, and the last L - 1."""
        embeds = self.encoder(ids, attention_mask=ids_mask)[0]
        last = ids.shape[1] - self.max_tokens + 1
        return torch.cat([embeds[:, :1], embeds[:, last:]], 1), torch.cat([ids_mask[:, :1], ids_mask[:, last:]], 1)


class DecoderGraph(nn.Module):
    """A teacher's autoencoder, from unit-variance latents to pixels."""

    def __init__(self, teacher: PipelineTeacher, autoencoder: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self.autoencoder: Any = autoencoder

    def forward(self, x: Tensor) -> Tensor:
        """Latents [1, C, H, W] -> pixels [3, H, W] in [0, 1]."""
        decoded = self.autoencoder.decode(self.teacher.autoencoder_latents(x), return_dict=False)[0]
        return (decoded[0] / 2 + 0.5).clamp(0, 1)


def export_web(folder: Path, out: Path, runtime: Path | None = None) -> None:
    """A folder with a page that samples with the student in any browser, without a server.

    Args:
        folder: of the student.
        out: folder to write.
        runtime: `dist` of onnxruntime-web; None for the one below `node_modules` here.

    Raises:
        UserError: onnxruntime-web is not there, the page cannot tokenise for this student or sample with it, or torch
            cannot make its graphs.
    """
    runtime = runtime or USUAL_RUNTIME
    for name in RUNTIME.values():
        if not (runtime / name).is_file():
            raise UserError(
                f"--runtime {runtime} has no {name}; npm install onnxruntime-web, then give its folder "
                "node_modules/onnxruntime-web/dist"
            )
    check_libraries("web")
    teacher, student, card = load_merged(folder, "cpu")
    if card.recipe.sampler != "consistency":
        raise UserError(
            f"{folder} is a {card.recipe.sampler} student, and the page samples consistency models; use --to onnx"
        )
    tokenizer = tokenizer_of(folder, teacher)
    network, inputs = network_graph(folder, teacher, student, card)
    with tracing(folder):
        ids = torch.zeros(1, tokenizer["length"], dtype=torch.long)
        encoder = teacher.pipe.text_encoder
        encoder.set_attn_implementation("eager")
        text = to_program(TextGraph(encoder, teacher.max_tokens), {"ids": ids, "ids_mask": ids + 1}, ["embeds", "mask"])
        x = inputs["x"]
        assert x is not None
        teacher.decode(x[:1])  # loads the autoencoder
        decoder = to_program(DecoderGraph(teacher, teacher.pipe.vae), {"x": x[:1]}, ["pixels"])
    graphs = {"text.onnx": text, "network.onnx": network, "decoder.onnx": decoder}
    with writing(out) as part:
        shutil.copytree(PAGE, part)
        (part / "student.js").write_text(script("stepfold.student", facts_of(teacher, card, tokenizer)))
        (part / "graphs.js").write_text(packed({name: in_half(each.model_proto) for name, each in graphs.items()}))
        files = {name: (runtime / file).read_bytes() for name, file in RUNTIME.items()}
        (part / "runtime.js").write_text(packed(files))
        (part / "README.md").write_text(README.format(teacher=card.teacher, card=CARD))
        write_card(part, card.model_copy(update={"merged": True}))


def facts_of(teacher: PipelineTeacher, card: Card, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What the page knows of a student."""
    times = card.recipe.times
    return {
        "title": f"A few-step student of {card.teacher}",
        "times": {n: times[n] for n in NUM_STEPS if n in times} or times,
        "guidance": card.recipe.guidance,
        "shape": list(teacher.latent_shape),
        "height": teacher.height,
        "width": teacher.width,
        "tokenizer": tokenizer,
    }


def tokenizer_of(folder: Path, teacher: PipelineTeacher) -> dict[str, Any]:
    """A student's tokenizer as the page's own code reads it.

    Raises:
        UserError: it is of another kind than the bundled teacher's: byte-level BPE behind Sana's instruction.
    """
    ours = json.loads((assets.TEACHER / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    backend = getattr(teacher.pipe.tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend else {"model": {}}
    if not isinstance(teacher, GemmaTexts) or kind_of(rules) != kind_of(ours):
        raise UserError(
            f"{folder} reads prompts with another tokenizer than the bundled teacher's, and the page knows that one "
            "alone; use --to onnx"
        )
    instruction, before = teacher.before_prompts(teacher.pipe)
    return {
        "instruction": instruction,
        "length": before + teacher.max_tokens,
        "pad": teacher.pipe.tokenizer.pad_token_id,
        "begin": next(iter(rules["post_processor"]["special_tokens"])),
        "raw": [token["content"] for token in rules["added_tokens"] if not token["normalized"]],
        "normalised": [token["content"] for token in rules["added_tokens"] if token["normalized"]],
        "vocab": rules["model"]["vocab"],
        "merges": rules["model"]["merges"],
    }


def kind_of(rules: dict[str, Any]) -> dict[str, Any]:
    """What a tokenizer.json says beside its vocabulary, and beside lengths, which a call gives."""
    own = ("truncation", "padding", "model")
    model = {name: value for name, value in rules["model"].items() if name not in ("vocab", "merges")}
    return {name: value for name, value in rules.items() if name not in own} | {"model": model}


def in_half(model: Any) -> bytes:
    """An onnx model whose large weights are stored in float16, where they fit, and computed with in float32."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        if weight.data_type != TensorProto.FLOAT or values.size < HALVED_FROM:
            continue
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.isfinite(half).all():
            name = weight.name
            weight.CopyFrom(numpy_helper.from_array(half, f"{name}_half"))
            casts.append(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def packed(files: dict[str, bytes]) -> str:
    """A script that hands files to the page: base64 of gzip, since a page on a disk may not fetch."""
    return "".join(
        script(f'stepfold.files["{name}"]', base64.b64encode(gzip.compress(data, mtime=0)).decode())
        for name, data in files.items()
    )


def script(name: str, value: Any) -> str:
    """A line of JavaScript that sets a name."""
    return f"{name} = {json.dumps(value)};\n"
