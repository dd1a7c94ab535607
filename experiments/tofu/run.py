"""A language model fine-tuned on TOFU forgets authors, on all devices of a machine, and is evaluated as in TOFU.

Command:  uv run --extra language python experiments/tofu/run.py --model FOLDER --data FOLDER --retrained FOLDER
Time:     5 passes over the forget set, and generating answers to some thousand questions twice.
Result:   a row of figures and the unlearned parameters in --out.

`--model` is a model in Hugging Face's format, such as Llama 3.2 1B, fine-tuned on all of TOFU, `--retrained` is one
fine-tuned on the retain set alone, and `--data` a copy of the data set. With `--rank`, low-rank adapters are trained,
else all parameters. `dpo` and `lrml` prefer refusals: those of `data.persons` in turn, as TOFU's tables have none. The
model is on a mesh of `--data-axis` x `--tensor-axis` devices. `eupmu plan --model 1b` reports roughly what a step
takes: it compiles this library's own decoder of these sizes, not the class of google-tunix that is loaded here. It was
run here on a tiny model and questions with TOFU's layout, on one device and on eight simulated ones, never on TOFU
itself; page.md has commands.
"""

import argparse
import os
from pathlib import Path

if __name__ == "__main__":
    # Set before JAX is imported: pass pretrained weights to each program instead of embedding them in it.
    os.environ.setdefault("JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS", "1")

import jax
import jax.numpy as jnp

import eupmu_jax as eupmu
from eupmu_jax import methods, sharding, tasks
from eupmu_jax.benchmark import answers, rows
from eupmu_jax.data import tofu
from eupmu_jax.data.persons import REFUSALS
from eupmu_jax.data.questions import PROMPT, Questions
from eupmu_jax.metrics.language import forget_quality
from eupmu_jax.models.language import huggingface_tokenizer, load_huggingface, with_lora
from eupmu_jax.training import checkpoints
from experiments import origin

# Passes over the forget set, as in TOFU.
PASSES = 5
# Forget losses that only need questions and answers, then those that compare with the original model.
OBJECTIVES = (
    "bounded_ascent",
    "random_labels",
    "kl_to_uniform",
    "gradient_ascent",
    "wga",
    "satimp",
    "simnpo",
    "npo",
    "dpo",
    "lrml",
    "undial",
    "rmu",
)
OTHERS = ("real_authors", "world_facts")


def template(text: str) -> str:
    """A template from the command line, without line breaks that are written out, which would be part of the prompt."""
    if "\\n" in text:
        raise argparse.ArgumentTypeError(
            f"got {text!r} with a backslash and an n, expected line breaks, in Bash --template $'first\\nsecond'"
        )
    return text


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--retrained", type=Path)
    parser.add_argument("--forget", type=int, choices=(1, 5, 10), default=10)
    parser.add_argument("--method", default="EUPMU")
    parser.add_argument("--objective", choices=OBJECTIVES, help="the method's own if none is given")
    parser.add_argument("--retain", choices=("cross_entropy", "kl"), help="hidden states under rmu if none is given")
    parser.add_argument(
        "--steps", type=int, help=f"as many as make {PASSES} passes over the forget set if none is given"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters; 0 trains all parameters")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--answer", type=int, default=200, help="tokens of a generated answer at most")
    parser.add_argument(
        "--template",
        type=template,
        default=PROMPT,
        help="what the model was fine-tuned with; a first token that it saw, such as <|begin_of_text|>, included",
    )
    parser.add_argument("--learning-rate", type=float, help="the method's own if none is given")
    parser.add_argument(
        "--retain-weight", type=float, help="of methods that have one; the middle of their range if none"
    )
    parser.add_argument("--dtype", help="bfloat16 under adapters, float32 without, which small steps need")
    parser.add_argument("--data-axis", type=int, default=1)
    parser.add_argument("--tensor-axis", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("eupmu_runs/tofu"))
    return parser.parse_args(arguments)


def respondent(folder: Path, given: argparse.Namespace, mesh, rank: int) -> answers.Respondent:
    """The model of a folder on the mesh, with or without adapters, and how it is prompted."""
    model = load_huggingface(
        folder,
        jnp.dtype(given.dtype or ("bfloat16" if given.rank else "float32")),
        # Sharded over all devices: each holds its share of every matrix and gathers the rest for use.
        shardings=lambda shapes: sharding.param_shardings(shapes, mesh, axes=("data", "model")),
        remat=True,
    )
    model = with_lora(model, model.params, rank, key=jax.random.key(given.seed)) if rank else model
    tokenizer = huggingface_tokenizer(folder)
    return answers.Respondent(model, tokenizer, given.template, given.length, given.length, given.answer, given.batch)


def run(given: argparse.Namespace, made_by: dict) -> dict:
    """Unlearns and evaluates; returns the row."""
    share = f"{given.forget:02}"
    tables = {"forget": f"forget{share}", "retain": f"retain{100 - given.forget}", "held_out": f"holdout{share}"}
    sets = {name: tofu.load(given.data, table) for name, table in tables.items()}
    judged = {name: tofu.load(given.data, f"{name}_perturbed") for name in (f"forget{share}", "retain", *OTHERS)}
    mesh = sharding.make_mesh(given.data_axis, given.tensor_axis)
    model = respondent(given.model, given, mesh, given.rank)
    task = task_of(given, model)
    batches = [batch_of(given, model, part) for part in sets.values()]
    for part in judged.values():
        answers.check(model, part)
    # Before any unlearning, so that an unreadable model does not waste the run.
    ratios = retrained_ratios(given, mesh, judged[f"forget{share}"]) if given.retrained else None
    if given.objective in ("npo", "dpo", "lrml"):
        plain = tasks.language(model.language.apply)
        batches = [tasks.with_reference(plain, model.language.params, b, batch_size=given.batch) for b in batches]
    steps = given.steps or PASSES * -(-len(sets["forget"].question) // given.batch)
    result = eupmu.unlearn(
        given.method,
        task,
        model.language.params,
        *map(answers.examples, batches),
        steps=steps,
        settings=settings_of(given, task),
        seed=given.seed,
        forget_batch=given.batch,
        retain_batch=given.batch,
        mesh=mesh,
        directory=given.out / "run",
        probes=1,
    )
    checkpoints.save(given.out / "params", result.params, {"method": given.method, "seed": given.seed})
    forget, retain, *others = judged.values()
    judge = lambda params: answers.judge(model, params, forget, retain, dict(zip(OTHERS, others, strict=True)))
    row = {
        "method": given.method,
        "objective": given.objective,
        "retain": given.retain,
        "forget": given.forget,
        "seed": given.seed,
    }
    row |= {"original": judge(model.language.params), "unlearned": judge(result.params)}
    row |= {"steps": steps, "seconds": result.seconds, "figures": result.figures}
    if ratios is not None:
        row["forget_quality"] = forget_quality(row["unlearned"]["truth_ratios"], ratios).log10
    rows.append(given.out / "rows.jsonl", row | made_by)
    return row


def task_of(given: argparse.Namespace, model: answers.Respondent) -> eupmu.Task:
    """The task, with the original model where a loss compares its predictions or its hidden states."""
    language, steered = model.language, given.objective == "rmu"
    retain = given.retain or ("rmu" if steered else "cross_entropy")
    # The output of the middle block, as for models of 16 blocks in open-unlearning.
    hidden = lambda params, tokens: language.hidden(params, tokens, language.layers // 2)
    return tasks.language(
        language.apply,
        hidden=hidden if steered else None,
        original=language.params if given.objective == "undial" or retain != "cross_entropy" else None,
        retain=retain,
    )


def batch_of(given: argparse.Namespace, model: answers.Respondent, part: Questions) -> dict:
    """The questions with their answers, and with refusals if the loss prefers them."""
    batch = answers.encoded(model, part)
    if given.objective in ("dpo", "lrml"):
        refusals = [REFUSALS[row % len(REFUSALS)] for row in range(len(part.question))]
        batch |= {f"alternative_{name}": leaf for name, leaf in answers.encoded(model, part, refusals).items()}
    return batch


def retrained_ratios(given: argparse.Namespace, mesh, forget: Questions) -> list[float]:
    """The truth ratios of the retrained model, whose parameters are then released."""
    other = respondent(given.retrained, given, mesh, 0)
    answers.check(other, forget)
    return answers.truth_ratios(other, other.language.params, forget)


def settings_of(given: argparse.Namespace, task: eupmu.Task) -> dict | None:
    """The method's default settings, with the requested ones; None for the defaults."""
    asked = {"forget_objective": given.objective, "learning_rate": given.learning_rate}
    chosen = asked | {"retain_weight": given.retain_weight}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return methods.default_settings(methods.method(given.method), task) | chosen if chosen else None


def main():
    given = parsed()
    row = run(given, origin.of(__file__, "--model", given.model, "--data", given.data, "--forget", given.forget))
    for name in ("original", "unlearned"):
        print(name, *(f"{part} {row[name][part]:.3f}" for part in ("probability", "rouge", "utility")))
    if "forget_quality" in row:
        print(f"forget quality (log10) {row['forget_quality']:.2f}")


if __name__ == "__main__":
    main()
