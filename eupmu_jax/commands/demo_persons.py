"""`eupmu demo --data persons`: a language model forgets persons, compared with one that never learned about them."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eupmu_jax.benchmark import answers, persons
from eupmu_jax.benchmark import rows as saved_rows
from eupmu_jax.benchmark.problems import RETRAINED_SEED_OFFSET
from eupmu_jax.commands import demo, persons_page
from eupmu_jax.commands._command_line import command_line
from eupmu_jax.metrics.rouge import rouge_l
from eupmu_jax.training import checkpoints
from eupmu_jax.training._alone import alone
from eupmu_jax.training.unlearning import unlearn

NAME, METHOD = "persons", "EUPMU"
STEPS, FORGET_BATCH, RETAIN_BATCH = 60, 8, 8


def run(seed: int, out: Path, console: Console) -> list[dict]:
    """Fine-tunes, unlearns, evaluates, prints answers and a table, and writes rows, checkpoint and a page to `out`.

    Args:
      seed: Seed of the persons, the fine-tuning and the method, which runs with its default settings.
      out: Folder for `rows.jsonl`, `report.html`, `checkpoints/` and the cache `models/` of fine-tuned models.
      console: Where progress, answers and the table are printed.

    Returns:
      The rows: original, retrained, and EUPMU's.

    Raises:
      FileNotFoundError: If SmolLM2 or WordNet is not on this machine; the message says how to get it.
      ImportError: Without the extra `language`.
      ValueError: Before any work, for a folder that is unwritable or has rows of something else.
    """
    demo.check_folder(seed, out)
    demo.check_rows(out, lambda row: row.get("data") == NAME)
    # Raises before any work if the extra is missing.
    rouge_l(["a"], ["a"])
    with alone(out):
        return _run(seed, out, console)


def _run(seed, out, console):
    parts = persons.sets(seed)
    with demo.progress_of(console) as progress:

        def train(description, part, order):
            with demo.bar(progress, description, persons.steps_of(part)) as advance:
                return persons.train(part, order, out / "models", advance)

        original = train("original model", persons.joined(parts.forget, parts.retain), seed)
        retrained = train("retrained model", parts.retain, seed + RETRAINED_SEED_OFFSET)
        rows = []

        def add(method, params, seconds, **more):
            asked = {"method": method, "data": NAME, "seed": seed, "seconds": seconds}
            made_by = saved_rows.provenance(command_line())
            rows.append(asked | figures(params, parts) | more | made_by)

        add("original", original.params, original.seconds, answers=_answers(original.params, parts))
        add("retrained", retrained.params, retrained.seconds, answers=_answers(retrained.params, parts))
        # The level that EUPMU steers to.
        target = answers.error(persons.respondent(), original.params, parts.held_out)
        sets = [answers.examples(answers.encoded(persons.respondent(), part)) for part in parts[:3]]
        with demo.bar(progress, METHOD, STEPS) as advance:
            result = unlearn(
                METHOD,
                persons.task(),
                original.params,
                *sets,
                steps=STEPS,
                seed=seed,
                forget_batch=FORGET_BATCH,
                retain_batch=RETAIN_BATCH,
                probes=0,
                on_step=advance,
            )
        add(METHOD, result.params, result.seconds, target=target, answers=_answers(result.params, parts))
        meta = {"method": METHOD, "data": NAME, "seed": seed}
        checkpoints.save(out / "checkpoints" / METHOD, result.params, meta)

    rows = demo.saved(rows, out, persons_page.render)
    _print_answers(rows, console)
    demo.show(f"{NAME}: forget {persons.FORGOTTEN} persons, seed {seed}", rows, [rows[-1]], persons_page, out, console)
    return rows


def figures(params, parts: persons.Sets) -> dict[str, float]:
    """Probability, ROUGE-L recall and error of the answers about forgotten persons, and error on retained ones."""
    respondent = persons.respondent()
    return {
        "probability": answers.probability(respondent, params, parts.forget),
        "rouge": answers.rouge(respondent, params, parts.forget),
        "forget_error": answers.error(respondent, params, parts.forget),
        "retain_error": answers.error(respondent, params, persons.measured(parts.retain)),
    }


def _answers(params, parts):
    """For each kind of question: the question, the right answer and the model's own."""
    found = {}
    for kind, part in zip(persons_page.KINDS, persons.shown(parts), strict=True):
        own = answers.answers(persons.respondent(), params, part)
        found[kind] = [list(three) for three in zip(part.question, part.answer, own, strict=True)]
    return found


def _print_answers(rows, console):
    for kind, meaning in persons_page.KINDS.items():
        table = Table(title=meaning, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
        for k, (question, right, _) in enumerate(rows[0]["answers"][kind]):
            table.add_row(Text(question, style="bold"), Text(right, style="dim"))
            for row in rows:
                table.add_row(f"  {row['method']}", Text(row["answers"][kind][k][2]))
        console.print(table)
        console.print()
