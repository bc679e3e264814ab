"""Trains `tiny-sd`, the Stable Diffusion that ships with this project, in PyTorch with diffusers.

The product must always start from real, foreign, trained PyTorch weights, so nothing of d2f_jax but the picture
generator is used here. Three stages, each resumed from `--workdir` when the command is started again:

    data    scenes rendered once into memory-mapped arrays
    vae     AutoencoderKL, 4x downsampling, 4 channels: L1 + KL on crops, then on whole pictures
    prior   CLIP-style text encoder and cross-attention UNet together, v_prediction on Stable Diffusion's schedule,
            captions dropped in 10% of the rows so that classifier-free guidance works; EMA weights are kept

    pip install -e '.[torch]'
    python launch/train_tiny_sd.py --workdir=/tmp/tiny-sd --out=d2f_jax/assets/tiny-sd

About 1 h 10 min on two CPU cores (90 s of data, 13 min of VAE at 4.9 steps/s, 50 min of prior at 3 steps/s). Result:
14 MB; at 50 DDIM steps and guidance 3 in diffusers, colour and shape are both right in 94% of 64 prompts for a single
solid. The shipped weights were begun with schedules of 5,000 and 15,000 steps, shortened on the way by starting
again with the present numbers.
"""

# diffusers and transformers declare less than they take and return.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportPrivateImportUsage=false

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from d2f_jax.data import shapes

SIZE = 64  # pixels
TOKENS = 24
TRAIN_SEED = 0  # of the world; the `train` split of the TFDS builder draws from the same one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints; the same folder resumes")
    parser.add_argument("--out", type=Path, required=True, help="the diffusers folder to write")
    parser.add_argument("--scenes", type=int, default=30_000)
    parser.add_argument("--vae_steps", type=int, default=3_600)
    parser.add_argument("--prior_steps", type=int, default=9_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    images, captions = render_scenes(args.workdir, args.scenes)
    tokenizer = make_tokenizer(args.workdir / "tokenizer", captions)
    vae = train_vae(args, images)
    latents = encode_all(args, vae, images)
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    text_encoder, unet = train_prior(args, latents * vae.config.scaling_factor, captions, tokenizer)
    export(args.out, vae, text_encoder, tokenizer, unet)


def render_scenes(workdir: Path, count: int) -> tuple[np.ndarray, list[str]]:
    """uint8 [N, 64, 64, 3] on disk, and the captions."""
    image_file, caption_file = workdir / f"images-{count}.npy", workdir / f"captions-{count}.json"
    if not caption_file.exists():
        images = np.lib.format.open_memmap(image_file, "w+", np.uint8, (count, SIZE, SIZE, 3))
        captions = []
        with multiprocessing.Pool(os.cpu_count()) as pool:
            scenes = pool.imap(_render, range(count), chunksize=64)
            for i, (image, caption) in enumerate(tqdm(scenes, total=count, desc="data", unit="scene")):
                images[i] = image
                captions.append(caption)
        images.flush()
        caption_file.write_text(json.dumps(captions))
    return np.load(image_file, mmap_mode="r"), json.loads(caption_file.read_text())


def _render(index: int) -> tuple[np.ndarray, str]:
    scene = shapes.sample_scene(TRAIN_SEED, index)
    return shapes.render(scene, SIZE).image, scene.caption


def make_tokenizer(folder: Path, captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-pair encoding, with merges learnt from the captions alone: every word of the world is one token."""
    folder.mkdir(exist_ok=True)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True
    )
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in learnt["merges"]]
    # CLIP's order: letters, letters that end a word, merges, then the two special tokens.
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(m.replace(" ", "") for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(dict.fromkeys(tokens))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        pad_token="<|endoftext|>",
        model_max_length=TOKENS,
        **special,
    )


def train_vae(args: argparse.Namespace, images: np.ndarray) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    ).to(args.device)
    vae.set_attn_processor(AttnProcessor())

    def loss(step: int, fraction: float) -> torch.Tensor:
        # Crops cost a quarter; the last fifth sees whole pictures, for the attention in the middle.
        crop = SIZE // 2 if fraction < 0.8 else SIZE
        rows = np.random.default_rng(step).integers(len(images), size=64 if crop < SIZE else 32)
        top, left = np.random.default_rng((step, 1)).integers(SIZE - crop + 1, size=2)
        x = _pixels(images[np.sort(rows), top : top + crop, left : left + crop]).to(args.device)
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        l1 = (reconstruction.float() - x).abs().mean()
        edges = sum((reconstruction.float().diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        return l1 + 0.5 * edges + 1e-4 * posterior.kl().mean() / (crop // 4) ** 2

    parameters = list(vae.parameters())
    averaged = fit("vae", args, parameters, loss, steps=args.vae_steps, peak_rate=2e-3, decay=0.999)
    _assign(parameters, averaged)
    return vae.eval()


@torch.no_grad()
def encode_all(args: argparse.Namespace, vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Means of the latents [N, 4, 16, 16], unscaled: the VAE is so exact that its noise would add nothing."""
    file = args.workdir / f"latents-{len(images)}.pt"
    if not file.exists():
        means = []
        for i in tqdm(range(0, len(images), 64), desc="latents", unit="batch"):
            x = _pixels(images[i : i + 64]).to(args.device)
            with torch.autocast(args.device, torch.bfloat16):
                means.append(vae.encode(x).latent_dist.mean.float().cpu())
        torch.save(torch.cat(means), file)
    return torch.load(file)


def train_prior(
    args: argparse.Namespace, latents: torch.Tensor, captions: list[str], tokenizer: CLIPTokenizer
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",
        )
    ).to(args.device)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        attention_head_dim=4,  # diffusers' historical name for the number of heads
        cross_attention_dim=128,
        norm_num_groups=16,
        use_linear_projection=True,
    ).to(args.device)
    # PyTorch's fused attention is for long sequences: on a CPU its backward pass was a third of this step.
    unet.set_attn_processor(AttnProcessor())
    noise_schedule = scheduler()
    alphas_cumprod = noise_schedule.alphas_cumprod.to(args.device)
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]

    def loss(step: int, fraction: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (64,), generator=generator)
        dropped = torch.rand(64, generator=generator) < 0.1
        tokens = torch.where(dropped[:, None], empty, ids[rows]).to(args.device)
        x = latents[rows].to(args.device)
        # Stratified timesteps: the same uniform law with less variance from batch to batch.
        u = (torch.arange(64) + torch.rand(64, generator=generator)) / 64
        tau = (u * 1000).long().to(args.device)
        noise = torch.randn(x.shape, generator=generator).to(args.device)
        alpha = alphas_cumprod[tau].sqrt()[:, None, None, None]
        sigma = (1 - alphas_cumprod[tau]).sqrt()[:, None, None, None]
        states = text_encoder(tokens).last_hidden_state
        prediction = unet(alpha * x + sigma * noise, tau, states).sample.float()
        return F.mse_loss(prediction, alpha * noise - sigma * x)

    parameters = [*text_encoder.parameters(), *unet.parameters()]
    averaged = fit("prior", args, parameters, loss, steps=args.prior_steps, peak_rate=1e-3, decay=0.9995)
    _assign(parameters, averaged)
    return text_encoder.eval(), unet.eval()


def fit(
    name: str,
    args: argparse.Namespace,
    parameters: Sequence[torch.Tensor],
    loss: Callable[[int, float], torch.Tensor],
    *,
    steps: int,
    peak_rate: float,
    decay: float,
) -> list[torch.Tensor]:
    """`steps` steps over all starts, the rate falling as a cosine; returns the averaged parameters."""
    optimizer = torch.optim.AdamW(parameters, lr=0, betas=(0.9, 0.99), weight_decay=1e-2)
    averaged, first = [p.detach().clone() for p in parameters], 0
    file = args.workdir / f"{name}.pt"
    if file.exists():
        saved = torch.load(file, map_location=args.device)
        _assign(parameters, saved["parameters"])
        optimizer.load_state_dict(saved["optimizer"])
        averaged, first = saved["averaged"], saved["step"]
    saved_at = time.monotonic()
    bar = tqdm(range(first, steps), total=steps, initial=first, desc=name, unit="step", mininterval=5)
    for step in bar:
        warmup, cosine = min(1, (step + 1) / 200), math.cos(math.pi / 2 * step / steps) ** 2
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * warmup * (0.02 + 0.98 * cosine)
        with torch.autocast(args.device, torch.bfloat16):
            value = loss(step, step / steps)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - min(decay, (1 + step) / (10 + step)))
        if step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
        if time.monotonic() - saved_at > 120 or step + 1 == steps:
            saved_at = time.monotonic()
            state = {"parameters": parameters, "optimizer": optimizer.state_dict()}
            torch.save({**state, "averaged": averaged, "step": step + 1}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
    return averaged


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's own noise schedule, with v_prediction as in SD 2.1."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def export(folder, vae, text_encoder, tokenizer, unet) -> None:
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def _assign(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


if __name__ == "__main__":
    main()
