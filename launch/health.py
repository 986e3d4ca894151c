"""What a run watches about itself while it trains, and what it does about it: the recipe's section `health`.

Every rank judges the same numbers, which travel with the step's own, and so comes to the same conclusion.
"""

from __future__ import annotations

import logging
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from distrib.copies import checksum, odd_ranks
from distrib.engine import CanonicalState, Engine
from distrib.finite import not_finite
from distrib.reduction import LIMBS, limbs_of_word, word_of_limbs
from launch.exit_codes import DO_NOT_RESTART, FAILED, RunEnded
from launch.health_config import HealthConfig
from launch.ledger import Ledger
from launch.spikes import Spike, SpikeDetector

log = logging.getLogger("lockstep")
_SHOWN = 8
# In how many steps before a comparison a micro-batch is timed: the median is compared.
_TIMED_STEPS = 8
# A rank that is slow in so many comparisons one after the other is named.
_SLOW_IN_A_ROW = 3


@dataclass
class Findings:
    """What a step's numbers show."""

    columns: dict[str, Any] = field(default_factory=dict)
    """For the step's line in `metrics.jsonl`."""
    warnings: list[str] = field(default_factory=list)
    ending: RunEnded | None = None
    """What the run must end with, once the line is written."""
    stop: str | None = None
    """Why it must save and stop as if it had been asked to."""


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
        self._slow_looks: dict[int, int] = {}
        several = self._world.size > 1
        self._pace_every = config.compare_paces_every_steps if several and not engine.pace.unknown_because else None
        self._compares_copies = config.compare_replicas_every_steps is not None and engine.copies() is not None
        if several:
            self._say_what_is_not_watched()

    def _say_what_is_not_watched(self) -> None:
        if self._config.compare_paces_every_steps and self._engine.pace.unknown_because:
            log.info("slow ranks are not looked for: %s", self._engine.pace.unknown_because)
        if self._config.compare_replicas_every_steps and not self._compares_copies:
            log.info("replicas are not compared: every weight is on one rank alone; parallel.replicas=2 would keep two")

    # --- a step ------------------------------------------------------------------------------------------------------

    def vitals(self) -> torch.Tensor | None:
        """After a step was begun: what this rank tells the others of itself. (2 + LIMBS,) float64, seconds and rows of a
        micro-batch and a checksum, in the steps in which the ranks compare either; else None."""
        step = self._engine.steps_done
        if self._pace_every is not None and -(step + 1) % self._pace_every < _TIMED_STEPS:
            self._engine.pace.ask()
        paces, copies = self._compares_paces_at(step), self._compares_copies_at(step)
        if not paces and not copies:
            return None
        pace = torch.tensor(self._engine.pace.take() if paces else (0.0, 0.0), dtype=torch.float64)
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
        if self._compares_paces_at(step):
            self._judge_paces([(seconds, int(rows)) for seconds, rows, *_ in vitals], step, findings)
        if self._compares_copies_at(step):
            sums = [word_of_limbs(limbs) for _, _, *limbs in vitals]
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

    # --- slow ranks --------------------------------------------------------------------------------------------------

    def _compares_paces_at(self, step: int) -> bool:
        return self._pace_every is not None and step % self._pace_every == 0

    def _judge_paces(self, paces: Sequence[tuple[float, int]], step: int, findings: Findings) -> None:
        """Ranks are compared where their micro-batches are as large as any: a smaller one takes less time, not in proportion."""
        most_rows = max(rows for _, rows in paces)
        seconds = {rank: s for rank, (s, rows) in enumerate(paces) if rows == most_rows and s > 0}
        if len(seconds) < 2:
            return
        slowness = {
            rank: own / statistics.median(s for other, s in seconds.items() if other != rank)
            for rank, own in seconds.items()
        }
        slowest = max(slowness, key=lambda rank: slowness[rank])
        findings.columns |= {"slowest_rank": slowest, "slowest_over_others": slowness[slowest]}
        limit = self._config.straggler_factor
        self._slow_looks = {r: self._slow_looks.get(r, 0) + 1 for r, factor in slowness.items() if factor > limit}
        if self._config.slow_rank == "ignore":
            return
        stragglers = [rank for rank, looks in self._slow_looks.items() if looks >= _SLOW_IN_A_ROW]
        if not stragglers:
            return
        findings.columns["stragglers"] = stragglers
        for rank in stragglers:
            if self._slow_looks[rank] == _SLOW_IN_A_ROW:
                name = self._name_ranks([rank])
                findings.warnings.append(
                    f"step {step}: {name} is slow: its own work on a micro-batch takes it {1e3 * seconds[rank]:.3g} ms, "
                    f"{slowness[rank]:.1f} times what it takes the others (health.straggler_factor); look at that machine"
                )
                if self._config.slow_rank == "stop":
                    findings.stop = (
                        f"{name} is slow, {slowness[rank]:.1f} times the others' time (health.slow_rank=stop)"
                    )

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
        return f"ranks that must hold the same bytes differ: {self._name_ranks(odd)}, in {shown or 'what has changed since'}"

    def _name_ranks(self, ranks: list[int]) -> str:
        hosts = self._world.gather_objects(platform.node())
        return ", ".join(f"rank {rank} ({hosts[rank]})" for rank in ranks)

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
