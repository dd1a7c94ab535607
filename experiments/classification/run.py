"""The classification benchmark: every method, tuned alike, against a retrained model of the same seed and split.

Command:  uv run python experiments/classification/run.py                     (and with --again)
Time:     about six hours on 2 cores; with --again an hour and a half. Existing rows are kept.
Result:   experiments/classification/rows.jsonl; with --again, some methods from scratch on other seeds in
          experiments/classification/again/rows.jsonl.

It only runs `eupmu benchmark classification` with the options of the saved rows.
"""

import argparse
import subprocess
import sys
from pathlib import Path

FOLDER = Path("experiments/classification")
PROGRAM = "from eupmu_jax.commands.cli import main; main()"
DESIGNS = ("fashion_mnist-cnn", "fashion_mnist-resnet", "emoji-resnet")
ALL = [["--design", design, "--out", str(FOLDER)] for design in DESIGNS]
METHODS = ("EUPMU", "EUPMU budget", "SalUn", "SalUn-soft", "CAGrad")
# Emoji have nine classes, so seed 9 has none to forget.
SEEDS = ("5", "6", "7", "8", "10")
# Used for nothing before the present version of EUPMU was final.
FRESH = ("11", "12", "13", "14", "15")
AGAIN = [
    ["--design", "emoji-resnet", "--seeds", *seeds, "--methods", *methods, "--out", str(FOLDER / "again")]
    for seeds, methods in ((SEEDS, METHODS), (FRESH, METHODS[:1]))
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="the second run, on other seeds")
    for options in AGAIN if parser.parse_args().again else ALL:
        command = [sys.executable, "-c", PROGRAM, "benchmark", "classification", *options]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2])


if __name__ == "__main__":
    main()
