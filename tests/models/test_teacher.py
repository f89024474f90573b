"""The teacher's parts as they are loaded: SDXL's conditioning is that of the stock pipeline."""

from types import SimpleNamespace

import pytest
import torch
from conftest import common_options, make_sdxl_teacher
from diffusers import AutoencoderKL

from lcm.models import prompts
from lcm.models import vae as lcm_vae
from lcm.run import start
from train_lcm_distill_sdxl_wds import parse_args

BATCH = {
    "captions": ["a red three", ""],
    "target_size": (1024, 768),  # (height, width)
    "original_sizes": torch.tensor([[700, 1100], [1030, 999]]),  # (height, width)
    "crops": torch.tensor([[3, 0], [0, 41]]),  # (top, left)
}


def encoder(teacher, *more):
    args = parse_args(common_options(teacher, "shards.tar", "out", "--resolution=1024", *more))
    return prompts.SDXLPromptEncoder(args, SimpleNamespace(device=torch.device("cpu"), mixed_precision="no"))


@pytest.fixture(scope="module")
def pipeline(sdxl_teacher):
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(sdxl_teacher)


def test_sdxl_embeddings_are_the_pipelines(sdxl_teacher, pipeline):
    """Captions, and what stands for the empty one where the teacher forces zeros."""
    cond, uncond = encoder(sdxl_teacher)(BATCH)
    expected = pipeline.encode_prompt(BATCH["captions"], do_classifier_free_guidance=True)
    found = (
        cond["encoder_hidden_states"],
        uncond["encoder_hidden_states"],
        cond["added_cond_kwargs"]["text_embeds"],
        uncond["added_cond_kwargs"]["text_embeds"],
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # batches of two and of one round differently
    assert not uncond["encoder_hidden_states"].any() and cond["encoder_hidden_states"][1].any()


def test_sdxl_without_forced_zeros(tmp_path):
    """The unconditional embedding is that of "", which is not what a teacher that forces zeros has."""
    teacher = make_sdxl_teacher(tmp_path, force_zeros_for_empty_prompt=False)
    cond, uncond = encoder(teacher)(BATCH)
    assert torch.allclose(uncond["encoder_hidden_states"][0], cond["encoder_hidden_states"][1])
    assert torch.allclose(uncond["added_cond_kwargs"]["text_embeds"][0], cond["added_cond_kwargs"]["text_embeds"][1])
    assert uncond["encoder_hidden_states"].any()


def test_sdxl_micro_conditioning_is_the_pipelines(sdxl_teacher, pipeline):
    """Original height and width, crop top and left, target height and width; the same for both."""
    cond, uncond = encoder(sdxl_teacher)(BATCH)
    for i in range(2):
        size, crop = BATCH["original_sizes"][i].tolist(), BATCH["crops"][i].tolist()
        ids = pipeline._get_add_time_ids(tuple(size), tuple(crop), (1024, 768), torch.float32, 12)[0]
        for conditioning in (cond, uncond):
            assert torch.equal(conditioning["added_cond_kwargs"]["time_ids"][i], ids)


def test_sdxl_fixed_crop_and_size(sdxl_teacher):
    cond, _ = encoder(sdxl_teacher, "--use_fix_crop_and_size")(BATCH)
    assert cond["added_cond_kwargs"]["time_ids"].tolist() == [[1024, 768, 0, 0, 1024, 768]] * 2


def test_joined_conditioning_is_two_batches_in_one(sdxl_teacher, pipeline):
    """A U-Net called once with 2B samples gives what it gives for B and B."""
    cond, uncond = encoder(sdxl_teacher)(BATCH)
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([19, 999])
    with torch.no_grad():
        both = prompts.join_conditioning(cond, uncond)
        together = pipeline.unet(torch.cat([z, z]), torch.cat([t, t]), **both).sample
        apart = [pipeline.unet(z, t, **conditioning).sample for conditioning in (cond, uncond)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*apart)


def test_how_many_pictures_are_encoded_at_once_does_not_change_the_noise(teacher):
    """Bit for bit the VAE's own sample where all are encoded at once; in parts it differs by rounding."""
    vae = AutoencoderKL.from_pretrained(teacher, subfolder="vae")
    # Latents of 5 x 5: torch draws blocks of 16 numbers, in which whole ones hide where a draw was split.
    pixels = torch.rand(5, 3, 10, 10) * 2 - 1

    def seeded():
        return torch.Generator().manual_seed(3)

    def latents(size):
        return lcm_vae.sample_latents(lcm_vae.encode_pixels(vae, pixels, size), vae.config.scaling_factor, seeded())

    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.sample(seeded()) * vae.config.scaling_factor
        for size in (5, 8):
            assert torch.equal(latents(size), expected)
        for size in (1, 2, 3):
            torch.testing.assert_close(latents(size), expected, rtol=1e-4, atol=1e-5)


def test_sd_embeddings_are_the_pipelines(teacher, shards, tmp_path):
    from diffusers import StableDiffusionPipeline

    import train_lcm_distill_sd_wds as script

    args = script.parse_args(common_options(teacher, shards, tmp_path))
    cond, uncond = prompts.PromptEncoder(args, start.start(args)[0])(BATCH)
    expected = StableDiffusionPipeline.from_pretrained(teacher).encode_prompt(BATCH["captions"], "cpu", 1, True)
    for found, embedding in zip((cond, uncond), expected, strict=True):
        torch.testing.assert_close(found["encoder_hidden_states"], embedding, rtol=1e-5, atol=1e-6)
