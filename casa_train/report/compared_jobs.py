"""Which jobs of a sweep can be compared. What is left out, and what differs though it stays, is
said, never averaged away.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from casa_train.errors import UserError
from casa_train.io.numbers import count
from casa_train.report.read_points import TITLES
from casa_train.report.training_costs import machines_of
from casa_train.report.variants import Key, Variant, read_validations

Say = Callable[[str], None]

INSERTION = "insertion"
APART = 0.05
"""Share of a matched amount that one job may have less than another before that is said."""


def find_baseline(variants: Sequence[Variant], name: str | None) -> Variant:
    """:raises UserError: there is no variant of that name."""
    labels = {variant.label: variant for variant in variants}
    if name is not None and name not in labels:
        raise UserError(
            f"--baseline {name!r} is no variant of this sweep; expected one of "
            f"{', '.join(map(repr, labels)) or 'none: no job could be read'}."
        )
    if not variants:
        raise UserError("no job of the sweep has a configuration that this version can read.")
    if name is not None:
        return labels[name]
    plain = [variant for variant in variants if variant.mechanism == INSERTION]
    return labels.get(INSERTION) or (plain or list(variants))[0]


def with_validations(variants: Sequence[Variant], sweep: Path, say: Say) -> list[Variant]:
    """Variants with what their jobs were measured at; jobs that are not done are left out, unless
    none is done.
    """
    trials = [trial for variant in variants for trial in variant.trials]
    done = any(trial.job.state == "finished" for trial in trials)
    for variant in variants:
        kept = []
        for trial in variant.trials:
            job, why = trial.job, read_validations(trial, sweep)
            state = f"{job.state} at step {job.step:,} of {job.steps:,}"
            state += f" ({'; '.join(job.notes)})" if job.notes else ""
            if job.state != "finished" and done:
                say(
                    f"{trial.name} is left out: it is {state}. The sweep's command goes on with it."
                )
            elif why is not None:
                say(f"{trial.name} is left out: {why}.")
            else:
                kept.append(trial)
                if job.state != "finished":
                    say(f"{trial.name} is read where it came, as no job is done: it is {state}.")
        variant.trials = kept or variant.trials[:0]
    variants = [variant for variant in variants if variant.trials]
    _leave_out_cut(variants, say)
    return [variant for variant in variants if variant.trials]


def _leave_out_cut(variants: Sequence[Variant], say: Say) -> None:
    """Jobs that are done and whose validations end before: all others would be read there."""
    finished = [t for v in variants for t in v.trials if t.job.state == "finished"]
    cut = [t for t in finished if t.readings[-1].step < t.job.steps]
    if len(cut) == len(finished):
        return
    for trial in cut:
        say(
            f"{trial.name} is left out: it is finished at step {trial.job.step:,}, but its last "
            f"validation that says which answers were right was at step "
            f"{trial.readings[-1].step:,} (evaluation.every was 0 at its end, or validation.jsonl "
            "was cut)."
        )
    for variant in variants:
        variant.trials = [trial for trial in variant.trials if trial not in cut]


def same_questions(variants: Sequence[Variant], baseline: Variant, say: Say) -> list[Variant]:
    """Keeps the validations that asked what most of the baseline's last ones asked."""
    keys = Counter(trial.readings[-1].key for trial in baseline.trials)
    key = keys.most_common(1)[0][0]
    for variant in variants:
        kept = []
        for trial in variant.trials:
            own = trial.readings[-1].key
            trial.readings = [reading for reading in trial.readings if reading.key == key]
            if trial.readings and own == key:
                kept.append(trial)
                continue
            say(
                f"{trial.name} is not compared: its validations asked other questions than the "
                f"baseline's ({_asked(own)} against {_asked(key)}). Give all jobs the same "
                "data.validation, evaluation.loss_samples, evaluation.ask and budgets."
            )
        variant.trials = kept
    return [variant for variant in variants if variant.trials]


def _asked(key: Key) -> str:
    digest, sources = key
    total = sum(questions for _, questions in sources)
    return f"{count(total, 'question')} of {count(len(sources), 'source')}, digest {digest}"


def say_what_differs(variants: Sequence[Variant], match: str, sweep: Path, say: Say) -> None:
    """What stays in the tables all the same, but must be known: steps, data, seeds, machines."""
    trials = [trial for variant in variants for trial in variant.trials]
    say_groups("trainer.steps differ", {t.name: f"{t.job.steps:,}" for t in trials}, say)
    data = {
        v.label: json.dumps({k: x for k, x in v.fields.items() if k.startswith("data.")})
        for v in variants
    }
    say_groups("the training data differs", data, say)
    say_groups(
        "jobs of one seed saw other samples in step 1",
        {
            t.name: f"seed {t.seed}: {t.job.metrics[0].get('samples_digest')}"
            for t in trials
            if t.job.metrics
        },
        say,
        by_seed=True,
    )
    seeds = sorted({trial.seed for trial in trials})
    for variant in variants:
        missing = [str(seed) for seed in seeds if seed not in variant.seeds]
        if missing:
            say(
                f"{variant.label} has no job that counts of seed {', '.join(missing)}: its mean is "
                f"over {count(len(variant.seeds), 'seed')}, and differences are over the seeds "
                "that both sides have."
            )
    machines = machines_of(trials, sweep)
    if len(machines) > 1:
        what = (
            "seconds, which are matched," if match == "seconds" else "speeds and times of the costs"
        )
        places = "; ".join(f"{place}: {', '.join(names)}" for place, names in machines.items())
        say(f"jobs trained on different machines, so that {what} do not compare: {places}.")


def say_who_stands_apart(variants: Sequence[Variant], amount: str, limit: float, say: Say) -> None:
    """Variants that are read at other amounts than were to be matched, as validations are rare."""
    stands = {
        variant.label: [t.chosen.amounts[amount] / limit for t in variant.trials if t.chosen]
        for variant in variants
    }
    shares = [share for own in stands.values() for share in own]
    if min(shares) >= (1 - APART) * max(shares):
        return
    said = "; ".join(
        f"{label} at {100 * min(own):.0f}"
        + (f" to {100 * max(own):.0f}" if max(own) - min(own) >= 0.005 else "")
        + " %"
        for label, own in stands.items()
    )
    say(
        f"jobs are read at different {TITLES[amount]}, as there is no validation nearer: {said} of "
        "what all reached. Who has less looks worse for that alone. A smaller evaluation.every "
        "brings them together."
    )


def say_what_is_early(variants: Sequence[Variant], say: Say) -> None:
    """Jobs that are read before their learning rate came down, beside others that are not."""
    early: dict[str, list[str]] = {}
    ended = False
    for variant in variants:
        for trial in variant.trials:
            config, chosen = trial.job.config, trial.chosen
            if chosen is None or config is None or not config.optim.decay_steps:
                continue
            if chosen.step < config.trainer.steps:
                said = f"{chosen.step:,} of {config.trainer.steps:,}"
                early.setdefault(f"{variant.label} at {said}", []).append(trial.name)
            else:
                ended = True
    if early and ended:
        say(
            "some jobs are read before the learning rate's decay at their end (optim.decay_steps), "
            f"which the others have had, so that these look better: {'; '.join(early)} steps. Runs "
            "whose trainer.steps end where they are matched compare without that."
        )


def say_groups(title: str, values: Mapping[str, str], say: Say, by_seed: bool = False) -> None:
    """Names who has which value, if there is more than one (of a seed)."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    of_seed = Counter(value.partition(":")[0] for value in groups)
    if by_seed:
        groups = {v: names for v, names in groups.items() if of_seed[v.partition(":")[0]] > 1}
    if len(groups) > 1:
        said = "; ".join(f"{value}: {', '.join(names)}" for value, names in groups.items())
        say(f"{title}: {said}.")
