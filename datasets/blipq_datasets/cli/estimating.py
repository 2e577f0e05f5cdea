"""``blipq bulk estimate``: what a dataset will take, before it is submitted."""

import json
import shlex

from blipq.bulk.journal import driving
from blipq.bulk.manners import HOST_RATE
from blipq.cli import bulk
from blipq.cli.terminal.output import JsonOption, connected, errors, out
from blipq.errors import InvalidRequest
from blipq.program import blipq
from blipq_datasets import flags
from blipq_datasets.cli.figures import lines_of
from blipq_datasets.dataset import Dataset
from blipq_datasets.estimate import estimate as estimated
from blipq_datasets.journal import DatasetJournal


def estimate(
    source: flags.Source = None,
    sample: flags.SampleOption = 200,
    recipe: flags.RecipeOption = None,
    kind: flags.KindOption = None,
    question: flags.QuestionOption = None,
    text: flags.TextOption = None,
    prompt: flags.PromptOption = None,
    image_column: flags.ImageColumnOption = None,
    id_column: flags.IdColumnOption = None,
    prompt_column: flags.PromptColumnOption = None,
    journal: flags.JournalOption = None,
    host_rate: bulk.HostRateOption = HOST_RATE,
    model: flags.ModelOption = None,
    priority: flags.PriorityOption = None,
    expires_in: flags.ExpiresOption = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate what a dataset will take: a sample of its rows is run, with a low priority.

    Rows, bytes, cache hits, GPU time, and hours on the workers that live now, each with the range
    that 19 of 20 runs should lie in. `bulk submit` with the same options takes the sample's
    answers over.

    Examples:
        blipq bulk estimate s3://photos/shards/ --question "what is it?"
        blipq bulk estimate --recipe cars.toml --sample 500
    """
    options = {name: value for name, value in locals().items() if name != "sample"}
    given = flags.Flags(**options)
    with connected(as_json) as client:
        if given.is_of_a_manifest:
            raise InvalidRequest(
                f"{source} is a manifest, a request per line, and estimates are of datasets: say "
                "what each row is asked, by --kind, --question, --text, --prompt or --recipe"
            )
        chosen, place, path = given.named
        manners = given.manners
        client.ledger.check_models([chosen.options.get("model", "default")])

        def drive(kept: DatasetJournal, rows: Dataset, size: int) -> None:
            window = min(size, client.settings.window)
            entries = rows.entries
            bulk.drive(
                *(client, kept, entries, lambda driver: driver.lines / size),
                *(window, manners, as_json),
            )

        with driving(path):
            found = estimated(place, chosen, client, path, sample, drive)
        if as_json:
            print(json.dumps(found.as_dict()))
            return
        for line in lines_of(found, place):
            out.print(line, markup=False)
        command = blipq(f"bulk submit {shlex.quote(place)}")
        errors.print(f"run it with the same options: {command}", style="dim", markup=False)
