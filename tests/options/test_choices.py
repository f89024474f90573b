"""What may be chosen and what can be done are the same, in both directions."""

import importlib
import inspect
import re
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import PrecisionType
from conftest import encode_image
from diffusers.optimization import SchedulerType, get_scheduler
from PIL import Image

import lcm_common
from lcm.data.pictures import open_picture
from lcm.options import choices, groups, types
from lcm.options.checks import OWN_DEFAULTS


def allowed_by(function, *args):
    """The names that a function of lcm_common says it takes."""
    with pytest.raises(ValueError) as raised:
        function(*args, "no such name")
    return set(re.search(r"allowed: (.*)", str(raised.value))[1].split(", "))


def choices_of(option):
    """What the parser lets one choose."""
    parser = types.make_parser("")
    groups.add_data_options(parser, resolution=512)
    groups.add_distillation_options(parser, w_min=5.0)
    for add in (groups.add_output_options, groups.add_training_options, groups.add_precision_options):
        add(parser)
    return set(parser._option_string_actions[option].choices)


def test_losses():
    pair = torch.zeros(1, 2), torch.ones(1, 2)
    assert allowed_by(lcm_common.consistency_loss, *pair) == set(choices.LOSSES) == choices_of("--loss_type")
    values = {name: lcm_common.consistency_loss(*pair, name).item() for name in choices.LOSSES}
    assert len(set(values.values())) == len(values)


def test_prediction_types():
    """Each leads to an x_0 and a noise from which the same z_t comes."""
    alphas, sigmas = lcm_common.noise_schedule(torch.linspace(0.99, 0.01, 10))
    z_t, output, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([2, 7])
    for function in (lcm_common.predicted_origin, lcm_common.predicted_noise):
        assert allowed_by(function, output, t, z_t, alphas, sigmas) == set(choices.PREDICTION_TYPES)
    for name in choices.PREDICTION_TYPES:
        x_0 = lcm_common.predicted_origin(output, t, z_t, alphas, sigmas, name)
        eps = lcm_common.predicted_noise(output, t, z_t, alphas, sigmas, name)
        torch.testing.assert_close(lcm_common.add_noise(x_0, eps, t, alphas, sigmas), z_t, rtol=1e-4, atol=1e-4)


def test_optimizers():
    for optimizer in choices.OPTIMIZERS.values():
        kind = getattr(importlib.import_module(optimizer.module), optimizer.name)
        assert issubclass(kind, torch.optim.Optimizer) and set(optimizer.options) <= set(choices.ADAM)
        assert set(optimizer.defaults) <= {*optimizer.options, "learning_rate"} & set(OWN_DEFAULTS)
        takes = inspect.signature(kind).parameters
        assert {"lr", "weight_decay", *optimizer.settings} <= takes.keys()
        assert ("betas" in takes, "eps" in takes and kind is not torch.optim.Adafactor) == (
            "adam_beta1" in optimizer.options,
            "adam_epsilon" in optimizer.options,
        )


def test_lr_schedules():
    """All of diffusers' that need no argument of their own."""
    assert set(choices.LR_SCHEDULES) == {kind.value for kind in SchedulerType} - {"piecewise_constant"}
    assert set(choices.LR_SCHEDULES) == choices_of("--lr_scheduler")
    for name in choices.LR_SCHEDULES:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)
    assert {option for own in choices.LR_SCHEDULES.values() for option in own} == set(choices.LR_SHAPE)


def test_precisions():
    """All of accelerate's but 8-bit floats."""
    assert set(choices.PRECISIONS) == {kind.value for kind in PrecisionType} - {"fp8"}
    assert set(choices.PRECISIONS) == choices_of("--mixed_precision")


def test_picture_formats():
    picture = Image.new("RGB", (20, 20), "red")
    for suffix, kind in choices.PICTURE_FORMATS.items():
        assert Image.registered_extensions()[f".{suffix}"] == kind
        assert open_picture(encode_image(picture, suffix)).size == (20, 20)


def test_interpolations():
    assert set(choices.INTERPOLATIONS.values()) <= set(Image.Resampling.__members__)
    assert set(choices.INTERPOLATIONS) == choices_of("--interpolation_type")


def test_samplers():
    for kind, settings in choices.SAMPLERS.values():
        scheduler = getattr(diffusers, kind)(**settings)
        assert settings.items() <= dict(scheduler.config).items()


def test_trackers():
    assert set(choices.TRACKERS) == {str(kind) for kind in LOGGER_TYPE_TO_CLASS}
    assert set(choices.TRACKERS) == choices_of("--report_to") - {"all", "none"}


def test_no_module_repeats_a_table():
    """The names of a table with a telling spelling stand in no other module."""
    for path in Path(choices.__file__).parents[1].rglob("*.py"):
        if path.name != "choices.py":
            text = path.read_text()
            for name in ("cosine_with_restarts", "AdamW8bit", "nearest_exact", "lanczos", "UniPCMultistepScheduler"):
                assert name not in text, (path, name)
