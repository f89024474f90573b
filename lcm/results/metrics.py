"""`metrics.jsonl`: the curves of a run as numbers, one JSON object a line."""

import itertools
import json
import logging
import os
from typing import Any

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
IN_EVERY_ROW = {"step", "loss", "lr", "images_per_second"}
START_OF_A_ROW = '{"step": '


class MetricsFile:
    """`metrics.jsonl` in the output folder: one JSON object a line, in the order of steps; written by one process."""

    def __init__(self, output_dir: str):
        self.path = os.path.join(output_dir, METRICS_FILE)
        self.has_failed = False

    def read(self) -> list[dict[str, Any]]:
        """The rows, as dicts of numbers."""
        return self.read_lines()[0]

    def read_lines(self) -> tuple[list[dict[str, Any]], int]:
        """(the rows, the number of other lines); a row that was cut short by a kill is neither."""
        rows, num_others = [], 0
        if os.path.isfile(self.path):
            with open(self.path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        row = json.loads(line)
                    except ValueError:
                        num_others += line.endswith("\n") or not line.startswith(START_OF_A_ROW[: len(line)])
                        continue
                    if is_row(row):
                        rows.append(row)
                    else:
                        num_others += 1
        return rows, num_others

    def go_on_from(self, step: int) -> None:
        """Drop the rows after `step`: a resumed run trains these steps again. A new run, from step 0, drops all rows.

        A file with other lines is another program's, or was edited: it is kept under another name.
        """
        try:
            rows, num_others = self.read_lines()
            if num_others:
                kept = next(name for i in itertools.count(1) if not os.path.exists(name := f"{self.path}.{i}"))
                os.rename(self.path, kept)
                logger.warning("%d line(s) of %s are not metrics of a run; it is now %s", num_others, self.path, kept)
            with open(self.path + ".partial", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
            os.replace(file.name, self.path)
        except OSError as error:
            self.warn(error)

    def append(self, row: dict[str, Any]) -> None:
        """Add one row."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            self.warn(error)

    def warn(self, error: OSError) -> None:
        """Log once that metrics cannot be written, for example on a full disk; the run continues without them."""
        if not self.has_failed:
            logger.warning("Metrics are not written to %s: %s", self.path, error)
        self.has_failed = True


def is_row(value: Any) -> bool:
    """Whether the JSON value of a line is a row of `metrics.jsonl`."""
    if not isinstance(value, dict) or not value.keys() >= IN_EVERY_ROW or type(value["step"]) is not int:
        return False
    return all(type(number) in (int, float) for number in value.values())
