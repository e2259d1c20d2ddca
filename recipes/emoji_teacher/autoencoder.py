"""The teacher's AutoencoderDC: 64 x 64 x 3 -> 8 x 8 x 16."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from PIL import Image
from torch import Tensor

from fit import device, fit
from render import Renders

CONFIG: dict[str, Any] = dict(
    in_channels=3,
    latent_channels=16,
    encoder_block_out_channels=(32, 64, 128, 128),
    decoder_block_out_channels=(32, 64, 128, 128),
    encoder_layers_per_block=(0, 1, 1, 1),  # 0: no blocks at full resolution, which is where the time goes
    decoder_layers_per_block=(0, 2, 1, 1),
    encoder_qkv_multiscales=((), (), (), ()),
    decoder_qkv_multiscales=((), (), (), ()),
)
LATENT_NOISE = (
    0.08  # standard deviation, relative to the latents': the decoder must forgive small errors of the teacher
)


def to_unit(images: np.ndarray) -> Tensor:
    """uint8 [n, 64, 64, 3] -> float32 [n, 3, 64, 64] in [-1, 1], on the device."""
    return torch.from_numpy(images).to(device()).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_bytes(images: Tensor) -> np.ndarray:
    """float [n, 3, 64, 64] in [-1, 1] -> uint8 [n, 64, 64, 3]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_grid(images: np.ndarray, columns: int, path: Path) -> None:
    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, len(images), columns)]
    Image.fromarray(np.concatenate(rows)).resize((columns * 96, len(rows) * 96), Image.Resampling.NEAREST).save(path)


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def train_autoencoder(renders: Renders, work: Path, steps: int, batch: int = 32) -> AutoencoderDC:
    """L1 on pixels and on their gradients, with noise on the latents and a pull of the latents towards unit scale."""
    torch.manual_seed(0)
    vae = AutoencoderDC(**CONFIG).to(device())

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((1, step))
        x = to_unit(renders.images[rng.integers(len(renders.images), size=batch)])
        with torch.autocast(device().type, torch.bfloat16):
            z = vae.encode(x, return_dict=False)[0].float()
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(step)).to(z)
            y = vae.decode(z + LATENT_NOISE * noise, return_dict=False)[0].float()
        pixel = F.l1_loss(y, x)
        edge = sum(F.l1_loss(a, b) for a, b in zip(gradients(y), gradients(x), strict=True))
        pull = z.square().mean() - 1
        return pixel + 0.5 * edge + 0.01 * pull.square() + 0.002 * z.square().mean(), {
            "pixel": pixel.item(),
            "edge": edge.item(),
            "latent_std": z.std().item(),
        }

    shown = renders.images[:: max(1, len(renders.images) // 24)][:24]

    @torch.no_grad()
    def preview(average: AutoencoderDC, step: int) -> None:
        y = average.decode(average.encode(to_unit(shown)).latent).sample
        save_grid(np.concatenate([shown, to_bytes(y)]), 12, work / "reconstructions.png")

    return fit(vae, loss_at, work, steps=steps, lr=2e-3, warmup=50, ema=0.995, preview=preview)
