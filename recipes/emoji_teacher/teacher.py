"""The bundled teacher: a tiny SanaPipeline (tokenizer, Gemma2 text encoder, SanaTransformer2DModel, AutoencoderDC)."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from autoencoder import save_grid, to_bytes, to_unit
from fit import device, fit
from render import COLOURED, COLOURS, NAMES, PLAIN, Renders, prompt_for

PROMPT_TOKENS = 24  # what training pads to; the pipeline itself pads to 300, which attention masks out
INSTRUCTION = "<instruction>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the training prompts is one token.

    diffusers' SanaPipeline puts a long instruction that ends in "User Prompt: " before every prompt. A teacher of this
    size has no use for it, so the normaliser folds it into one token, and the pipeline's default arguments work.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"[\s\S]*User Prompt:\s*"), INSTRUCTION), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [p.format(name=n, colour=c) for n in NAMES for c in COLOURS for p in PLAIN + COLOURED]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=2048,
            special_tokens=["<pad>", "<eos>", "<bos>", AddedToken(INSTRUCTION, normalized=True, special=True)],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="right"
    )


def make_text_encoder(vocab_size: int) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, max_position_embeddings=1024,
            sliding_window=1024, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )
    )  # fmt: skip


def make_transformer() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=16, out_channels=16, num_attention_heads=6, attention_head_dim=32, num_layers=6,
        num_cross_attention_heads=6, cross_attention_head_dim=32, cross_attention_dim=192, caption_channels=128,
        mlp_ratio=2.5, sample_size=8, patch_size=1, qk_norm="rms_norm_across_heads",
        timestep_scale=0.001,  # the scheduler counts to 1000; the network's time is on [0, 1]
    )  # fmt: skip


class TextToLatent(nn.Module):
    """Text encoder and transformer under one optimiser."""

    def __init__(self, text_encoder: Gemma2Model, transformer: SanaTransformer2DModel) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer

    def forward(self, ids: Tensor, mask: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Token ids and mask [b, l], x [b, 16, 8, 8], t [b] in [0, 1] -> velocity [b, 16, 8, 8]."""
        embeds = self.text_encoder(ids, attention_mask=mask)[0]
        return self.transformer(x, embeds, timestep=t, encoder_attention_mask=mask, return_dict=False)[0]


@torch.no_grad()
def encode_renders(vae: AutoencoderDC, renders: Renders, batch: int = 128) -> tuple[Tensor, float]:
    """All renders as latents of unit standard deviation (bfloat16 [n, 16, 8, 8]), and the factor that made it one."""
    parts = []
    for i in range(0, len(renders.images), batch):
        with torch.autocast(device().type, torch.bfloat16):
            parts.append(vae.encode(to_unit(renders.images[i : i + batch])).latent.bfloat16())
    z = torch.cat(parts)
    factor = 1 / z.float().std().item()
    return (z * factor).bfloat16(), factor


def sample_prompt(name: int, colour: int, rng: np.random.Generator) -> str:
    """A training prompt: 10% empty for guidance; the rest mostly with the pipeline's instruction, as in use."""
    if rng.random() < 0.1:
        return ""
    return ("User Prompt: " if rng.random() < 0.85 else "") + prompt_for(NAMES[name], list(COLOURS)[colour], rng)


def train_teacher(
    latents: Tensor, renders: Renders, vae: AutoencoderDC, work: Path, steps: int, batch: int
) -> SanaPipeline:
    """Flow matching on latents: x_t = (1 - t) x_0 + t z, the network predicts z - x_0."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = TextToLatent(make_text_encoder(len(tokenizer)), make_transformer()).to(device())
    model.transformer.compile(dynamic=False)  # in place; a minute's wait for a step that is 1.4 times as fast

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((2, step))
        generator = torch.Generator().manual_seed(step)
        rows = rng.integers(len(latents), size=batch)
        prompts = [sample_prompt(int(renders.name[i]), int(renders.colour[i]), rng) for i in rows]
        tokens = tokenizer(
            prompts, padding="max_length", max_length=PROMPT_TOKENS, truncation=True, return_tensors="pt"
        )
        x0 = latents[torch.from_numpy(rows)].to(device()).float()
        z = torch.randn(x0.shape, generator=generator).to(x0)
        t = torch.sigmoid(0.2 + 1.1 * torch.randn(batch, generator=generator)).to(x0)
        t = torch.where(
            torch.rand(batch, generator=generator).to(x0) < 0.15, torch.rand(batch, generator=generator).to(x0), t
        )
        t4 = t.view(-1, 1, 1, 1)
        # On a CPU the backward pass of fused attention in bfloat16 is seven times slower than plain attention's.
        with torch.autocast(device().type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            v = model(tokens.input_ids.to(device()), tokens.attention_mask.to(device()), (1 - t4) * x0 + t4 * z, t)
        return (v.float() - (z - x0)).square().mean(), {}

    def pipeline(average: TextToLatent) -> SanaPipeline:
        pipe = SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=average.text_encoder,
            vae=vae,
            transformer=average.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def preview(average: TextToLatent, step: int) -> None:
        average.eval()
        shown = [
            NAMES[i] + " on " + c + " background" for i, c in zip(range(3, 320, 13), 2 * list(COLOURS), strict=False)
        ]
        images = pipeline(average)(
            shown, height=64, width=64, use_resolution_binning=False, output_type="pt",
            max_sequence_length=PROMPT_TOKENS, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        save_grid(to_bytes(images * 2 - 1), 12, work / f"grid_{step:06d}.png")
        pipeline(average).save_pretrained(work / "pipeline")

    average = fit(
        model,
        loss_at,
        work,
        steps=steps,
        lr=1e-3,
        lr_muon=2.5e-3,
        warmup=200,
        cooldown=0.4,
        ema=0.999,
        preview=preview,
        every=500,
    )
    return pipeline(average)
