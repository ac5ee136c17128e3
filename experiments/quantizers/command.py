"""The command `python -m experiments.quantizers`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from experiments.objectives import options as shared
from experiments.objectives.experiment import Experiment, Photos, Result, open_photos
from experiments.objectives.results import figure
from experiments.objectives.rows import Budget
from experiments.quantizers.results import as_text
from experiments.quantizers.rows import BASELINE, BUDGETS, FIRST_STAGES, OBJECTIVE, WITH_CRITIC
from first_stage.errors import ConfigError
from first_stage.evaluation.grids import save_png
from first_stage.files import write_json, write_text

_WORDS = {
    "quick": "The short comparison: a seed in about twenty minutes on a CPU core.",
    "small": "8 times as many steps. Without --quick and --small: the full comparison, for a GPU.",
    "seeds": "Seeds, separated by spaces.",
    "rows": f"Which first stages, separated by spaces; null: all of {', '.join(FIRST_STAGES)}.",
}

Results = dict[str, dict[str, list[Result]]]
"""By first stage, then by objective, one for each seed."""


@dataclass(frozen=True)
class Options(shared.Options):
    """What to compare, on what, and for how long."""

    output: str = "runs/quantizers"
    """Folder for the results. Finished ones in it are kept: a run that was cut off goes on."""
    critic: bool = True
    """Train some first stages with the learned distance and the hinge as well."""


def main() -> None:
    """Train every first stage, measure it, and print the table."""
    options = parse_options()
    options.set_threads()
    output, budget = Path(options.output), BUDGETS[options.size]
    photos = open_photos(options.more)
    print(
        f"{len(photos.training)} photos to train on, {len(photos.held_out)} held-out tiles from "
        f"{len(set(photos.names))} photos\n{budget}",
        flush=True,
    )
    experiments = {name: make_experiment(name, photos, budget, output)
                   for name in options.rows or FIRST_STAGES}  # fmt: skip
    results: Results = {name: {BASELINE: []} for name in experiments}
    for seed in options.seeds:
        for name, experiment in experiments.items():
            results[name][BASELINE].append(experiment.result(BASELINE, seed))
            write(output, results, photos)  # whoever looks in early, or stops it, has what is there
        for name in WITH_CRITIC:
            if options.critic and name in experiments:
                found = results[name].setdefault(OBJECTIVE, [])
                found.append(experiments[name].result(OBJECTIVE, seed))
                write(output, results, photos)
    seed = options.seeds[0]
    folders = {n: e.first_stage_folder(BASELINE, seed) for n, e in experiments.items()}
    save_png(figure(folders, photos), output / "quantizers.png")
    print(f"\n{(output / 'quantizers.md').read_text()}")
    print(f"table   {output}/quantizers.md\nnumbers {output}/quantizers.json")
    print(f"figure  {output}/quantizers.png")


def make_experiment(name: str, photos: Photos, budget: Budget, output: Path) -> Experiment:
    """The comparison of objectives in which a first stage is trained."""
    own = dataclasses.replace(budget, first_stage=FIRST_STAGES[name])
    return Experiment(photos, own, output / name, lambda line: print(f"{name}, {line}", flush=True))


def parse_options(arguments: list[str] | None = None) -> Options:
    """The options of the command line.

    Raises:
        ConfigError: In one line for anything that cannot work.
    """
    description = "Compare quantizers: same photos, same network, same images seen."
    options = shared.read(Options, description, _WORDS, arguments)
    for problem in shared.problems(options, list(FIRST_STAGES)):
        raise ConfigError(problem)
    return options


def write(output: Path, results: Results, photos: Photos) -> None:
    """Write what is there as a table and as numbers."""
    there = {name: each for name, each in results.items() if each[BASELINE]}
    write_text(output / "quantizers.md", as_text(there, photos))
    write_json(output / "quantizers.json", {
        name: {row: [dataclasses.asdict(r) for r in found] for row, found in each.items()}
        for name, each in there.items()
    })  # fmt: skip
