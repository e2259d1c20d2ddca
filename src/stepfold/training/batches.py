"""The batches of a run: prompts drawn, encoded and walked, in the order of the steps."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from stepfold.bank import Bank
from stepfold.config import Config
from stepfold.prompts.reading import Prompts, shuffled_index
from stepfold.randomness import send
from stepfold.scores import critic_spaces
from stepfold.spaces.records import States
from stepfold.teachers.contract import Condition, Teacher
from stepfold.training.draws import Batch, draw, prompt_index, step_samples
from stepfold.training.processes import Processes
from stepfold.training.stages import Stages
from stepfold.training.states import collect
from stepfold.training.step import Phase

Conditions = Callable[[list[int]], Condition]
"""Numbers of B prompts -> what the teacher would encode them to."""
Latents = Callable[[list[int]], Tensor]
"""Numbers of B prompts -> clean latents [B, ...] of their images."""


@dataclass
class Batches:
    """Where a run's batches come from.

    Attributes:
        config: the settings.
        teacher: walked, and asked for conditions.
        prompts: of the run.
        blacks: unit-variance latents of a black picture, one for each of the teacher's latent shapes.
        device: of the networks.
        processes: that share every step.
        stages: notes the time of every stage.
        conditions: of prompts that are encoded already; None to have the teacher do so.
        latents: of images; None where there are none.
        bank: whose couplings are taken in the place of trajectories; None for none.
    """

    config: Config
    teacher: Teacher
    prompts: Prompts
    blacks: list[Tensor]
    device: torch.device
    processes: Processes
    stages: Stages
    conditions: Conditions | None = None
    latents: Latents | None = None
    bank: Bank | None = None
    _encoded: dict[int, Condition] = field(default_factory=dict)

    def walked(self, phase: Phase, step: int) -> tuple[Batch, Condition, dict[str, States]]:
        """The batch of a step, its conditions, and the states of every space that the phase's terms name.

        In a head start, in which the student waits, there are those alone that critics learn from.
        """
        training, number = self.config.training, step // self.config.space.reuse
        with self.stages("data"):
            batch = draw(number, self.prompts, self.teacher, phase.config, self.device, self.processes)
            batch, x0, noise = self.of_bank(batch)
        with self.stages("text"):
            if self.bank and not self.conditions:
                condition = self.teacher.encode(batch.prompts)
            else:
                condition = self.conditions(batch.index) if self.conditions else self.encode_ahead(number)
            if training.compile:
                condition = at_full_length(condition, self.teacher)
        with self.stages("images"):
            x0 = self.latents(batch.index).to(self.device) if self.latents else x0
        spaces = dict.fromkeys(term.space for term in phase.terms_at(step))
        if step - phase.first < phase.head_start:
            needed = critic_spaces(phase.config)
            spaces = {space: None for space in spaces if space in needed}
        with self.stages("teacher"):
            states = collect(
                spaces, batch, condition, phase.networks, phase.config, step,
                black=self.blacks[batch.shape_index], x0=x0, noise=noise,
                pads=self.processes.count > 1,
            )  # fmt: skip
        self.teacher.clear_prompt_cache()  # the memory is the student's now
        return batch, condition, states

    def of_bank(self, batch: Batch) -> tuple[Batch, Tensor | None, Tensor | None]:
        """A batch with prompts, scales, ends and noise of the bank, in the run's own order; as it is without one."""
        if self.bank is None:
            return batch, None, None
        rows = self.bank.rows([shuffled_index(i, len(self.bank), self.config.seed) for i in batch.draws.samples])
        prompts = [self.prompts.prompt(i) for i in rows.prompt]
        batch = replace(batch, index=rows.prompt, prompts=prompts, guidance=send(rows.guidance, self.device))
        return batch, send(rows.x0, self.device), send(rows.noise, self.device)

    def encode_ahead(self, number: int) -> Condition:
        """The condition of batch `number`; its group is encoded with it, the same one however a run began."""
        ahead = self.config.training.encode_ahead
        if number not in self._encoded:
            self._encoded.clear()
            group = number // ahead * ahead
            shares = [self.processes.share(step_samples(n, self.config)) for n in range(group, group + ahead)]
            index = prompt_index(chain.from_iterable(shares), self.prompts, self.config.seed)
            together, size = self.teacher.encode([self.prompts.prompt(i) for i in index]), len(shares[0])
            parts = (together.rows(slice(k * size, (k + 1) * size)) for k in range(len(shares)))
            self._encoded.update(enumerate(parts, group))
            if ahead > 1:
                self.teacher.park_text_encoder()
        return self._encoded[number]


def at_full_length(condition: Condition, teacher: Teacher) -> Condition:
    """With both texts as long as any of the teacher's: equal shapes make one graph, and a resumed run has the same."""
    return condition.padded(max(teacher.max_tokens, condition.mask.shape[1]), teacher.second_tokens)
