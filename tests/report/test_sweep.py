"""Sweeps: what is read of the jobs, the page, and a sweep that is killed, goes on and is scored."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from casa_train.errors import UserError
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.report import __main__ as report
from casa_train.report.jobs import differing_fields, job_labels, read_sweep
from casa_train.report.sweep_page import Job, as_json, markdown, write_sweep
from casa_train.run.directory import record_failure
from casa_train.run.starts import StartLog
from casa_train.training.hooks import described
from casa_train.training.state import Progress
from tests.helpers.commands import ROOT, TINY, environment, on_data, run, train_command
from tests.helpers.report_pages import HOSTILE, Page, early_record, fake_record
from tests.helpers.runs import wait_for_step
from tests.helpers.sweep_jobs import config_of, make_job


def labels_of(*jobs: list[str]) -> list[str]:
    configs = {f"job {i}": config_of(*job) for i, job in enumerate(jobs)}
    return list(job_labels(configs, differing_fields(configs)).values())


# Names


def test_jobs_are_named_by_what_sets_them_apart() -> None:
    fusion = [[f"fusion={name}"] for name in ("casa", "qformer_insertion", "hyper_attention")]
    assert labels_of(*fusion) == ["casa", "qformer_insertion", "hyper_attention"]
    assert labels_of(["fusion.every=1"], ["fusion.every=2"]) == ["casa, every=1", "casa, every=2"]
    # What most have goes without saying.
    switches = [[], *([f"+ablation={name}"] for name in ("d1_shared", "d4_ffn", "d2_images_only"))]
    assert labels_of(*switches) == [
        "casa",
        "casa, share_parameters=true",
        "casa, update_image_tokens=ffn",
        "casa, text_in_window=false",
    ]
    # Of a switch that half have turned on, that it is off.
    shared = [["fusion=cross_attention"], ["fusion=cross_attention_shared"]]
    assert labels_of(["fusion=casa"], *shared) == [
        "casa",
        "cross_attention",
        "cross_attention, share_parameters=true",
    ]
    assert labels_of(["seed=0"], ["seed=1"], ["seed=1", "fusion=insertion"]) == [
        "casa, seed=0",
        "casa",
        "insertion",
    ]


def test_jobs_that_nothing_sets_apart_are_named_by_their_directories() -> None:
    assert labels_of([], []) == ["job 0", "job 1"]


def test_options_are_compared_within_a_mechanism() -> None:
    configs = {
        "a": config_of("fusion=hyper_attention"),  # its `layers` are block indices
        "b": config_of("fusion=qformer_insertion"),  # ... and these a number of layers
    }
    assert differing_fields(configs) == {
        "a": {"fusion.mechanism": "hyper_attention"},
        "b": {"fusion.mechanism": "qformer_insertion"},
    }


# Reading


def started(run_dir: Path, progress: Progress) -> StartLog:
    log = StartLog(run_dir / "starts.jsonl", {})
    log.begin(progress)
    return log


def test_every_state_of_a_job_is_told(tmp_path: Path) -> None:
    make_job(tmp_path / "a_finished", "fusion=casa", steps=30)
    stopped = make_job(tmp_path / "b_stopped", "fusion=insertion", steps=12)
    progress = Progress(step=12)
    started(stopped, progress).close("signal")
    failed = make_job(tmp_path / "c_failed", "fusion=hyper_attention", steps=7)
    record_failure(failed, "5 steps in a row were not finite")
    killed = make_job(tmp_path / "d_killed", "fusion=cross_attention")
    started(killed, progress)
    died = make_job(tmp_path / "d_of_itself", "fusion.every=2", steps=12)
    started(died, progress).close(described(MemoryError("CUDA out of memory")))
    (tmp_path / "e_refused").mkdir()
    record_failure(tmp_path / "e_refused", "fusion.every is 9")
    broken = make_job(tmp_path / "f_broken", "fusion=gated_cross_attention", steps=30)
    (broken / "config.yaml").write_text("fusion: [")
    (tmp_path / "multirun.yaml").write_text("")
    (tmp_path / "no_run").mkdir()
    (tmp_path / "no_run" / "notes.txt").write_text("")

    jobs = read_sweep(tmp_path)
    assert [(job.directory, job.state, job.step, job.label) for job in jobs] == [
        ("a_finished", "finished", 30, "casa, every=1"),
        ("b_stopped", "unfinished", 12, "insertion"),
        ("c_failed", "failed", 7, "hyper_attention"),
        ("d_killed", "unfinished", 0, "cross_attention"),
        ("d_of_itself", "failed", 12, "casa, every=2"),
        ("e_refused", "not started", 0, "e_refused"),
        ("f_broken", "unreadable", 0, "f_broken"),
    ]
    notes = [" ".join(job.notes) for job in jobs]
    assert notes[:6] == [
        "",
        "signal",
        "5 steps in a row were not finite",
        "killed, or still running",
        "CUDA out of memory",
        "fusion.every is 9",
    ]
    assert "config.yaml" in notes[6]
    assert read_sweep(tmp_path, "[ab]_*")[1].label == "insertion"


def test_a_failure_counts_until_the_job_goes_on(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", steps=7)
    record_failure(job, "no data")
    assert read_sweep(tmp_path)[0].state == "failed"
    later = (job / "failure.txt").stat().st_mtime + 5
    os.utime(job / "metrics.jsonl", (later, later))
    (read,) = read_sweep(tmp_path)
    assert (read.state, read.notes) == ("unfinished", [])


def test_broken_files_leave_gaps_and_notes(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", steps=30)
    with (job / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss"')  # cut by a kill
    (job / "evaluation.json").write_text('{"exact_match": 0.5')
    (job / "model_config.json").unlink()
    (job / "validation.jsonl").write_text("[1]\n")  # no record: left out, as a cut line is
    (read,) = read_sweep(tmp_path)
    assert (read.state, read.step) == ("finished", 30)
    assert read.exact_match is None and read.parameters is None
    assert len(read.notes) == 2
    write_sweep([read], "sweep", tmp_path)


def test_the_numbers_of_a_job(tmp_path: Path) -> None:
    make_job(tmp_path / "casa", steps=30)
    job = make_job(tmp_path / "insertion", "fusion=insertion", "model.backbone.trainable=false")
    records = [
        fake_record(step, text_tokens_per_second=7.0 if step <= 5 else 100.0 + step % 3)
        for step in range(1, 31)
    ]
    (job / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    lines: list[dict[str, Any]] = [
        {"step": 10, "exact_match": 0.25, "loss": 1.5},
        {"step": 20, "exact_match": 0.5, "loss": 1.25},
        {"step": 30, "exact_match": None, "loss": 0.75},  # nothing that could match
    ]
    (job / "validation.jsonl").write_text("\n".join(map(json.dumps, lines)))
    casa, insertion = read_sweep(tmp_path)
    assert insertion.speed("text") == 101  # the first five steps are left out
    assert (insertion.exact_match, insertion.measured) == (0.5, "teacher-forced, at step 20")
    assert insertion.held_out_loss == 0.75 and casa.held_out_loss is None
    assert insertion.fusion_parameters == 0 and casa.fusion_parameters > 0
    assert casa.trained == casa.parameters
    assert insertion.parameters == casa.parameters - casa.fusion_parameters
    assert 0 < insertion.trained < insertion.parameters
    assert casa.loss == pytest.approx(0.5 + 5 * 2.718 ** (-2.9), abs=0.1)
    scores = {"exact_match": 0.75, "blind": 0.25, "questions": 24, "step": 30}
    (job / "evaluation.json").write_text(json.dumps(scores))
    insertion = read_sweep(tmp_path)[1]
    assert (insertion.exact_match, insertion.blind) == (0.75, 0.25)
    assert insertion.measured == "24 questions at step 30"


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a directory"):
        read_sweep(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no run"):
        read_sweep(tmp_path)
    assert report.main(["--sweep", str(tmp_path)]) == 2


# The page


def jobs_of_a_sweep() -> list[Job]:
    def job(label: str, scale: float, **fields: Any) -> Job:
        records = [
            early_record(fake_record(s, text_tokens_per_second=scale * 1000)) for s in range(1, 41)
        ]
        sizes = {"parameters": 300_000, "trained": 300_000, "work": 898_000_000}
        values = {"state": "finished", "step": 40, "steps": 40, "metrics": records} | sizes | fields
        return Job(label, label, mechanism=label, **values)

    return [
        job("casa", 1.0, exact_match=0.9, blind=0.2, measured="24 questions"),
        job("insertion", 1.5, exact_match=0.8, report=True),
        job("a|b $x$ " + HOSTILE, 0.5, state="failed", notes=[HOSTILE], step=12),
        Job("empty", "empty", state="not started"),
    ]


def test_the_page_is_whole_escaped_and_deterministic(tmp_path: Path) -> None:
    jobs = jobs_of_a_sweep()
    html = write_sweep(jobs, HOSTILE, tmp_path).read_text()
    page = Page(html)
    assert [svg["aria-label"] for svg in page.all("svg")] == [
        "Loss by step",
        "Loss over time",
        "Exact match against text tokens/s",
        "Exact match against FLOP a pack",
    ]
    assert not page.all("script") and not page.all("img") and not page.all("link")
    assert [a["href"] for a in page.all("a") if "href" in a and a["href"][0] != "#"] == [
        "insertion/report.html"
    ]
    assert "default-src 'none'" in html and HOSTILE not in html
    assert "failed at 12 of 40" in page.text and "90.0 %" in page.text
    assert write_sweep(jobs, HOSTILE, tmp_path).read_text() == html
    assert json.loads((tmp_path / "sweep.json").read_text()) == as_json(jobs)


def test_the_best_of_the_finished_jobs_stand_out(tmp_path: Path) -> None:
    page = Page(write_sweep(jobs_of_a_sweep(), "sweep", tmp_path).read_text())
    best = [cell for cell in page.all("td") if "best" in (cell.get("class") or "")]
    assert len(best) == 2  # exact match and text tokens/s; all else is equal


def test_a_sweep_without_scores_shows_losses(tmp_path: Path) -> None:
    jobs = [Job("a", "a", state="unfinished", steps=9, metrics=[fake_record(1)]), Job("b", "b")]
    page = Page(write_sweep(jobs, "sweep", tmp_path).read_text())
    assert "Loss against text tokens/s" in [svg["aria-label"] for svg in page.all("svg")]
    assert not Page(write_sweep(jobs[1:], "sweep", tmp_path).read_text()).all("svg")


def test_costs_far_apart_stand_on_a_logarithmic_scale(tmp_path: Path) -> None:
    jobs = [
        Job(f"j{i}", f"j{i}", exact_match=0.5 + 0.001 * i, work=10**i, metrics=[fake_record(1)])
        for i in (8, 9, 10)
    ]
    html = write_sweep(jobs, "sweep", tmp_path).read_text()
    (figure,) = (f for f in html.split("<figure") if "Exact match against FLOP a pack" in f)
    ticks = re.findall(r">([\d.]+[MGT])</text>", figure)
    assert ticks == ["100M", "300M", "1G", "3G", "10G", "30G"]


def test_what_is_nearly_equal_looks_so(tmp_path: Path) -> None:
    records = ([fake_record(1) | {"memory_peak_bytes": 2**30 * x}] for x in (1.9501, 1.9502))
    jobs = [
        Job(f"j{i}", f"j{i}", state="finished", exact_match=1 - 1e-5 * i, metrics=metrics)
        for i, metrics in enumerate(records)
    ]
    html = write_sweep(jobs, "sweep", tmp_path).read_text()
    assert 'class="number best"' not in html
    (figure,) = (f for f in html.split("<figure") if "Exact match against peak memory" in f)
    ticks = re.findall(r">([\d.]+ (?:%|GiB|MiB))</text>", figure)
    assert len(set(ticks)) == len(ticks) > 5
    assert max(float(tick[:-2]) for tick in ticks if tick.endswith("%")) == 100


def test_the_table_is_markdown() -> None:
    lines = markdown(jobs_of_a_sweep())
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[1:6] == ["job", "|", "state", "|", "exact"]
    assert "peak memory" not in lines[0]  # nobody measured any


# A real one


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_a_failed_job_stops_no_other(
    data_dir: Path, tmp_path: Path
) -> None:
    command = train_command(
        [
            *["-m", "+experiment=demo", "fusion.every=1,9,2", "name=s", "trainer.steps=8"],
            *["checkpoint.every=2", "optim.warmup_steps=2", f"hydra.sweep.dir={tmp_path}"],
            *[*TINY, *on_data(data_dir)],
        ]
    )
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def job(every: int) -> Path:
        names = rf"s,(fusion\.)?every={every},"  # a long name loses its sections
        return next(path for path in tmp_path.iterdir() if re.match(names, path.name))

    while not len(list(tmp_path.glob("s,*"))) == 3:
        assert process.poll() is None
    wait_for_step(job(2), 4, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(read_metrics(job(2) / "metrics.jsonl")) < 8, "the kill came too late"
    states = [(j.state, j.step) for j in read_sweep(tmp_path)]
    assert states[0] == ("finished", 8) and states[1][0] == "unfinished"
    assert states[2] == ("not started", 0)

    finished = (job(1) / "metrics.jsonl").read_bytes()
    again = run(command, check=False)
    assert again.returncode == 2 and "fusion.every is 9" in again.stderr
    assert again.stdout.count("nothing to do") == 1
    assert "resuming from" in again.stdout and "every=2" in again.stdout
    assert (job(1) / "metrics.jsonl").read_bytes() == finished  # not trained again

    evaluate = [sys.executable, "-m", "casa_train.evaluate", "--sweep", str(tmp_path)]
    evaluated = run(evaluate, check=False)
    assert evaluated.returncode == 2 and "holds no valid checkpoint" in evaluated.stderr
    assert evaluated.stdout.count("exact match") == 2
    assert run(evaluate, check=False).stdout.count("already evaluated") == 2
    shown = run([sys.executable, "-m", "casa_train.report", "--sweep", str(tmp_path)]).stdout
    table = [line.split("|")[1:4] for line in shown.splitlines() if line.startswith("| casa")]
    assert [[cell.strip() for cell in row][:2] for row in table] == [
        ["casa, every=1", "finished"],
        ["casa, every=2", "finished"],
    ]
    jobs = json.loads((tmp_path / "sweep.json").read_text())
    assert [j["step"] for j in jobs] == [8, 8, 0]
    assert "fusion.every is 9" in jobs[2]["notes"][0]
    assert all(j["measured"] == "24 questions at step 8" for j in jobs[:2])
