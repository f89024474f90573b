"""Cached shards on the simulated device: neither VAE nor text encoder is there, and nothing waits for the host."""

from dataclasses import replace

import pytest
from conftest import SCRIPTS, Script
from simulated import simulated, steps_of, the_one_wait

import precompute_lcm


@pytest.mark.parametrize("name", ["sd", "lora_sdxl"])
def test_neither_vae_nor_text_encoder(name, teacher, sdxl_teacher, shards, tmp_path):
    """Pictures are drawn too: for them both are loaded. The networks do the same work as on pictures."""
    script = Script(name, sdxl_teacher if "sdxl" in name else teacher, shards, SCRIPTS[name])
    precompute_lcm.main(
        [f"--pretrained_teacher_model={script.teacher}", f"--train_shards_path_or_url={shards}", "--resolution=16",
         f"--output_dir={tmp_path / 'cached'}", "--mixed_precision=no"]
    )  # fmt: skip
    cached = replace(script, shards=str(tmp_path / "cached" / "{00000..00002}.tar"))
    records = []
    for number, variant in enumerate((script, cached)):
        (tmp_path / str(number)).mkdir()
        records.append(simulated(variant, tmp_path / str(number), with_pictures=True))
    assert [step["waits"] for step in steps_of(records[1:])] == [[the_one_wait()]] * 2
    pictures, without = (record["steps"][-1] for record in records)
    assert {"VAE", "text encoders"} < pictures["flops"].keys()
    assert not {"VAE", "text encoders"} & without["flops"].keys()
    for network in ("teacher", "student", "target", "backward"):
        assert without["flops"][network] == pictures["flops"][network]
    parts = {"weights of the VAE", "weights of text encoders"}
    assert parts < pictures["at_peak"].keys() and not parts & without["at_peak"].keys()
    assert without["start"] < pictures["start"]
