"""What a run watches about itself while it trains, and what it does about it: the recipe's section `health`.

Every rank judges the same numbers, which travel with the step's own, and so comes to the same conclusion.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from data.making_time import MakingTime
from distrib.copies import checksum, odd_ranks
from distrib.engine import CanonicalState, Engine
from distrib.finite import not_finite
from distrib.reduction import LIMBS, limbs_of_word, word_of_limbs
from launch.exit_codes import DO_NOT_RESTART, FAILED, RunEnded
from launch.findings import Findings, name_ranks
from launch.health_config import HealthConfig
from launch.ledger import Ledger
from launch.spikes import Spike, SpikeDetector
from launch.stragglers import PACE_NUMBERS, Stragglers

log = logging.getLogger("lockstep")
_SHOWN = 8


class Health:
    """Judges the steps of an attempt in their order.

    samples: the ids of the samples that the last committed step read. saved_step: waits for a save in flight, and returns the
    step of the newest checkpoint; all ranks call it together.
    """

    def __init__(
        self,
        config: HealthConfig,
        engine: Engine,
        *,
        samples: Callable[[], list[str]],
        saved_step: Callable[[], int | None],
    ) -> None:
        self._config = config
        self._engine = engine
        self._world = engine.world
        self._samples = samples
        self._saved_step = saved_step
        self._spikes = SpikeDetector(config.spike_window_steps, config.spike_deviations)
        self._stragglers = Stragglers(config, engine)
        self._compares_copies = config.compare_replicas_every_steps is not None and engine.copies() is not None
        if self._world.size > 1 and config.compare_replicas_every_steps and not self._compares_copies:
            log.info("replicas are not compared: every weight is on one rank alone; parallel.replicas=2 would keep two")

    def watch_data(self, making_time: MakingTime) -> None:
        """From now on the ranks compare how long each takes to make its part of the steps, too."""
        self._stragglers.watch_data(making_time)

    # --- a step ------------------------------------------------------------------------------------------------------

    def vitals(self, data_wait_seconds: float) -> torch.Tensor | None:
        """After a step was begun that has waited so long for its data: what this rank tells the others of itself.
        (PACE_NUMBERS + LIMBS,) float64, how fast it is and a checksum, in the steps in which the ranks compare either; else
        None."""
        step = self._engine.steps_done
        self._stragglers.step_was_begun(step, data_wait_seconds)
        paces, copies = self._stragglers.compares_at(step), self._compares_copies_at(step)
        if not paces and not copies:
            return None
        own = self._stragglers.own_numbers() if paces else [0.0] * PACE_NUMBERS
        pace = torch.tensor(own, dtype=torch.float64)
        sums = limbs_of_word(self._checksum()) if copies else torch.zeros(LIMBS, dtype=torch.float64)
        return torch.cat([pace.to(sums.device, non_blocking=True), sums])

    def judge(self, record: dict[str, Any], vitals: Sequence[Sequence[float]], ledger: Ledger) -> Findings:
        """Looks at a committed step's record, and at what the ranks told of themselves in it."""
        findings = Findings()
        step = ledger.step
        if record["skipped"]:
            self._judge_skip(ledger, findings)
        elif self._config.loss_spike != "ignore" and (spike := self._spikes.judge(record["loss"])) is not None:
            self._judge_spike(spike, step, findings)
        if self._stragglers.compares_at(step):
            self._stragglers.judge([numbers[:PACE_NUMBERS] for numbers in vitals], step, findings)
        if self._compares_copies_at(step):
            sums = [word_of_limbs(numbers[PACE_NUMBERS:]) for numbers in vitals]
            self._judge_copies(sums, step, findings)
        return findings

    def as_scalars(self) -> dict[str, Any]:
        """What a checkpoint must hold, so that a resumed run judges as this one would."""
        return {"spikes": self._spikes.as_scalars()}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        self._spikes.load_scalars(scalars["spikes"])

    # --- losses and gradients ----------------------------------------------------------------------------------------

    def _judge_skip(self, ledger: Ledger, findings: Findings) -> None:
        """A run that skips step after step learns nothing, and costs what a good one costs."""
        step, limit = ledger.step, self._config.max_skipped_in_a_row
        findings.warnings.append(f"step {step}: skipped, its gradient is not finite; weights stay as they were")
        if limit is not None and ledger.skipped_in_a_row >= limit:
            findings.ending = RunEnded(
                f"step {step}: the gradient was not finite in {limit} steps in a row (health.max_skipped_in_a_row); "
                f"weights are those of step {step - limit}; {self._name_samples(step)}; lower optimizer.lr, or look at these "
                "samples",
                DO_NOT_RESTART,
                told_by_all=True,
            )

    def _judge_spike(self, spike: Spike, step: int, findings: Findings) -> None:
        findings.columns["loss_spike"] = spike.deviations
        stop = self._config.loss_spike == "stop"
        if spike.continues and not stop:
            return  # told once: a level that stays is in the window soon
        told = (
            f"step {step}: loss {spike.loss:.4g} is a spike, {spike.deviations:.1f} deviations above {spike.median:.4g}, the "
            f"median of {self._config.spike_window_steps} losses before it; {self._name_samples(step)}"
        )
        if not stop:
            findings.warnings.append(told)
            return
        findings.ending = RunEnded(
            f"{told}; {self._newest_checkpoint()}; lower optimizer.lr, look at these samples, or go on over it with "
            "health.loss_spike=warn",
            DO_NOT_RESTART,
            told_by_all=True,
        )

    def _name_samples(self, step: int) -> str:
        ids = self._samples()
        log.info("step %d read the samples %s", step, ", ".join(ids))
        more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
        return f"the samples of step {step} are {', '.join(ids[:_SHOWN])}{more}"

    def _newest_checkpoint(self) -> str:
        saved = self._saved_step()
        return "there is no checkpoint before it" if saved is None else f"the newest checkpoint is of step {saved}"

    # --- replicas that differ ----------------------------------------------------------------------------------------

    def _compares_copies_at(self, step: int) -> bool:
        every = self._config.compare_replicas_every_steps
        return self._compares_copies and every is not None and step % every == 0

    def _checksum(self) -> torch.Tensor:
        copies = self._engine.copies()
        assert copies is not None
        return checksum(copies.tensors.values())

    def _judge_copies(self, checksums: list[int], step: int, findings: Findings) -> None:
        copies = self._engine.copies()
        assert copies is not None
        odd = odd_ranks(checksums, copies.shards)
        if not odd:
            return
        findings.columns["differing_ranks"] = odd
        told = f"step {step}: {self._describe_difference(odd, copies.tensors, copies.shards)}"
        if self._config.differing_replicas == "warn":
            findings.warnings.append(f"{told}; nothing is saved from here on")
            return
        findings.ending = RunEnded(
            f"{told}; {self._newest_checkpoint()}, in which all agreed: start again from there (--resume auto), and look at the "
            "memory of that machine if it happens again",
            FAILED,
            told_by_all=True,
        )

    def _describe_difference(self, odd: list[int], tensors: dict[str, torch.Tensor], shards: int) -> str:
        """Which ranks hold other bytes, and where. All ranks compute it together."""
        sums = {name: int(checksum([tensor]).item()) for name, tensor in tensors.items()}
        by_rank = self._world.gather_objects(sums)
        names = [name for name in sums if odd_ranks([one[name] for one in by_rank], shards)]
        for rank, one in enumerate(by_rank):
            log.error("rank %d: checksums %s", rank, {name: f"{one[name] & (2**64 - 1):016x}" for name in names})
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        where = shown or "what has changed since"
        return f"ranks that must hold the same bytes differ: {name_ranks(self._world, odd)}, in {where}"

    # --- before a checkpoint -----------------------------------------------------------------------------------------

    def why_not_to_save(self, state: CanonicalState, step: int) -> str | None:
        """Why this state must not become a checkpoint; None: it may. All ranks call it together.

        Raises RunEnded where the run must not go on either: what is not finite never heals, and copies that differ end it
        where the recipe says stop.
        """
        trained = {f"model.{name}" for name, p in self._engine.module.named_parameters() if p.requires_grad}
        own_checksum = int(self._checksum().item()) if self._compares_copies else 0
        told = self._world.gather_objects((not_finite(state.tensors, trained), own_checksum))
        bad = sorted({name for names, _ in told for name in names})
        if bad:
            shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
            raise RunEnded(
                f"step {step}: not finite: {shown}; it was not saved; {self._newest_checkpoint()}; lower optimizer.lr",
                DO_NOT_RESTART,
                told_by_all=True,
            )
        if not self._compares_copies:
            return None
        findings = Findings()
        self._judge_copies([number for _, number in told], step, findings)
        if findings.ending is not None:
            raise findings.ending
        return findings.warnings[0] if findings.warnings else None
