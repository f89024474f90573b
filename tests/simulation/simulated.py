"""Simulated runs for tests, and what their records should say.

Each test's runs have their own process, forked from a server that never ran a backward pass: autograd notes which
devices there are when it starts.
"""

import dataclasses
import json
import traceback

from conftest import ROOT

from lcm.simulation.many import SERVER


class Failed(Exception):
    """A simulated run raised; the text is its traceback."""


def simulate(script, runs, more, plant, folder):
    """Run one after another, with one output folder: write the records, or why there are none, to a file."""
    try:
        from lcm.simulation.training import Simulation

        if plant:
            plant()
        simulations = [(Simulation(script, options, **more), num_steps) for options, num_steps in runs]
        found = [dataclasses.asdict(run.run_in(str(folder), num_steps)) for run, num_steps in simulations]
    except BaseException:
        found = traceback.format_exc()
    (folder / "records.json").write_text(json.dumps(found))


def simulated(script, folder, *more, num_steps=2, resumed_to=None, plant=None, **simulation):
    """The Record of a simulated run as a dict, or two of them with that of the run that resumes it. Raises Failed.

    `plant` is called before, in the process of the run. `simulation` are further arguments of Simulation.
    """
    options = script.options(folder, *more)
    runs = [(options, num_steps)]
    if resumed_to:
        runs.append(([*options, "--resume_from_checkpoint=latest"], resumed_to))
    process = SERVER.Process(target=simulate, args=(script.path.stem, runs, simulation, plant, folder))
    process.start()
    process.join()
    found = json.loads((folder / "records.json").read_text())
    if isinstance(found, str):
        raise Failed(found)
    return found if resumed_to else found[0]


def steps_of(records):
    """The steps of several runs."""
    return [step for record in records for step in record["steps"]]


def place_of(path, text):
    """file:line of the one line of the project with this text."""
    lines = (ROOT / path).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if text in line]
    return f"{path}:{number}"


def the_one_wait():
    """The wait of every step: [phase, kind, place, how often]."""
    return ["check", "tolist", place_of("lcm/run/progress.py", "# the one wait"), 1]


def expected_dtypes(script, half):
    """{network: what it is given}: latents and micro-conditioning are float32, embeddings are in 16 bits."""
    given = {"sample": "float32", "timestep": "int64", "encoder_hidden_states": half}
    if script.is_sdxl:
        given |= {"text_embeds": half, "time_ids": "float32"}
    embedded = given if script.is_lora else given | {"timestep_cond": "float32"}
    return {"teacher": given, "target": embedded, "student": embedded}


def found_dtypes(record):
    """{network: what it was given}, and the dtypes of all outputs."""
    given = {network: dict(dtypes) for network, dtypes in record["dtypes"].items()}
    return given, {dtypes.pop("output") for dtypes in given.values()}


def states_and_trained(record):
    """Bytes of the optimizer's states and of the trained weights."""
    at_peak = record["steps"][-1]["at_peak"]
    return at_peak["states of the optimizer"], at_peak["weights that are trained"]


def copies_on_device(record, what):
    """Bytes that were made on the device to save, as a part of the trained weights."""
    states, trained = states_and_trained(record)
    return (record[what] - record["loaded"] - states) / trained
