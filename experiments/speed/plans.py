"""What steps take on absent devices: the memory of every kind of step, large decoders, and two denoisers.

Command:  uv run --extra tpu python experiments/speed/plans.py
Time:     about two hours on 2 CPU cores, more than half of it for the last plan, which takes 18 GB; only compilers
          run.
Result:   a plain step of a 7B decoder takes 1.5 GB of a chip on v5e:16x16, that of a 70B one 9 GB;
          on one chip explicit surgery of a decoder of 135M adds one more gradient and copies for the embedding
          to a plain step, two-pass less; rows in experiments/speed/plans.jsonl, which replace those of the same
          commands.

Each plan is one run of `eupmu plan` in its own process; its row has the command.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from eupmu_jax.benchmark import rows

ROOT = Path(__file__).parents[2]
RESULTS = Path("experiments/speed/plans.jsonl")
EVERY_STEP = ("plain", "explicit", "explicit-bf16", "explicit-microbatches", "two-pass", "implicit")
LARGE_STEPS = ("plain", "explicit", "two-pass")
# One chip, short batches: parameters outweigh activations, and copies of them can be counted.
MEMORY = "--model 135m --data 1 --tensor 1 --batch 4 --sequence 256"
PLANS = {
    "memory": [f"--topology {name} --step {step} {MEMORY}" for name in ("v5e:2x2", "cpu:1") for step in EVERY_STEP],
    "pods": [
        *(f"--topology v5e:16x16 --model 7b --step {step}" for step in EVERY_STEP),
        "--topology v6e:16x16 --model 7b --step explicit",
        *(f"--topology v5e:16x16 --model 70b --tensor 8 --batch 32 --step {step}" for step in LARGE_STEPS),
        "--topology v5p:8x8x8 --model 70b --tensor 8 --batch 64 --sequence 4096 --step explicit",
        "--topology v5e:8x8 --model 8b --adapters 16 --tensor 4 --step explicit",
        "--topology v5e:16x16 --model 8b --step explicit",
        "--topology v5e:4x4 --model 1b --step explicit --tensor 4",
        "--topology v5e:2x4 --model ddpm-cifar10 --step explicit --tensor 1 --batch 128",
        "--topology v5e:4x4 --model stable-diffusion --step explicit --tensor 1 --batch 16",
    ],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    out = ROOT / arguments.out
    for name in arguments.plans:
        for options in PLANS[name]:
            command = [sys.executable, "-m", "eupmu_jax", "plan", *options.split(), "--out", str(arguments.out)]
            before = rows.read(out)
            subprocess.run(command, check=True, cwd=ROOT)
            made = rows.read(out)[len(before) :]
            again = {row["command"] for row in made}
            rows.replace(out, [*(row for row in before if row["command"] not in again), *made])


if __name__ == "__main__":
    main()
