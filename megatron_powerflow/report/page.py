"""How do run folders become one page? Read, group, draw, fill the template, write.

The page needs no network and no script, and its policy forbids both, so that nothing in a run folder can act. The
same runs give the same bytes.

Left out: judgement. The page shows numbers and their errors; it does not say which arm to use.
"""

from __future__ import annotations

import base64
import importlib.util
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megatron_powerflow import __version__
from megatron_powerflow.errors import UserError
from megatron_powerflow.report.answers import answers_of
from megatron_powerflow.report.arms import group_runs
from megatron_powerflow.report.goodput_table import goodput_lines
from megatron_powerflow.report.reading import visible
from megatron_powerflow.report.realised_alpha import alpha_table
from megatron_powerflow.report.runs import Origin, read_runs
from megatron_powerflow.report.tables import arms_table, differences_table, evaluations_table, start_sentence
from megatron_powerflow.targets import file_refusals, require
from megatron_powerflow.whole_files import write_file

PAGE_NAME = "index.html"
GENERATOR = b'<meta name="generator" content="powerflow report">'  # as the template writes it
TEMPLATE = "page.html.jinja"
MAX_NOTES = 40
OWN_PACKAGES = ("matplotlib", "numpy", "jinja2")


def build_report(folders: Sequence[Path], out: Path, command: str) -> Path:
    """Write OUT/index.html and the PNG files; returns the page's path. command: the command line that the page states.

    Raises UserError when a folder is no run, one seed is there twice, matplotlib is missing or OUT cannot be
    written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("a report needs matplotlib; pip install matplotlib")
    require(_refusals(out))
    from megatron_powerflow.report.drawing import draw_all, swatch

    notes: list[str] = []
    arms = group_runs(read_runs(folders, notes))
    sections, styles = draw_all(arms)
    for section in sections:
        notes += [f"{picture.title}: {note}" for picture in section.pictures for note in picture.notes]
    runs = [run for arm in arms for run in arm.members]
    training = [origin for run in runs for origin in run.launches]
    evaluating = [file.origin for run in runs for file in run.files]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template(
        TEMPLATE
    ).render(
        arms=arms,
        swatches=[Markup(swatch(style)) for style in styles],  # numbers and colours of ours, nothing of a run's
        sections=sections,
        inline=lambda picture: base64.b64encode(picture.png).decode("ascii"),
        arms_table=arms_table(arms),
        start=start_sentence(arms),
        differences=differences_table(arms),
        alphas=alpha_table(arms),
        evaluations=evaluations_table(arms),
        answers=[answers_of(arm) for arm in arms],
        versions=[*_versions(training, "start of a run"), *_versions(evaluating, "evaluation")],
        commands=list(dict.fromkeys(origin.command for origin in [*training, *evaluating] if origin.command)),
        command=visible(command, 5000),
        own_versions=_own_versions(),
        goodputs=goodput_lines([(run.shown, run.goodput) for run in runs]),
        notes=[visible(note, 600) for note in notes[:MAX_NOTES]],
        more_notes=max(0, len(notes) - MAX_NOTES),
    )
    _write(out, page, {picture.name: picture.png for section in sections for picture in section.pictures})
    return out / PAGE_NAME


def _refusals(out: Path) -> list[str]:
    """Say why a report may not be written to `out`: it is a file, or another program's page is in it."""
    if out.exists() and not out.is_dir():
        return [f"--out {out}: a file; name a folder"]
    return file_refusals(out / PAGE_NAME, lambda start: GENERATOR in start) if out.is_dir() else []


def _versions(origins: Sequence[Origin], what: str) -> list[tuple[str, str]]:
    """Return (how many state them, the versions), for each different set of versions."""
    counts = Counter(", ".join(f"{k} {v}" for k, v in sorted(origin.versions.items())) for origin in origins)
    return [(f"{count} × {what}", stated) for stated, count in counts.items()]


def _own_versions() -> str:
    parts = [f"megatron_powerflow {__version__}", f"python {platform.python_version()}"]
    for package in OWN_PACKAGES:
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def _write(out: Path, page: str, pictures: dict[str, bytes]) -> None:
    """Write the page, whole or not at all, then its pictures: the page is what shows that they are ours."""
    if not (out / PAGE_NAME).is_file() and (existing := [name for name in pictures if (out / f"{name}.png").exists()]):
        raise UserError(f"--out {out}: holds {existing[0]}.png, which no report wrote; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / PAGE_NAME, page.encode())
        for name, png in pictures.items():
            write_file(out / f"{name}.png", png)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give --out a folder that can") from None
