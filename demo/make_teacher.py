"""Train the demo's teacher, a tiny Stable Diffusion, from scratch on the CPU.

Four stages. Each saves its result in --work_dir, and is skipped if the result exists already:

    classifier   the classifier of pictures (classifier.py)          -> classifier.safetensors beside this file
    vae          AutoencoderKL, 64x64 pixels to 16x16x4 latents      -> WORK_DIR/vae, WORK_DIR/latents.pt
    text         CLIPTokenizer and CLIPTextModel, contrastive        -> WORK_DIR/tokenizer, WORK_DIR/text_encoder
    unet         UNet2DConditionModel and the text encoder, jointly  -> --output_dir, a StableDiffusionPipeline

On two CPU cores, shared with other programs, the stages took 83, 325, 17 and 2,706 seconds. A second run with the same
--work_dir resumes where the first one stopped.

    python demo/make_teacher.py
"""

import argparse
import itertools
import json
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import evaluate
import torch
import torch.nn.functional as F
import world
from classifier import FEATURES, WEIGHTS, Classifier, load_classifier

HERE = Path(__file__).parent
SEED = 0
PICTURES = 30_000  # to train with
MAX_TOKENS = 16  # a caption is at most seven tokens, nine with start and end


def load_pixels(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw pictures; returns pixels (N, 3, 64, 64) in [-1, 1] and the numbers of their captions (N,), int64."""
    pictures, numbers = world.render(count, seed)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1), torch.from_numpy(numbers)


def all_labels() -> torch.Tensor:
    """The labels of all captions, (468, 13), int64."""
    return torch.tensor([world.labels(*world.parse_caption(text)) for text in world.all_captions()])


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], learning_rate: float, steps: int, warmup_steps: int = 50
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """Return AdamW and its learning rate scheduler: linear warm-up, then a cosine down to zero at `steps`."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / warmup_steps)
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# ---------------------------------------------------------------------------------------------------------- classifier


def train_classifier(steps: int = 2500, batch_size: int = 128) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(SEED)
    pixels, numbers = load_pixels(PICTURES, seed=1)
    held_pixels, held_numbers = load_pixels(2000, seed=2)
    held_images = ((held_pixels + 1) * 127.5).round().to(torch.uint8)
    labels = all_labels()
    classifier = Classifier()
    optimizer, lr_scheduler = make_optimizer(classifier.parameters(), 2e-3, steps)
    for step in range(1, steps + 1):
        rows = torch.randint(len(pixels), (batch_size,))
        # A little noise and a random fade: sampled pictures are less clean than the drawn ones.
        batch = pixels[rows]
        batch = batch * (1 - 0.2 * torch.rand(batch_size, 1, 1, 1)) + 0.2 * torch.rand(1) * torch.randn_like(batch)
        expected = labels[numbers[rows]]
        things, background = classifier(batch)
        loss = F.binary_cross_entropy_with_logits(things, 0.05 + 0.9 * expected[:, :-1].float())
        loss = loss + 0.2 * F.cross_entropy(background, expected[:, -1], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        if step % 500 == 0:
            classifier.eval()
            right = classifier.read(held_images) == labels[held_numbers]
            classifier.train()
            things, background = right[:, :-1].all(1).double().mean(), right[:, -1].double().mean()
            print(
                f"classifier step {step} loss {loss.item():.3f} held out: things {things:.2%} "
                f"background {background:.2%}",
                flush=True,
            )
    save_file({name: tensor.half().contiguous() for name, tensor in classifier.state_dict().items()}, WEIGHTS)


# ----------------------------------------------------------------------------------------------------------------- VAE


def train_vae(work_dir: Path, steps: int = 1600, batch_size: int = 32) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        sample_size=world.SIZE,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    classifier = load_classifier()
    pixels, _ = load_pixels(PICTURES, seed=3)
    held_pixels, _ = load_pixels(468, seed=4)
    optimizer, lr_scheduler = make_optimizer(vae.parameters(), 2e-3, steps)
    for step in range(1, steps + 1):
        batch = pixels[torch.randint(len(pixels), (batch_size,))]
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        # The mean absolute error keeps edges sharp, the classifier's features keep them readable, and the small KL
        # term keeps the latents, which the U-Net has to model, near a Gaussian.
        features = F.mse_loss(classifier.features(decoded), classifier.features(batch))
        loss = F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch) + 0.05 * features + 2e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        if step % 250 == 0:
            print(f"vae step {step} loss {loss.item():.4f} " + check_vae(vae, classifier, held_pixels), flush=True)
    vae.eval()
    with torch.no_grad():
        posteriors = [vae.encode(chunk).latent_dist for chunk in pixels.split(500)]
        means = torch.cat([posterior.mean for posterior in posteriors])
        stds = torch.cat([posterior.std for posterior in posteriors])
    deviation = (means.var() + stds.square().mean()).sqrt().item()
    vae.register_to_config(scaling_factor=round(1 / deviation, 5))
    print(f"vae scaling_factor {vae.config.scaling_factor} posterior deviation {stds.mean():.3f}", flush=True)
    vae.save_pretrained(work_dir / "vae")
    torch.save((means * vae.config.scaling_factor, stds * vae.config.scaling_factor), work_dir / "latents.pt")


@torch.no_grad()
def check_vae(vae: Any, classifier: Classifier, pixels: torch.Tensor) -> str:
    """Describe the reconstructions of held-out pictures, one of each caption: PSNR in dB, and what is still read."""
    decoded = vae.decode(vae.encode(pixels).latent_dist.sample()).sample.clamp(-1, 1)
    psnr = -10 * torch.log10(((decoded - pixels) / 2).square().mean())
    before, after = classifier.read((pixels + 1) * 127.5), classifier.read((decoded + 1) * 127.5)
    return f"held out: PSNR {psnr:.1f} dB, read as before {(before == after).all(1).double().mean():.2%}"


# ---------------------------------------------------------------------------------------------------------------- text


def byte_characters() -> list[str]:
    """Return the 256 printable characters that stand for the 256 bytes in GPT-2's and CLIP's vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges until every word is one token; returns pairs, the most frequent first."""
    spellings = Counter(words)
    spellings = {(*word[:-1], word[-1] + "</w>"): count for word, count in spellings.items()}
    merges = []
    while True:
        pairs = Counter()
        for spelling, count in spellings.items():
            for pair in itertools.pairwise(spelling):
                pairs[pair] += count
        if not pairs:
            return merges
        left, right = max(sorted(pairs), key=pairs.get)
        merges.append((left, right))
        spellings = {merge(spelling, left, right): count for spelling, count in spellings.items()}


def merge(spelling: tuple[str, ...], left: str, right: str) -> tuple[str, ...]:
    """Join each neighbouring (left, right) in a tuple of tokens."""
    tokens = []
    for token in spelling:
        if tokens and tokens[-1] == left and token == right:
            tokens[-1] = left + right
        else:
            tokens.append(token)
    return tuple(tokens)


def make_tokenizer(folder: Path) -> Any:
    """Learn a tokenizer from the captions, and write its files; returns the CLIPTokenizer."""
    from transformers import CLIPTokenizer

    merges = learn_merges(re.findall(r"\w+|[^\w\s]+", " ".join(world.all_captions())))
    letters = byte_characters()
    tokens = letters + [letter + "</w>" for letter in letters] + [left + right for left, right in merges]
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {token: i for i, token in enumerate([*tokens, start, end])}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "bos_token": start}
    config |= {"eos_token": end, "unk_token": end, "pad_token": end}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """Return token ids (N, 16), padded as in StableDiffusionPipeline."""
    padded = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return padded.input_ids


def train_text(work_dir: Path, steps: int = 600, batch_size: int = 128) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(work_dir / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    tokens = tokenize(tokenizer, world.all_captions())
    # From each caption's last token on, the mean over the tokens. The U-Net sees all of them.
    ends = (tokens == tokenizer.eos_token_id).int().argmax(1, keepdim=True)
    from_end = (torch.arange(MAX_TOKENS) >= ends).float()[..., None]
    pixels, by_caption = load_pixels(6000, seed=5)
    with torch.no_grad():
        features = torch.cat([load_classifier().features(chunk) for chunk in pixels.split(500)])
    # Contrastive as in CLIP: the features of each picture must match its caption among all 468. Then the U-Net need
    # not learn from noisy pictures what the words mean.
    project = torch.nn.Linear(FEATURES, 64)
    parameters = [*text_encoder.parameters(), *project.parameters()]
    optimizer, lr_scheduler = make_optimizer(parameters, 1e-3, steps)
    for step in range(1, steps + 1):
        rows = torch.randint(len(pixels), (batch_size,))
        hidden = (text_encoder(tokens).last_hidden_state * from_end).sum(1) / from_end.sum(1)
        image = F.normalize(project(features[rows]), dim=1)
        logits = 10 * image @ F.normalize(hidden, dim=1).T
        loss = F.cross_entropy(logits, by_caption[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        if step % 100 == 0:
            right = (logits.argmax(1) == by_caption[rows]).double().mean()
            print(f"text step {step} loss {loss.item():.3f} picture -> caption {right:.1%}", flush=True)
    text_encoder.save_pretrained(work_dir / "text_encoder")


# --------------------------------------------------------------------------------------------------------------- U-Net


def make_unet() -> Any:
    """Return the U-Net of 2.45 M parameters, chosen by its cost: attention only at 4x4."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler() -> Any:
    """The noise schedule of Stable Diffusion 1.5."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def save_teacher(pipe: Any, tokenizer_dir: Path, folder: Path) -> None:
    """Write the pipeline to a new folder, then rename it to `folder`, so that `folder` is always complete.

    U-Net and VAE are stored in float16. The text encoder is stored in float32: transformers 5 loads weights in the
    dtype in which they were stored, and a float16 text encoder does not run with a float32 U-Net.
    """
    from safetensors.torch import load_file, save_file

    fresh, stale = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh)
    for part in ("unet", "vae"):
        path = fresh / part / "diffusion_pytorch_model.safetensors"
        weights = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
        # The folder from which a part was loaded does not belong in the files.
        config = json.loads((fresh / part / "config.json").read_text())
        config.pop("_name_or_path", None)
        (fresh / part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # transformers 5 omits the prefix `text_model.`. Older versions need it; public checkpoints have it.
    path = fresh / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    # transformers 5 writes only tokenizer.json; older versions need vocab.json and merges.txt.
    shutil.rmtree(fresh / "tokenizer")
    shutil.copytree(tokenizer_dir, fresh / "tokenizer")
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def make_pipeline(work_dir: Path) -> Any:
    """Return the pipeline of the trained VAE and text encoder with an untrained U-Net."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work_dir / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work_dir / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(work_dir / "tokenizer"),
        unet=make_unet(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_unet(
    work_dir: Path,
    output_dir: Path,
    steps: int,
    batch_size: int = 128,
    check_steps: int = 750,
    ema_decay: float = 0.999,
) -> None:
    from diffusers.training_utils import EMAModel, compute_snr

    torch.manual_seed(SEED)
    means, stds = torch.load(work_dir / "latents.pt")
    _, by_caption = world.render(PICTURES, seed=3)  # the pictures that the latents were made of
    by_caption = torch.from_numpy(by_caption)
    pipe = make_pipeline(work_dir)
    unet, text_encoder, scheduler = pipe.unet, pipe.text_encoder, pipe.scheduler
    tokens = tokenize(pipe.tokenizer, [*world.all_captions(), ""])
    model = torch.nn.ModuleList([unet, text_encoder])
    ema = EMAModel(model.parameters(), decay=ema_decay)
    optimizer, lr_scheduler = make_optimizer(model.parameters(), 2e-3, steps, warmup_steps=200)

    step, running, best, start = 0, 0.0, 0.0, time.time()
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
    state_path = work_dir / "unet_state.pt"
    if state_path.exists():
        state = torch.load(state_path)
        step, best = state["step"], state["best"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.manual_seed(SEED + step)

    while step < steps:
        step += 1
        rows = torch.randint(len(means), (batch_size,))
        z_0 = means[rows] + stds[rows] * torch.randn_like(means[rows])
        noise = torch.randn_like(z_0)
        t = torch.randint(1000, (batch_size,))
        z_t = scheduler.add_noise(z_0, noise, t)
        # One caption in ten becomes the empty one, the last row of `tokens`: classifier-free guidance needs it.
        captions = by_caption[rows].where(torch.rand(batch_size) >= 0.1, len(tokens) - 1)
        different, places = captions.unique(return_inverse=True)
        hidden = text_encoder(tokens[different]).last_hidden_state[places]
        eps = unet(z_t, t, hidden, return_dict=False)[0]
        # Min-SNR weights (arXiv 2303.09556) reduce the weight of low noise, where only fine details are left to learn.
        snr = compute_snr(scheduler, t)
        weights = snr.clamp(max=5) / snr
        loss = (weights * F.mse_loss(eps, noise, reduction="none").mean(dim=(1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        ema.step(model.parameters())
        running += loss.item()
        if step % 100 == 0:
            print(f"unet step {step} loss {running / 100:.4f} {time.time() - start:.0f} s", flush=True)
            running = 0.0
        if step % check_steps == 0 or step == steps:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            right = check_teacher(pipe, step)
            if right >= best or step == steps:
                best = right
                save_teacher(pipe, work_dir / "tokenizer", output_dir)
            ema.restore(model.parameters())
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"step": step, "best": best}, state_path)


def check_teacher(pipe: Any, step: int) -> float:
    """Print the accuracy of 234 pictures of 25 DDIM steps; returns the share in which everything is right."""
    captions = world.all_captions()[::2]
    images, _ = evaluate.sample(pipe, captions, num_inference_steps=25, guidance_scale=3.0, seed=0)
    shares = evaluate.accuracy(images, captions)
    print(f"unet step {step} " + " ".join(f"{name} {share:.1%}" for name, share in shares.items()), flush=True)
    return shares["all right"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["classifier", "vae", "text", "unet"], help="Redo this stage only.")
    parser.add_argument("--work_dir", type=Path, default=Path("teacher_work"), help="Folder for results in between.")
    parser.add_argument("--output_dir", type=Path, default=HERE / "teacher", help="Where the pipeline is written.")
    parser.add_argument("--unet_steps", type=int, default=4000, help="Training steps of the U-Net.")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    stages = {
        "classifier": (WEIGHTS, train_classifier),
        "vae": (args.work_dir / "latents.pt", lambda: train_vae(args.work_dir)),
        "text": (args.work_dir / "text_encoder", lambda: train_text(args.work_dir)),
        "unet": (None, lambda: train_unet(args.work_dir, args.output_dir, args.unet_steps)),
    }
    for name, (result, run) in stages.items():
        if name == args.stage or (args.stage is None and (result is None or not result.exists())):
            start = time.time()
            run()
            print(f"{name}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
