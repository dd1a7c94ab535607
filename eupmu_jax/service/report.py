"""A report on a finished and audited run that others can verify: what was asked and reached, with all hashes."""

import hashlib
import json
from pathlib import Path

from eupmu_jax.benchmark.rows import finite
from eupmu_jax.service import audit, folder, records, retraining
from eupmu_jax.service._again import absolute, differences

NAMES = ("asked", "reached", "audit")


def make(out: Path) -> dict:
    """Writes `report.json` for an audited run of `deletion.run`, and returns it.

    Raises:
      ValueError: If the run is not finished or not audited, was retrained or repeated after its audit, or a record is
        damaged.
    """
    found = {name: records.read(out / f"{name}.json", name) for name in NAMES}
    if retraining.is_made(out) and "retrained" not in found["audit"]:
        # Verification would repeat the audit with them, and get another one.
        raise ValueError(
            f"out: {out} was audited before its model was retrained, expected an audit that compares with it; run "
            "`eupmu audit` again"
        )
    if found["audit"]["params"] != found["reached"]["params"]:
        raise ValueError(
            f"out: {out} was audited with other parameters than it has now, expected an audit of these; run `eupmu "
            "audit` again"
        )
    files = {name: _sha256(out / name) for name in _files(out)}
    records.write(out / "report.json", {"version": records.VERSION, **found, "files": files})
    return records.read(out / "report.json", "report")


def verify(path: Path, file: Path) -> list[str]:
    """Returns what does not hold in a report; an empty list if everything does.

    The hashes of all records and parameters are recomputed, except that of the page, which is made from the report. The
    records in the report are compared with those next to it. The audit is run again from the user's file and the saved
    parameters, and all its figures are compared; those of `canaries` only if the extra `audit` was installed then and
    is installed now.

    Args:
      path: Path of `report.json` in the folder of the run, or of that folder.
      file: The user's file that the run used.

    Raises:
      FileNotFoundError: If the user's file is missing.
      ValueError: If `path` is not a report, or the user's file has other data or parameters.
    """
    if not file.is_file():
        raise FileNotFoundError(f"file: {file} is not there; expected the Python file that the run used")
    path = path / "report.json" if path.is_dir() else path
    report, out = records.read(path, "report"), path.parent
    wrong = []
    for name, expected in sorted(report["files"].items()):
        # Nothing outside the folder is read, whatever a report says.
        if (
            Path(name).is_absolute()
            or ".." in Path(name).parts
            or not (out / name).resolve().is_relative_to(out.resolve())
        ):
            wrong.append(f"{name}: leads out of the folder")
        elif not (out / name).is_file():
            wrong.append(f"{name}: is not there")
        elif _sha256(out / name) != expected:
            wrong.append(f"{name}: is not the file that was reported")
    others = [name for name in _files(out) if name not in report["files"]]
    wrong += [f"{name}: is not among the files that were reported" for name in others]
    for name in NAMES:
        if not wrong and report[name] != records.read(out / f"{name}.json", name):
            wrong.append(f"report.json: {name} differs from {name}.json")
    other_code = folder.is_of_other_code(file, report["reached"])
    code = [f"reached.code: {file} is not the file that the run used"] if other_code else []
    if not wrong:
        again = json.loads(json.dumps(finite(audit.make(file, out))))
        tolerance = absolute(report["audit"]["rates"], report["reached"]["level"])
        wrong = differences("audit", report["audit"], again, tolerance)
    return code + wrong


def _files(out):
    """The records and parameters of a run, by their paths in its folder."""
    folders = [out / name for name in ("params", folder.START, retraining.RETRAINED)]
    found = sorted(path for part in folders for path in part.rglob("*") if path.is_file())
    return [f"{name}.json" for name in NAMES] + [path.relative_to(out).as_posix() for path in found]


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
