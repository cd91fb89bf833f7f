"""Drawing and scoring an evaluation's pictures, against batched plain diffusers that draws and scores the same ones.

DDIM, guidance 5, the same noise, to 8-bit pictures in memory; the judge is the same network on both sides.
"""

import numpy as np
import torch
from alternating import alternate
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from networks import judge, policy

from callbacks.evaluation.pictures import PictureRequest, draw
from callbacks.evaluation.scores import score_rows
from lightning_modules.policies.adaptation import Frozen
from lightning_modules.sampling.eight_bit import eight_bit
from lightning_modules.sampling.pictures import Sampler, initial_noise


def test_drawing_and_scoring(size, networks, device, rounds, clock, rows):
    drawer, scorer = policy(size, networks, Frozen(), device).eval(), judge(networks, device)
    parts = {"vae": drawer.vae, "unet": drawer.unet, "text_encoder": drawer.text_encoder}
    if size.sdxl:
        parts["text_encoder_2"] = drawer.text_encoder_2
    else:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    kind = StableDiffusionXLPipeline if size.sdxl else StableDiffusionPipeline
    pipe = kind.from_pretrained(networks / "sd", **parts)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    sampler = Sampler(steps=size.steps)
    requests = [PictureRequest(f"picture {n // 4}", (0, "bench", n)) for n in range(4 * size.prompts)]
    batches = [requests[start : start + 4] for start in range(0, len(requests), 4)]

    def ours():
        pictures, scores = [], []
        with torch.no_grad():
            for batch in batches:
                prompts = [request.prompt for request in batch]
                images = draw(drawer, sampler, drawer.predict_noise, batch)
                pictures.append(eight_bit(images, prompts))
                scores += score_rows([scorer], images, prompts, "bench", "none")
        return np.concatenate(pictures), [row["step_aware"] for row in scores]

    def theirs():
        pictures, scores = [], []
        for batch in batches:
            prompts = [request.prompt for request in batch]
            noise, _ = initial_noise(drawer, [request.key for request in batch])
            with torch.no_grad():
                images = pipe(
                    prompts, negative_prompt=[""] * len(batch), latents=noise, num_inference_steps=size.steps,
                    guidance_scale=sampler.guidance_scale, output_type="pt",
                ).images  # fmt: skip
                pictures.append((images * 255).round().permute(0, 2, 3, 1).byte().cpu().numpy())
                texts = scorer.encode_text(prompts)
                times = torch.zeros(len(prompts), dtype=torch.int64, device=images.device)
                scores += (scorer.logit_scale * (scorer.encode_images(images, times) * texts).sum(-1)).tolist()
        return np.concatenate(pictures), scores

    timings = alternate({"plain diffusers": theirs, "ours": ours}, rounds, clock, peers=["plain diffusers"])
    (own, own_scores), (plain, plain_scores) = timings.results["ours"], timings.results["plain diffusers"]
    assert np.abs(own.astype(int) - plain.astype(int)).max() <= 1
    np.testing.assert_allclose(own_scores, plain_scores, rtol=1e-3, atol=1e-3)
    rows.ratio("Drawing and scoring", timings, "plain diffusers", "ours", pictures=len(requests))
