"""What the paper says beside its tables, each with what our numbers say of it; METHOD's section on its analyses.

A claim is a function from the numbers of the figures and the records of the tables to a verdict and its reason, or to
nothing while its numbers are missing.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from stepfold.reproduction.records import Verdict, is_less, scored, values_of

Records = list[dict[str, Any]]
Tables = dict[str, dict[str, Records]]
FORWARD, BACKWARD = "noise_forward", "noise_backward"
CONSTANT = 0.999
"""Cosine similarity above which an equivalent noise counts as unchanged."""
VAE_SHARE, TEXT_SHARE = 0.8, 0.5
"""The shares that the paper names; half of them counts as the same finding at our size."""


@dataclass(frozen=True)
class Finding:
    """What we found: a sentence with its numbers, and the verdict."""

    here: str
    verdict: Verdict


def noise_drifts(figures: dict[str, Any], tables: Tables) -> Finding | None:
    """Figs. 3 and 8: equivalent noise is constant on the forward process and drifts on the backward one."""
    if not figures:
        return None
    walks = figures["walks"]["schemes"]["reference"]
    last, lowest = walks["t"][-1], min(walks[FORWARD])
    here = (
        f"cosine similarity to the first noise at t = {last:.2f}: {walks[FORWARD][-1]:.3f} on the forward process, "
        f"{walks[BACKWARD][-1]:.3f} on the walk ({len(figures['walks']['darkness'])} walks)"
    )
    return Finding(here, "reproduced" if walks[BACKWARD][-1] < CONSTANT < lowest else "not reproduced")


def pictures_sharpen(figures: dict[str, Any], tables: Tables) -> Finding | None:
    """Fig. 9: the x_0 that the velocity points at gets better all along the walk."""
    if not figures:
        return None
    errors = figures["walks"]["schemes"]["reference"]["picture_error"]
    third = len(errors) // 3
    told = ", ".join(f"{errors[i]:.2g}" for i in (0, third, 2 * third, -2))
    falls = all(later < earlier for earlier, later in pairwise(errors))
    here = f"its error to the walk's end, from noise to the last step but one: {told} latent variances"
    return Finding(here, "reproduced" if falls else "not reproduced")


def encoder_takes_memory(figures: dict[str, Any], tables: Tables) -> Finding | None:
    """Fig. 4: VAE encoding is about 80% of sCM's peak memory."""
    rows = tables.get("T3", {})
    whole = values_of(rows.get("sCM over images", []), "peak_memory_gib")
    without = values_of(rows.get("sCM over images, latents encoded before", []), "peak_memory_gib")
    if not whole or not without:
        return None
    share = 1 - statistics.mean(without) / statistics.mean(whole)
    change = f"{abs(100 * share):.0f}% {'lower' if share > 0 else 'higher'}"
    here = f"sCM's peak is {change} with latents encoded before; this autoencoder is tiny, at 64 pixels"
    return Finding(here, "reproduced" if share > VAE_SHARE / 2 else "not reproduced")


def text_takes_time(figures: dict[str, Any], tables: Tables) -> Finding | None:
    """Fig. 4: text encoding takes about as long as the distillation itself, until one prompt serves N samples."""
    shares = []
    for row in ("sCM over images", "TBCM"):
        stages = [r["stages_sec"] for r in scored(tables.get("T3", {}).get(row, [])) if r["stages_sec"]]
        shares.append([s.get("text", 0.0) / sum(s.values()) for s in stages])
    if not all(shares):
        return None
    ours, theirs = (statistics.mean(of_row) for of_row in (shares[1], shares[0]))
    here = f"text is {100 * theirs:.1f}% of sCM's step and {100 * ours:.1f}% of TBCM's; this text encoder is tiny"
    return Finding(here, "reproduced" if theirs > TEXT_SHARE / 2 and ours < theirs else "not reproduced")


def diversity_falls(figures: dict[str, Any], tables: Tables) -> Finding | None:
    """The limits it admits: possible loss of diversity, mild mode collapse."""
    records = scored(tables.get("T2", {}).get("TBCM", []))
    if len(records) < 2:
        return None
    student = [r["student"]["1"]["diversity"] for r in records]
    teacher = next(iter(records[0]["teacher"].values()))["diversity"]
    spread = f"{statistics.mean(student):.3f} ± {statistics.stdev(student):.3f}"
    answers: dict[bool | None, Verdict] = {True: "reproduced", False: "not reproduced", None: "not distinguishable"}
    less = answers[is_less(student, [teacher] * len(student))]
    return Finding(f"diversity of one step {spread}, of the teacher {teacher:.3f}", less)


def cannot(reason: str) -> Callable[[dict[str, Any], Tables], Finding | None]:
    """A claim about what cannot be had here."""
    return lambda figures, tables: Finding(reason, "not measurable here")


CLAIMS: dict[str, Callable[[dict[str, Any], Tables], Finding | None]] = {
    "One step reaches FID 6.52 and CLIP score 28.08 on MJHQ-30k at 1024 pixels, from Sana 0.6B "
    "(Sana-Sprint: 7.04 and 28.04).": cannot(
        "needs the weights of Sana 0.6B, MJHQ-30k and a GPU; `stepfold evaluate --protocol mjhq30k` measures it"
    ),
    "Equivalent noise is constant on the forward process and drifts on the backward one (Figs. 3, 8).": noise_drifts,
    "The picture that a state points at gets better along the walk (Fig. 9).": pictures_sharpen,
    "VAE encoding is about 80% of sCM's peak memory (Fig. 4).": encoder_takes_memory,
    "Text encoding takes as long as distillation, until one prompt serves N samples (Fig. 4).": text_takes_time,
    "Its limits: students may lose diversity (mild mode collapse).": diversity_falls,
}
"""What the paper says -> what our numbers say."""
