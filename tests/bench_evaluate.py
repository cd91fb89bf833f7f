"""CPU time of drawing an evaluation's pictures, against a batched loop of plain diffusers that draws the same ones.

    python tests/bench_evaluate.py --rounds 7 --pictures 32 --batch 16 --steps 20

On the embedded model, to 8-bit pictures in memory: DDIM, guidance 5, the same noise. Rounds alternate between the two,
so that other work on the machine meets both. One process, imports and weights not counted.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import experiments
from callbacks.evaluation.pictures import PictureRequest, draw
from lightning_modules.policies.adaptation import Frozen
from lightning_modules.policies.stable_diffusion import StableDiffusion
from lightning_modules.sampling.eight_bit import eight_bit
from lightning_modules.sampling.pictures import Sampler, initial_noise

FOLDER = Path(experiments.__file__).parent / "embedded" / "shapes"
PROMPTS = (FOLDER.parent / "prompts" / "shapes_test.txt").read_text().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = StableDiffusion(str(FOLDER), Frozen()).eval()
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    sampler = Sampler(steps=args.steps)
    requests = [PictureRequest(PROMPTS[i % len(PROMPTS)], (0, "bench", i)) for i in range(args.pictures)]
    batches = [requests[start : start + args.batch] for start in range(0, args.pictures, args.batch)]

    def ours() -> np.ndarray:
        with torch.no_grad():
            return np.concatenate(
                [eight_bit(draw(policy, sampler, policy.predict_noise, b), [r.prompt for r in b]) for b in batches]
            )

    def theirs() -> np.ndarray:
        found = []
        for batch in batches:
            noise, _ = initial_noise(policy, [request.key for request in batch])
            images = pipe(
                [request.prompt for request in batch], negative_prompt=[""] * len(batch), latents=noise,
                num_inference_steps=args.steps, guidance_scale=sampler.guidance_scale, output_type="np",
            ).images  # fmt: skip
            found.append((images * 255).round().astype("uint8"))
        return np.concatenate(found)

    seconds: dict[str, list[float]] = {"ours": [], "diffusers": []}
    pictures = {}
    for number in range(args.rounds + 1):
        for name, way in (("ours", ours), ("diffusers", theirs)):
            start = time.process_time()
            pictures[name] = way()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    apart = np.abs(pictures["ours"].astype(int) - pictures["diffusers"].astype(int)).max()
    for name, found in seconds.items():
        rate = args.pictures / statistics.median(found)
        print(f"{name}: {rate:.2f} pictures per CPU second ({min(found):.2f} to {max(found):.2f} s)")
    ratios = [two / one for one, two in zip(seconds["ours"], seconds["diffusers"])]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"ours is {middle:.3f} ({low:.3f} to {high:.3f}) times as fast")
    print(f"largest difference between the pictures: {apart} 8-bit levels")


if __name__ == "__main__":
    main()
