"""The command ``saerec``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError:  # pragma: no cover - depends on the environment
    sys.exit("the command saerec needs: pip install saerec-fast[study]")

if TYPE_CHECKING:
    from saerec_fast.pipeline import Run

console = Console()
app = typer.Typer(
    help="Sparse autoencoders for sequential recommenders: train, interpret, steer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Fetch data sets and look at them.", no_args_is_help=True)
app.add_typer(data_app, name="data")

RunFolder = Annotated[Path, typer.Option("--run", help="Folder of the run's artefacts.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
DataPath = Annotated[
    str, typer.Option("--data", help="Folder or file of interactions, or the name of a MovieLens set such as ml-100k.")
]


def main() -> None:
    """Entry point: errors that a user can mend are one line, not a traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError, ImportError, RuntimeError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", markup=True, highlight=False)
        sys.exit(1)


@data_app.command("download")
def data_download(
    name: Annotated[str, typer.Argument(help="ml-100k, ml-1m, ml-20m, ml-25m or ml-32m.")],
    quiet: Quiet = False,
) -> None:
    """Fetch a MovieLens data set into the user cache, check it and show its terms."""
    from saerec_fast.data import download

    console.print(str(download(name, progress=not quiet)))


@data_app.command("show")
def data_show(path: Annotated[str, typer.Argument(help="Folder, file or MovieLens name.")]) -> None:
    """Counts, sequence lengths and attribute shares of a data set."""
    from saerec_fast.data import describe, read_dataset

    facts = describe(read_dataset(_resolve_data(path, quiet=False)))
    table = Table(title=facts["name"], show_header=False)
    for label, value in (
        ("users", f"{facts['n_users']:,}"),
        ("items", f"{facts['n_items']:,}"),
        ("interactions", f"{facts['n_interactions']:,}"),
        ("density", f"{facts['density']:.2%}"),
        ("first", facts["first_time"] or "no timestamps"),
        ("last", facts["last_time"] or "no timestamps"),
        *((f"sequence length, {name}", f"{value:.0f}") for name, value in facts["sequence_length"].items() if value),
    ):
        table.add_row(label, value)
    console.print(table)
    shares = Table("attribute", "share of items", "share of interactions")
    for attribute in sorted(facts["attributes"], key=lambda one: -one["interaction_share"]):
        shares.add_row(attribute["name"], f"{attribute['item_share']:.1%}", f"{attribute['interaction_share']:.1%}")
    if facts["attributes"]:
        console.print(shares)


@app.command()
def train(
    data: DataPath = "ml-100k",
    run: RunFolder = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(help="Upper limit; training stops early.")] = 30,
    d_model: Annotated[int, typer.Option(help="Width of the hidden states.")] = 64,
    layers: Annotated[int, typer.Option(help="Transformer blocks.")] = 2,
    max_length: Annotated[int, typer.Option(help="Items the model looks back on.")] = 50,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """Split the users, train the recommender, compare it with item-kNN, recency-weighted item-kNN and popularity."""
    from saerec_fast.pipeline import RECOMMENDERS, DataSettings, RecommenderSettings

    study = _run(run, quiet)
    study.prepare_data(DataSettings(_resolve_data(data, quiet), seed=seed))
    result = study.train_recommender(
        RecommenderSettings(d_model=d_model, n_layers=layers, max_length=max_length, epochs=epochs, seed=seed)
    )
    table = Table("recommender", "NDCG@10", "95 % interval", "HitRate@10", "Coverage@10")
    for name, label in RECOMMENDERS.items():
        measured = result[name]
        low, high = measured["intervals"]["ndcg@10"]
        table.add_row(
            label,
            f"{measured['ndcg@10']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{measured['hit_rate@10']:.3f}",
            f"{measured['coverage@10']:.2f}",
        )
    console.print(table)


@app.command()
def compare(
    data: DataPath = "ml-100k",
    out: Annotated[Path, typer.Option("--out", help="Folder of the folds and comparison.json.")] = Path(
        "runs/comparison"
    ),
    folds: Annotated[int, typer.Option(help="Parts the users are dealt into; each is held out once.")] = 5,
    targets: Annotated[int, typer.Option(help="Last items of a held-out user that are to be found.")] = 10,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """The transformer and its baselines, cross-validated over all but the test users, with the demo's settings."""
    from saerec_fast.demo import run_comparison
    from saerec_fast.pipeline import RECOMMENDERS

    result = run_comparison(
        _resolve_data(data, quiet),
        out,
        n_folds=folds,
        targets_per_user=targets,
        seed=seed,
        progress=not quiet,
        say=lambda line: console.print(line, markup=False, highlight=False),
    )
    table = Table("recommender", "NDCG@10", "95 % interval", "lead", "95 % interval")
    for name, (value, low, high) in result["ndcg"].items():
        lead = result["leads"].get(name)
        over = (f"{lead[0]:+.3f}", f"{lead[1]:+.3f} to {lead[2]:+.3f}") if lead else ("", "")
        table.add_row(RECOMMENDERS[name], f"{value:.3f}", f"{low:.3f} to {high:.3f}", *over)
    console.print(table)
    console.print(
        f"{result['n_users']} users, each held out once, {targets} targets each at most; lead: the transformer's"
    )


@app.command()
def sae(
    run: RunFolder = Path("runs/demo"),
    site: Annotated[str, typer.Option(help="embedding, block.0, mlp.0, …, last.")] = "block.0",
    users: Annotated[str, typer.Option(help="train_sae, or non_test for small data.")] = "train_sae",
    activation: Annotated[str, typer.Option(help="relu, topk, batch_topk, jump_relu or gated.")] = "relu",
    features: Annotated[int, typer.Option(help="Size of the dictionary.")] = 1024,
    k: Annotated[int, typer.Option(help="Active features per row (topk, batch_topk).")] = 32,
    l1: Annotated[float, typer.Option(help="Weight of the L1 penalty (relu, gated).")] = 0.5,
    l0: Annotated[float, typer.Option(help="Weight of the L0 penalty (jump_relu).")] = 0.1,
    steps: int = 6000,
    batch_size: int = 2048,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """Collect hidden states and train a sparse autoencoder on them."""
    from saerec_fast.pipeline import ActivationSettings
    from saerec_fast.sae import SAETrainingConfig

    config = SAETrainingConfig(
        n_features=features,
        activation=activation,  # type: ignore[arg-type]
        k=k,
        l1_coefficient=l1,
        l0_coefficient=l0,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
    )
    study = _run(run, quiet)
    study.collect_activations(ActivationSettings(site, users))
    result = study.train_sae(config)
    original = study.result("recommender")["transformer"]["ndcg@10"]
    table = Table(show_header=False, title="SAE on test users")
    table.add_row("explained variance", f"{result['explained_variance']:.3f}")
    table.add_row("active features per row (L0)", f"{result['l0']:.1f}")
    table.add_row("dead features", f"{result['dead_fraction']:.1%}")
    table.add_row("NDCG@10 with the reconstruction", f"{result['reconstruction']['ndcg@10']:.3f} of {original:.3f}")
    console.print(table)


@app.command()
def interpret(
    run: RunFolder = Path("runs/demo"),
    top: Annotated[int, typer.Option(help="Titles shown per feature.")] = 5,
    quiet: Quiet = False,
) -> None:
    """Which feature means what: the best feature of every attribute, with its top titles."""
    study = _run(run, quiet)
    study.interpret()
    summaries = study.interpretation.summaries()
    examples = study.saved_examples("sae")
    table = Table("attribute", "share", "feature", "correlation", "ROC AUC", "raw dimension", "top titles")
    raw = {one.attribute: one for one in summaries["raw"].attributes}
    for one in sorted(summaries["sae"].attributes, key=lambda one: -one.correlation.value):
        titles = "; ".join(example["title"] for example in examples[one.correlation_feature][:top])
        table.add_row(
            one.attribute,
            f"{one.share:.1%}",
            f"#{one.correlation_feature}",
            f"{one.correlation.value:.3f}",
            f"{one.roc_auc.value:.3f}",
            f"{raw[one.attribute].correlation.value:.3f}",
            titles,
        )
    console.print(table)
    for name, label in (("sae", "SAE features"), ("raw", "raw dimensions")):
        mean = summaries[name].mean_max_correlation
        console.print(f"mean-max correlation, {label}: {mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f})")


@app.command()
def steer(
    run: RunFolder = Path("runs/demo"),
    attribute: Annotated[
        list[str] | None, typer.Option(help="Attribute to turn up; may be given several times.")
    ] = None,
    multiples: Annotated[
        str, typer.Option(help="Values to set the feature to, in units of its 99th percentile, separated by commas.")
    ] = "0,0.25,0.5,1,1.5,2",
    quiet: Quiet = False,
) -> None:
    """Share of an attribute in the top 10 against NDCG@10 while its feature is turned up."""
    from saerec_fast.pipeline import ControlSettings

    study = _run(run, quiet)
    try:
        parsed = tuple(float(part) for part in multiples.split(","))
    except ValueError:
        raise ValueError(f"multiples: expected numbers separated by commas, got {multiples!r}") from None
    _print_control(study.control(ControlSettings(attributes=tuple(attribute or ()), multiples=parsed)))


@app.command()
def recommend(
    history: Annotated[str, typer.Option(help='Titles, oldest first, separated by ";".')],
    run: RunFolder = Path("runs/demo"),
    steer: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=+2 adds, NAME=-1 subtracts, NAME=0 sets, NAME=x0.5 scales; NAME is an attribute, or #ID a "
            "feature. 1 is a strong activation of that feature: the 90th percentile of those it has."
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="delta keeps the SAE's error in the hidden state, reconstruct drops it.")
    ] = ("delta"),
    positions: Annotated[str, typer.Option(help="all or last.")] = "all",
    k: Annotated[int, typer.Option("-k", help="Length of the lists.")] = 10,
) -> None:
    """Recommendations before and after steering, side by side."""
    from saerec_fast.request import parse_history

    study = _run(run, quiet=True)
    plan = study.plan(steer or [], mode, positions)
    titles = study.split.test.item_table.titles
    before, after = study.before_and_after(plan, parse_history(history, titles), k)
    table = Table("", "before", "after")
    for rank, (old, new) in enumerate(zip(before, after, strict=True), 1):
        table.add_row(str(rank), titles[old], titles[new], style=None if old == new else "bold")
    for _, edit in plan.feature_edits:
        console.print(f"feature #{edit.feature}: {edit.op} {edit.value:+.3g}")
    console.print(table)


@app.command()
def demo(
    data: DataPath = "ml-100k",
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs/demo"),
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """Everything from raw interactions to steered recommendations, with a report."""
    from saerec_fast.demo import run_demo

    metrics = run_demo(_resolve_data(data, quiet), _run(out, quiet), seed=seed)
    _print_metrics(metrics, out)


@app.command()
def study(
    data: DataPath = "ml-100k",
    run: RunFolder = Path("runs/study"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer epochs, steps and SAEs: to look at, not to quote.")
    ] = False,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """The paper's whole programme: sweep, interpretability, control, with report.html, tables and figures."""
    from saerec_fast.study.settings import study_settings
    from saerec_fast.study.study import run_study

    path = _resolve_data(data, quiet)
    command = f"saerec study --data {data} --run {run}{' --quick' if quick else ''}{f' --seed {seed}' if seed else ''}"
    result = run_study(_run(run, quiet), study_settings(path, quick=quick, seed=seed), command=command)
    table = Table("goal", "wanted", "found", "reached")
    for goal in result["goals"]:
        table.add_row(goal["goal"], goal["wanted"], goal["found"], "yes" if goal["reached"] else "no")
    console.print(table)
    times = Table("step", "seconds")
    for name, seconds in result["seconds"].items():
        times.add_row(name, f"{seconds:.0f}")
    console.print(times)
    console.print(f"report: {run / 'report.html'}")


def _run(folder: Path, quiet: bool) -> Run:
    from saerec_fast.pipeline import Run

    return Run(folder, progress=not quiet, say=lambda line: console.print(line, markup=False, highlight=False))


def _resolve_data(data: str, quiet: bool) -> str:
    """A path as it is; a MovieLens name is fetched into the cache where it is not there yet."""
    from saerec_fast.data import download
    from saerec_fast.data.download import NAMES

    if data in NAMES and not Path(data).exists():
        return str(download(data, progress=not quiet))
    return str(Path(data).resolve())


def _print_control(result: dict[str, Any]) -> None:
    table = Table("attribute", "edit", "how", "share", "NDCG@10")
    for attribute, untouched in result["baseline"].items():
        table.add_row(attribute, "none", "", f"{untouched['share']:.3f}", f"{untouched['ndcg@10']:.3f}")
    for point in result["points"]:
        table.add_row(
            point["attribute"],
            f"{point['op']} #{point['feature']} {point['value']:.3g}",
            f"{point['mode']}, {point['positions']}",
            f"{point['share']:.3f}",
            f"{point['ndcg@10']:.3f}",
        )
    console.print(table)


def _print_metrics(metrics: dict[str, Any], out: Path) -> None:
    from saerec_fast.pipeline import RECOMMENDERS

    table = Table("figure", "value", "95 % interval over users")

    def add(label: str, value: float, interval: Any = None) -> None:
        span = "" if interval is None or interval[0] is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
        table.add_row(label, f"{value:.3f}", span)

    for name, label in RECOMMENDERS.items():
        one = metrics["recommender" if name == "transformer" else name]
        add(f"NDCG@10, {label}", one["ndcg@10"], one["intervals"]["ndcg@10"])
    add("NDCG@10 with the SAE's reconstruction", metrics["reconstruction"]["ndcg@10"])
    add("explained variance", metrics["sae"]["explained_variance"])
    add("active features per position (L0)", metrics["sae"]["l0"])
    add("dead features, share", metrics["sae"]["dead_fraction"])
    for name, label in (("sae", "SAE features"), ("raw", "raw dimensions")):
        one = metrics["interpretability"][name]
        add(f"mean-max correlation, {label}", one["mean_max_correlation"], one["mean_max_correlation_interval"])
        add(f"mean-max ROC AUC, {label}", one["mean_max_roc_auc"], one["mean_max_roc_auc_interval"])
    console.print(table)
    console.print(f"report: {out / 'report.html'}")
    console.print(
        f'try: saerec recommend --run {out} --history "{metrics["try"]["history"]}" '
        f'--steer "{metrics["try"]["steer"]}"',
        soft_wrap=True,
        markup=False,
    )


if __name__ == "__main__":
    main()
