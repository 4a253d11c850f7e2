"""The `compress` command.

Exit codes: 0 all went well, 1 the run failed (or one of its variants), 2 the recipe or the command
line is at fault, 3 a variant did not pass the gate (or `compare` found a regression), 130
interrupted. Where a variant failed and another did not pass the gate, it is 1.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compressor import __version__
from compressor.errors import CompressorError, RecipeError, RunError
from compressor.publish.options import Layout

if TYPE_CHECKING:
    from compressor.plan import Plan
    from compressor.preflight import Preflight
    from compressor.recipe import Recipe
    from compressor.run import RunResult
    from compressor.store import Store

TRACEBACK = "COMPRESSOR_TRACEBACK"
GATE_FAILED = 3
INTERRUPTED = 130
_FAILURES_SHOWN = 12  # of each check

app = typer.Typer(
    name="compress",
    help="Compress a language model, and know what it lost and what each token costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
RecipePath = Annotated[Path, typer.Argument(help="Recipe (YAML).", show_default=False)]
OutputDir = Annotated[Path | None, typer.Option("--output", help="Directory of runs.")]
StoreDir = Annotated[Path | None, typer.Option("--store", help="Directory of finished stages.")]
Only = Annotated[list[str] | None, typer.Option("--only", help="Only this variant; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not try artifacts in what will load them.")
]


def main() -> None:
    """Entry point: every expected failure is one message and an exit code."""
    sys.unraisablehook = _interrupt_again
    try:
        app(standalone_mode=True)
    except CompressorError as error:
        if os.environ.get(TRACEBACK):
            raise
        _complain(f"error: {error}")
        sys.exit(error.exit_code)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        first = (str(error).strip() or "no message").splitlines()[0]
        _complain(
            f"error: unexpected {type(error).__name__}: {first}\n"
            f"  fix: set {TRACEBACK}=1 to see where it happened, and report it"
        )
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer turns KeyboardInterrupt into this exit
            _complain("interrupted: run the same command again to go on from here", "yellow")
        raise


def _interrupt_again(lost: sys.UnraisableHookArgs) -> None:
    """Ctrl-C that came inside a finalizer or a callback, where Python drops exceptions, comes again
    a moment later; what else is dropped there is printed as ever."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()


def _complain(message: str, style: str = "red") -> None:
    """Print to stderr, never breaking a line: editors and grep need ``file:line`` whole."""
    console = Console(stderr=True)
    console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"compressor {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars; there is one of our own
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@app.command()
def run(
    recipe: RecipePath,
    output: OutputDir = None,
    store: StoreDir = None,
    only: Only = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Run although memory or the engine speak against it.")
    ] = False,
    no_verify: NoVerify = False,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            help="Spread stages over a Ray cluster: ray starts one here, ray=ADDRESS uses one that "
            "sees the store.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Do what the recipe says: quantize, evaluate, measure, export, report."""
    if on is not None:
        from compressor.cluster import parse_address

        parse_address(on)
    from compressor.progress import make_progress
    from compressor.run import execute

    loaded = _load(recipe, output, only)
    if loaded.optimise is not None:
        if on is not None:
            raise RecipeError(
                "a search tries one candidate after the other", where="--on", fix="remove it"
            )
        _optimise(loaded, _store(loaded, store), quiet)
        return
    plan = _plan(loaded, store, only, not no_verify)
    if plan.remaining:
        from compressor.preflight import preflight

        found = preflight(plan)
        if not quiet:
            for line in found.warnings:
                _complain(f"warning: {line}", "yellow")
        if not force:
            found.check()
    result = execute(plan, make_progress(quiet), on=on)
    _show(result, quiet)
    _ended(plan, result, quiet)


@app.command()
def optimise(
    recipe: RecipePath,
    output: OutputDir = None,
    store: StoreDir = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Instead of optimise.minutes.", min=0.01)
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", help="Instead of optimise.trials.", min=1)
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option("--write", help="Write the chosen variant's recipe there.", metavar="FILE"),
    ] = None,
) -> None:
    """Search for the best variant within the recipe's limits, and judge it on held-out data.

    `compress run` does the same with a recipe that has `optimise:`. Run again after an
    interruption, or with more time, it goes on from its trials. The exit code is 3 where no variant
    is better than the baseline.
    """
    loaded = _load(recipe, output, None)
    if loaded.optimise is None:
        raise RecipeError(
            "there is no `optimise:` section",
            where=str(recipe),
            fix="add one (docs/optimise.md), or use `compress run`",
        )
    changes = {"minutes": minutes, "trials": trials}
    given = {key: value for key, value in changes.items() if value is not None}
    loaded = loaded.model_copy(update={"optimise": loaded.optimise.model_copy(update=given)})
    _optimise(loaded, _store(loaded, store), quiet, write)


def _optimise(loaded: Recipe, store: Store, quiet: bool, write: Path | None = None) -> None:
    from compressor.optimise.job import optimise as search
    from compressor.optimise.job import write_recipe
    from compressor.progress import make_progress

    made = search(loaded, store, make_progress(quiet))
    run_dir, record = made.result.run_dir, made.record
    _show(made.result, quiet)
    typer.echo(record.sentence)
    if record.chosen is None:
        raise typer.Exit(GATE_FAILED)
    if write is not None:
        try:
            write_recipe(run_dir, write)
        except OSError as error:
            raise RunError(
                f"cannot be written ({error.strerror})", where=str(write), fix="give another file"
            ) from error
    if made.plan.recipe.publish and _publish(made.plan, run_dir, quiet):
        raise typer.Exit(1)


def _show(result: RunResult, quiet: bool) -> None:
    """The run's figures in short, and where its report lies."""
    if quiet:
        return
    from compressor.report.terminal import closing

    console = Console()
    console.print(closing(result.report))
    console.print(f"report: {result.run_dir / 'report' / 'index.html'}", soft_wrap=True)


def _ended(plan: Plan, result: RunResult, quiet: bool) -> None:
    """Say what failed, publish, and end with the exit code that is due."""
    from compressor.report.quality import gate_lines

    for variant, message in result.failed_variants.items():
        _complain(f"{variant} failed: {message}")
    lines = gate_lines(result.report)
    for line in lines if quiet else ():  # else the closing table has them
        _complain(line)
    refused = _publish(plan, result.run_dir, quiet) if plan.recipe.publish else False
    if result.failed_variants:
        raise typer.Exit(1)
    if lines:
        raise typer.Exit(GATE_FAILED)
    if refused:
        raise typer.Exit(1)


def _publish(plan: Plan, run_dir: Path, quiet: bool) -> bool:
    """Push what the recipe's `publish:` asks for and may be; whether something was refused."""
    from compressor.progress import make_progress
    from compressor.publish.hub import push
    from compressor.publish.push import plan_push

    wanted = plan.recipe.publish
    assert wanted is not None
    asked = wanted.variants or plan.recipe.variants
    chosen = [name for name in asked if (run_dir / "artifacts" / name).is_dir()]
    if not chosen:  # each of them failed, or was left out
        return True
    ahead = plan_push(
        run_dir, wanted.repo, layout=wanted.layout, private=wanted.private, variants=chosen
    )
    _told(ahead.warnings, ahead.refused)
    for address in push(ahead, make_progress(quiet)) if ahead.uploads else ():
        typer.echo(f"pushed: {address}")
    return bool(ahead.refused)


def _told(warnings: Iterable[str], refused: Mapping[str, Sequence[str]]) -> None:
    for line in warnings:
        _complain(f"warning: {line}", "yellow")
    for label, why in refused.items():
        _complain(f"{label} is not pushed: {'; '.join(why)}")


@app.command()
def push(
    run_dir: Annotated[Path, typer.Argument(help="A run's directory.", show_default=False)],
    repo: Annotated[
        str | None,
        typer.Option(
            "--repo",
            help="org/name; {variant} and {format} may stand in it. Default: of the recipe.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        Layout | None,
        typer.Option(
            "--layout",
            help="A repository, a folder or a branch for each artifact. Default: of the recipe, "
            "else repos.",
            show_default=False,
        ),
    ] = None,
    public: Annotated[
        bool | None,
        typer.Option("--public/--private", help="New repositories are private by default."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Only this variant; repeatable.")
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="Only this format; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List every file and its size; send nothing.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Push what is unverified or failed its gate, and into repositories with other "
            "files.",
        ),
    ] = False,
) -> None:
    """Upload a run's artifacts to the Hugging Face Hub, each with its card and the report.

    The token is taken from HF_TOKEN or from `hf auth login`. An upload that broke off goes on when
    the same command is run again.
    """
    from compressor.progress import make_progress
    from compressor.publish import hub
    from compressor.publish.push import plan_push
    from compressor.record import read_lock

    asked = read_lock(run_dir).get("publish") or {}
    repo = repo or asked.get("repo")
    if repo is None:
        raise RecipeError("say where to", where="--repo", fix="for example --repo org/name")
    ahead = plan_push(
        run_dir,
        repo,
        layout=layout or asked.get("layout", "repos"),
        private=asked.get("private", True) if public is None else not public,
        variants=only or asked.get("variants"),
        formats=formats,
        force=force,
    )
    _told(ahead.warnings, ahead.refused)
    if dry_run:
        for line in hub.describe(ahead.uploads):
            typer.echo(line)
    if ahead.refused:
        raise RunError(
            "nothing was sent" if not dry_run else "these would stop the push",
            where=str(run_dir),
            fix="choose the others with --only and --format, or push all the same with --force",
        )
    if not dry_run:
        for address in hub.push(ahead, make_progress(), force=force):
            typer.echo(f"pushed: {address}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="An artifact.", show_default=False)],
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="vllm, sglang, tgi, transformers or llama.cpp. Default: the first that loads the "
            "format and is installed.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; the default is this machine only.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Default: the engine's own.")
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--target", help="Of a speculator: the model that it drafts for."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the command.")] = False,
) -> None:
    """Serve an artifact with the command that stands in its serving.json; what follows `--` is
    given to the engine."""
    from compressor.serve import run as start
    from compressor.serve import serve_command, shown

    command = serve_command(
        directory,
        engine,
        host=host,
        port=port,
        target=target,
        extra=context.args,
        installed=not dry_run,
    )
    typer.echo(shown(command))
    if not dry_run:
        start(command)


@app.command()
def plan(
    recipe: RecipePath,
    output: OutputDir = None,
    store: StoreDir = None,
    only: Only = None,
    as_json: AsJson = False,
    no_verify: NoVerify = False,
) -> None:
    """Show what a run will do, what it will take in time, memory and disk, and which engines have
    kernels for what comes out of it."""
    from compressor.preflight import preflight

    made = _plan(_load(recipe, output, only), store, only, not no_verify)
    found = preflight(made)
    rows = [
        {
            "name": stage.name,
            "kind": stage.kind,
            "variant": stage.variant,
            "key": stage.key,
            "cached": stage.cached,
            "seconds": round(stage.estimate.seconds, 1),
            "memory_bytes": stage.estimate.memory_bytes,
            "disk_bytes": stage.estimate.disk_bytes,
        }
        for stage in made.stages
    ]
    if as_json:
        ahead = {
            "kernels": [finding.to_dict() for finding in found.findings],
            "free_memory_bytes": found.free_bytes,
            "warnings": found.warnings,
        }
        typer.echo(json.dumps({"key": made.key, "stages": rows, "preflight": ahead}, indent=1))
        return
    facts = made.facts
    table = Table(
        title=f"{made.recipe.name}: {facts.architecture}, {facts.parameters / 1e6:,.0f}M parameters"
    )
    table.add_column("stage")
    for column in ("time", "memory", "disk"):
        table.add_column(column, justify="right")
    for stage in made.stages:
        e = stage.estimate
        cells = ("done", "", "") if stage.cached else (
            _duration(e.seconds), f"{e.memory_bytes / 1e9:.1f} GB", f"{e.disk_bytes / 1e6:,.0f} MB"
        )  # fmt: skip
        table.add_row(stage.name, *cells)
    left = made.remaining
    table.add_section()
    table.add_row(
        "in all (estimated)",
        _duration(sum(stage.estimate.seconds for stage in left)),
        f"{max((s.estimate.memory_bytes for s in left), default=0) / 1e9:.1f} GB",
        f"{sum(s.estimate.disk_bytes for s in left) / 1e6:,.0f} MB",
    )
    console = Console()
    console.print(table)
    console.print(_kernel_table(found))
    for line in found.warnings:
        _complain(f"warning: {line}", "yellow")
    if (wanted := made.recipe.optimise) is not None:
        console.print(
            f"optimise: up to {wanted.trials} trials in {wanted.minutes:g} minutes come on top, "
            "and their last judgement"
        )
    made.check_disk()
    found.check()


def _kernel_table(found: Preflight) -> Table:
    """Engines against variants."""
    table = Table(title="kernels")
    for column in ("variant", "scheme", "engine, device", "runs by", "because"):
        table.add_column(column)
    styles = {"native": "green", "dequantized": "yellow", "fails": "red"}
    for finding in found.findings:
        level, kernel = finding.support.level, finding.support.kernel
        shown = {"native": kernel, "dequantized": f"{kernel} (no gain)", "fails": "will not load"}
        table.add_row(
            finding.variant,
            finding.scheme,
            str(finding.target),
            Text(shown[level], style=styles[level]),
            Text(finding.reason.removeprefix(": ")),
        )
    return table


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has, and what to install for what is missing.

    The exit code is 1 when something that every run needs is missing.
    """
    from compressor.doctor import checks, environment

    found = checks(Path.cwd())
    code = 1 if any(check.required and check.found is None for check in found) else 0
    if as_json:
        value = {"environment": environment(), "checks": [vars(check) for check in found]}
        typer.echo(json.dumps(value, indent=1))
        raise typer.Exit(code)
    table = Table(title="compress doctor")
    for column in ("what", "found", "for", "to install"):
        table.add_column(column)
    for check in found:
        missing = check.found is None
        style = "red" if check.required else "yellow"
        table.add_row(
            Text(check.name),
            Text("no", style=style) if missing else Text(str(check.found)),
            Text(check.purpose),
            Text(check.fix if missing else ""),
        )
    Console().print(table)
    raise typer.Exit(code)


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="Hub id, directory, or .gguf file.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write.")] = None,
) -> None:
    """Write a commented starter recipe for a model."""
    from compressor.starter import default_file, relative_source, starter

    path = output or default_file(model)
    if path.exists():
        raise RecipeError("the file is already there", where=str(path), fix="give another with -o")
    try:
        text = starter(relative_source(model, path.parent), str(path))
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"cannot be written ({error.strerror})", where=str(path), fix="give another with -o"
        ) from error
    typer.echo(f"wrote {path}; next: compress plan {path}")


@app.command()
def schema(
    docs: Annotated[bool, typer.Option("--docs", help="Print the reference as Markdown.")] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from compressor.recipe import recipe_schema
    from compressor.reference import render

    found = recipe_schema()
    typer.echo(render(found) if docs else json.dumps(found, indent=2), nl=not docs)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="A run's directory, or its report's alone.")],
) -> None:
    """Write a run's report, and its verdict, again from the figures in its report.json."""
    from compressor.publish.complete import complete_artifacts
    from compressor.record import EXPORTS, MANIFEST, write_manifest
    from compressor.report.comparison import report_file
    from compressor.report.read import read_report
    from compressor.report.samples import add_from_run
    from compressor.report.terminal import closing
    from compressor.report.verdict import make_verdict
    from compressor.report.write import write_report

    path = report_file(run_dir)
    content = read_report(path)
    add_from_run(content, run_dir)
    content["verdict"] = make_verdict(content, content["verdict"]["quality_limit"])
    write_report(content, path.parent)
    if (run_dir / EXPORTS).is_dir():  # else it is a run of an earlier version
        complete_artifacts(run_dir, content)
    if (run_dir / MANIFEST).exists():
        write_manifest(run_dir)
    Console().print(closing(content))


@app.command()
def verify(
    run_dir: Annotated[Path, typer.Argument(help="A run's directory.", show_default=False)],
    expect: Annotated[
        str | None,
        typer.Option("--expect", help="SHA-256 that MANIFEST.sha256 must have.", metavar="HEX"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make every figure of a run again from its raw samples, and check every hash.

    The exit code is 1 when anything was altered; each place is named.
    """
    from compressor.verify import verify as check_run

    found = check_run(run_dir, expect)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
        raise typer.Exit(0 if found.ok else 1)
    table = Table(title=f"compress verify {run_dir}")
    table.add_column("check")
    table.add_column("compared", justify="right")
    table.add_column("outcome")
    for check in found.checks:
        bad = len(check.failures)
        outcome = Text(f"{bad} wrong", style="red") if bad else Text("equal", style="green")
        if check.note:
            outcome.append(f" ({check.note})", style="yellow")
        table.add_row(Text(check.name), f"{check.count:,} {check.unit}", outcome)
    Console().print(table)
    for check in found.checks:
        for failure in check.failures[:_FAILURES_SHOWN]:
            _complain(failure.sentence)
        if (more := len(check.failures) - _FAILURES_SHOWN) > 0:
            _complain(f"{check.name}: {more} more (all of them: --json)")
    typer.echo(f"SHA-256 of MANIFEST.sha256: {found.seal}")
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Directories of runs, the reference first.",
            metavar="RUN RUN...",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write one report of all of them into it.", metavar="DIRECTORY"
        ),
    ] = None,
    quality: Annotated[
        str,
        typer.Option(
            "--max-loss", help="Tolerated loss of accuracy (absolute) and growth of perplexity."
        ),
    ] = "1%",
    cost: Annotated[
        str, typer.Option("--max-cost", help="Tolerated growth of the cost per output token.")
    ] = "5%",
    size: Annotated[
        str, typer.Option("--max-size", help="Tolerated growth of the artifact.")
    ] = "1%",
    junit: Annotated[
        Path | None, typer.Option("--junit", help="Write a JUnit file.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put runs into one report with one frontier, and say what became worse from one to another.

    Of two runs, quality, cost and size of each variant are judged: a figure is a regression where
    it is worse by more than what is tolerated and its 95% interval excludes that nothing became
    worse. The exit code is 3 where there is one. Of more runs, or with --output, the report is
    written (to `comparison` unless told otherwise): models and devices may be different.
    """
    if len(runs) < 2:
        raise RecipeError("one run is no comparison", where=str(runs[0]), fix="give two or more")
    if output is not None or len(runs) > 2:
        _write_comparison(runs, output or Path("comparison"), as_json)
        if len(runs) > 2 or not _have_common(runs):
            return
    from compressor.compare import compare as compare_runs
    from compressor.compare import write_junit
    from compressor.evaluate.options import parse_share

    tolerated = {}
    for name, option, text in (
        ("quality", "--max-loss", quality),
        ("cost", "--max-cost", cost),
        ("size", "--max-size", size),
    ):
        if (share := parse_share(text)) is None:
            raise RecipeError(f"{text!r} is no share", where=option, fix="for example 1% or 0.01")
        tolerated[name] = share
    found = compare_runs(runs[0], runs[1], **tolerated)
    if junit is not None:
        write_junit(found, junit)
    worse = [one for one in found if one.regressed]
    if as_json:
        typer.echo(json.dumps([one.to_dict() for one in found], indent=1))
    else:
        console = Console()
        for one in found:
            style = "bold red" if one.regressed else ""
            console.print(Text(one.sentence, style=style), soft_wrap=True)
        console.print(f"{len(found)} compared, {len(worse)} worse")
    if worse:
        raise typer.Exit(GATE_FAILED)


def _write_comparison(runs: Sequence[Path], output: Path, as_json: bool) -> None:
    from compressor.report.comparison import compare_reports, write_comparison

    content = compare_reports(runs)
    write_comparison(content, output)
    if as_json and len(runs) > 2:
        typer.echo(json.dumps(content, indent=1))
    else:
        typer.echo(content["sentence"], err=as_json)
        typer.echo(f"report: {output / 'index.html'}", err=as_json)


def _have_common(runs: Sequence[Path]) -> bool:
    """Whether two runs have a variant in common, beside the baselines of two recipes."""
    from compressor.report.comparison import report_file
    from compressor.report.read import read_report

    one, other = (read_report(report_file(run)) for run in runs)
    return one["recipe"]["name"] == other["recipe"]["name"]


@app.command()
def history(
    what: Annotated[
        Path,
        typer.Argument(help="Recipe (YAML), or a directory of runs.", metavar="RECIPE|DIRECTORY"),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write a report of them into it.", metavar="DIRECTORY"),
    ] = None,
    runs: Annotated[
        Path | None, typer.Option("--runs", help="Directory of runs. Default: the recipe's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the runs of a recipe over time, the oldest first."""
    from compressor.report import comparison, figures
    from compressor.report.runs import find_runs

    if what.is_dir():
        found = find_runs(what)
        names = sorted({run.recipe for run in found})
        if len(names) > 1:
            raise RecipeError(
                f"holds runs of several recipes: {', '.join(names)}",
                where=str(what),
                fix=f"give one of them, such as {what / names[0]}",
            )
    else:
        from compressor.recipe import load_recipe

        recipe = load_recipe(what)
        found = find_runs(runs or recipe.output_dir, recipe.name)
    content = comparison.compare_reports([run.path for run in found])
    if output is not None:
        comparison.write_comparison(content, output)
    if as_json:
        typer.echo(json.dumps(content, indent=1))
        return
    table = Table(title=f"runs of {found[0].recipe}")
    for column in ("date", "run", "recipe", "variant"):
        table.add_column(column, no_wrap=column == "date")
    money = content["currency"]
    for column in ("size", "perplexity", f"{money}/Mtok output", "cost gain"):
        table.add_column(column, justify="right")
    for index, run in enumerate(content["runs"]):
        for place, row in enumerate(v for v in content["variants"] if v["run"] == index):
            change = row["perplexity_change"] or {"value": None, "low": None, "high": None}
            ends = None if change["low"] is None else (change["low"], change["high"])
            head = ("", "", "") if place else (
                run["created"][:16].replace("T", " "), found[index].path.name,
                (run["recipe_sha256"] or "")[:8],
            )  # fmt: skip
            table.add_row(
                *map(Text, head),
                Text(row["name"]),
                figures.size(row["size_bytes"]),
                "reference" if row["is_baseline"] else figures.change(change["value"], ends),
                figures.measured(row["cost_usd_per_mtok_output"]),
                "1×" if row["is_baseline"] else figures.ratio(row["cost_ratio"]),
            )
        table.add_section()
    Console().print(table)
    if output is not None:
        typer.echo(f"report: {output / 'index.html'}")


@app.command()
def gc(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Directories of all runs that use the store.",
            metavar="[RUNS]...",
            show_default="runs",
        ),
    ] = None,
    store: Annotated[Path, typer.Option("--store", help="Directory of finished stages.")] = Path(
        ".compressor"
    ),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be freed, free nothing.")
    ] = False,
) -> None:
    """Free the stages that no run refers to: delete a run's directory, then call this.

    What interrupted runs have made or begun stays, and so do the trials of searches.
    """
    from compressor.gc import collect
    from compressor.store import Store

    if not (store / "objects").is_dir():
        raise RunError("there is no store", where=str(store), fix="name it with --store")
    freed = collect(Store(store), runs or [Path("runs")], dry_run=dry_run)
    words = "would be freed" if dry_run else "freed"
    typer.echo(
        f"{freed.stages} stages and {freed.unfinished} unfinished ones {words}, "
        f"{freed.bytes / 1e9:.3f} GB that nothing else links to; {freed.kept} stages stay"
    )


@app.command("open")
def open_report(
    place: Annotated[
        Path, typer.Argument(help="Directory of runs, or of one run.", show_default=True)
    ] = Path("runs"),
    only_print: Annotated[
        bool, typer.Option("--print", help="Print the page's path, open nothing.")
    ] = False,
) -> None:
    """Open the report of the last run in a browser."""
    import webbrowser

    from compressor.report.runs import find_runs

    own = place / "report" / "index.html"
    page = own if own.is_file() else find_runs(place)[-1].path / "report" / "index.html"
    typer.echo(str(page))
    if not only_print and not webbrowser.open(page.resolve().as_uri()):
        _complain("no browser can be opened here; open that file yourself", "yellow")


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="Hub id, directory, .gguf file.")],
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="h100, a100, ..., or cpu or gpu: this machine's, measured now. Default: the one "
            "of --run, else cpu.",
            show_default=False,
        ),
    ] = None,
    scheme: Annotated[
        str, typer.Option("--scheme", help="W4A16, W8A8, FP8, ..., or bf16, fp16, fp32.")
    ] = "bf16",
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Columns per scale; -1 for channels.")
    ] = None,
    kv: Annotated[str | None, typer.Option("--kv", help="Cache in fp8 or int8.")] = None,
    input_length: Annotated[int, typer.Option("--input", help="Tokens per prompt.")] = 512,
    output_length: Annotated[int, typer.Option("--output", help="Tokens per answer.")] = 128,
    batch: Annotated[
        str, typer.Option("--batch", help="Requests at once, with commas.")
    ] = "1,8,32",
    acceptance_length: Annotated[
        float | None, typer.Option("--acceptance-length", help="Tokens per verified step.")
    ] = None,
    draft_tokens: Annotated[int, typer.Option("--draft-tokens", help="Drafted per step.")] = 4,
    draft_cost: Annotated[
        float, typer.Option("--draft-cost", help="Time of one drafted token / of one step.")
    ] = 0.0,
    usd_per_hour: Annotated[
        float | None, typer.Option("--usd-per-hour", help="Price of the device.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run", help="Calibrate on this run, and show how far off estimates are."),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Of a Hub model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a model could do on a device at best, from its config alone; nothing is measured."""
    from compressor.measure import roofline
    from compressor.measure.devices import find_device
    from compressor.measure.prices import price_rows, resolve_prices
    from compressor.models.dimensions import read_dimensions
    from compressor.report.estimate import compare_run, comparison_table, estimate_table, facts

    given = find_device(device) if device else None
    compared = compare_run(run_dir, given) if run_dir is not None else None
    found = compared.device if compared else given or find_device("cpu")
    parsed, dtype = roofline.parse_scheme(scheme, group_size)
    if kv not in (None, "fp8", "int8"):
        raise RecipeError(f"no cache of {kv!r}", where="--kv", fix="use fp8 or int8")
    try:
        batches = [int(part) for part in batch.split(",")]
    except ValueError as error:
        raise RecipeError("not numbers", where="--batch", fix="for example 1,8,32") from error
    prices = None
    if usd_per_hour is not None or found.price in price_rows():
        asked = {"device": found.price or found.id, "usd_per_hour": usd_per_hour}
        prices = resolve_prices(asked, cpu_count=os.cpu_count() if found.id == "cpu" else None)
    spoken = (
        roofline.Speculation(acceptance_length, draft_tokens, draft_cost)
        if acceptance_length is not None
        else None
    )
    dims = read_dimensions(model, revision=revision)
    stored = dims.dtype if dims.dtype in ("float16", "bfloat16") else "bfloat16"
    made = roofline.estimate(
        roofline.Setup(dims, parsed, dtype or stored, kv),
        found,
        batches=batches,
        input_length=input_length,
        output_length=output_length,
        efficiency=compared.efficiency if compared else None,
        speculation=spoken,
        prices=prices,
    )
    if as_json:
        made["comparison"] = compared.to_dict() if compared else None
        typer.echo(json.dumps(made, indent=1))
        return
    console = Console()
    console.print(estimate_table(made))
    for line in facts(made):
        console.print(line, highlight=False, soft_wrap=True)
    if compared is not None:
        console.print(comparison_table(compared.to_dict()))


def _load(recipe: Path, output: Path | None, only: list[str] | None) -> Recipe:
    from compressor.recipe import load_recipe

    loaded: Recipe = load_recipe(recipe)
    if only and loaded.optimise is not None:
        raise RecipeError(
            "a search looks at every variant", where="--only", fix="remove it, or `optimise:`"
        )
    unknown = set(only or ()) - set(loaded.variants)
    if unknown:
        raise RecipeError(
            f"no variant {sorted(unknown)[0]!r}",
            where=str(recipe),
            fix=f"choose from {', '.join(loaded.variants)}",
        )
    if output is not None:
        loaded = loaded.model_copy(update={"output": str(output.resolve())})
    return loaded


def _store(loaded: Recipe, store: Path | None) -> Store:
    from compressor.store import Store

    return Store((store or loaded.store_dir).resolve(), loaded.shared_store)


def _plan(loaded: Recipe, store: Path | None, only: list[str] | None, proofs: bool = True) -> Plan:
    from compressor.plan import make_plan

    return make_plan(loaded, _store(loaded, store), only or (), proofs=proofs)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
