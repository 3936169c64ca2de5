"""One self-contained HTML file about a run, or several beside each other: opens from disk, light and dark, prints."""

from collections.abc import Sequence
from pathlib import Path

from m3i_large.data.storage import written_whole
from m3i_large.report import overview, training
from m3i_large.report.page import page, sheet_html
from m3i_large.report.run_data import RunData, read_runs

__all__ = ["report_at_the_end", "write_report"]


def write_report(runs: Path | Sequence[Path], *, out: Path | None = None) -> Path:
    """Writes what run directories hold as one page; works while a run is going on.

    Args:
        runs: one or several run directories.
        out: file to write (default: report.html in the run directory; for several runs, in the working directory).

    Raises:
        UserError: no run, or one that has not logged a step; one named twice.
    """
    paths = [runs] if isinstance(runs, Path) else list(runs)
    shown = read_runs(paths)
    title = shown[0].label if len(shown) == 1 else " beside ".join(run.label for run in shown)
    html = page(title, sections(shown))
    path = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    with written_whole(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def report_at_the_end(run: Path) -> str:
    """Writes the report of a run that has ended -> a line about it. Whatever is wrong with it, the end stays."""
    try:
        return f"report: {write_report(run)}"
    except Exception as error:  # above all a run's own failure must not be hidden by one of its report
        return f"report: could not be written: {error}"


def sections(runs: Sequence[RunData]) -> list[tuple[str, str, str]]:
    """(identifier, heading, content) of everything there is to see."""
    return [
        ("summary", "Summary", training.legend(runs) + overview.summary(runs)),
        ("evaluation", "Evaluation", overview.evaluation(runs)),
        ("losses", "Losses", training.losses(runs)),
        ("speed", "Speed", training.speed(runs)),
        ("schedules", "Schedules", training.schedules(runs)),
        ("health", "Health", training.health(runs)),
        ("other", "Other metrics", training.others(runs)),
        ("pictures", "Pictures", _pictures(runs)),
        ("data", "Data", overview.data(runs)),
        ("events", "Events", overview.events(runs)),
        ("recipe", "Recipe", overview.recipe(runs)),
        ("credits", "Credits", overview.credits(runs)),
    ]


def _pictures(runs: Sequence[RunData]) -> str:
    """Sheets of one run below each other, of several beside each other."""
    if len(runs) == 1:
        return "".join(sheet_html(sheet) for sheet in runs[0].sheets())
    by_run = [{sheet.name: sheet for sheet in run.sheets()} for run in runs]
    html = ""
    for name in dict.fromkeys(name for sheets in by_run for name in sheets):
        sides = [
            f"<div>{sheet_html(sheets[name], heading=f'{sheets[name].title}: {run.label}')}</div>"
            for run, sheets in zip(runs, by_run, strict=True)
            if name in sheets
        ]
        html += f'<div class="sides">{"".join(sides)}</div>'
    return html
