"""The job behind `steer sample` for text models: texts.jsonl, report.json and ancestry.png."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steer.apps.errors import wrap_errors
from steer.apps.methods import METHODS, Job
from steer.apps.models import adapter_applied, find_adapter, load_pipeline
from steer.apps.plots import draw_ancestry
from steer.apps.processes import launch_context
from steer.apps.prompts import PromptRow, check_prompt, sample_requests
from steer.apps.reward_specs import resolve_reward
from steer.apps.sampling import Entry, Report, base_output, describe, open_report, output_errors
from steer.apps.settings import SamplingConfig
from steer.errors import InputError
from steer.files import write_text

TEXTS = "texts.jsonl"


def sample_texts(
    prompts: Sequence[PromptRow],
    settings: SamplingConfig,
    out: Path,
    device: str | None = None,
    reward_timeout: float | None = None,
) -> Report:
    """Sample every prompt, write texts and the report to `out`, and return the report.

    Finished prompts are kept; the same call resumes an interrupted run. Raises InputError for options that need images.
    """
    _check(settings)
    for row in prompts:
        check_prompt(row.prompt, "prompt")
    reward = resolve_reward(settings.reward, reward_timeout)
    METHODS[settings.method].check(settings, reward)
    if settings.lora is not None:
        find_adapter(settings.lora)
    record = open_report(out, [row.prompt for row in prompts], settings, [row.columns for row in prompts])
    pending = [n for n in range(len(prompts)) if "texts" not in record.entries.get(n, {})]
    if pending:
        pipe = load_pipeline(settings.model, device, settings.dtype, **settings.loading)
        pipe.set_progress_bar_config(leave=False, desc="steps", disable=None)
        requests = sample_requests(prompts, settings, pipe)
        with adapter_applied(pipe, settings.lora) as disabled:
            for n in pending:
                one = requests[n]
                job = Job(pipe, reward, one.prompt, one.settings, None, arguments=one.arguments)
                columns: Entry = {"columns": dict(prompts[n].columns)} if prompts[n].columns else {}
                entry = _sample_prompt(replace(job, adapter_disabled=disabled)) | columns
                with output_errors(out):
                    record.keep(n, entry, single_process=True)
    with output_errors(out):
        report = record.save()
        write_text(
            out / TEXTS, "".join(json.dumps(line) + "\n" for entry in report["prompts"] for line in _lines(entry))
        )
        draw_ancestry(report, out)
    return report


def _check(settings: SamplingConfig) -> None:
    """Raise InputError for settings that do not apply to texts, and for several processes."""
    if METHODS[settings.method].is_iterative:
        raise InputError(f"--method {settings.method} optimises the noise of images: use fk, svdd, beam or best-of-n")
    given = {
        "--expand": settings.expand,
        "--original": settings.original,
        "--noise-candidates": settings.noise_candidates,
        "--guidance": settings.guidance,
        "--negative-prompt": settings.negative_prompt,
        "--height": settings.height,
        "--width": settings.width,
        "--vae": settings.vae,
        "--best-of": settings.best_of,
    }
    if unused := [flag for flag, value in given.items() if value is not None]:
        raise InputError(f"{unused[0]}: model {settings.model!r} makes texts: leave it out")
    if launch_context().world_size > 1:
        raise InputError(f"model {settings.model!r} makes texts: sample them in a single process")


def _sample_prompt(job: Job) -> Entry:
    with wrap_errors(f"prompt {job.prompt!r}", "finished prompts are kept", "fewer particles need less"):
        output = job.run()
        entry: Entry = {"prompt": job.prompt, "texts": list(output.images)} | describe(output)
        entry |= {} if output.lam is None else {"lam": output.lam}
        if (base := base_output(job, output)) is not None:
            entry["base"] = {"texts": list(base[1].images), "rewards": base[1].rewards[0].tolist()}
        return entry


def _lines(entry: Entry) -> list[dict[str, Any]]:
    """Return a line for each text of a prompt, best first; texts without steering come last."""
    rows = [(text, reward, True) for text, reward in zip(entry["texts"], entry["rewards"], strict=True)]
    base = entry.get("base", {"texts": [], "rewards": []})
    rows += [(text, reward, False) for text, reward in zip(base["texts"], base["rewards"], strict=True)]
    return [{"prompt": entry["prompt"], "text": text, "reward": reward, "steered": s} for text, reward, s in rows]
