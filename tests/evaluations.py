"""Evaluations small enough to reckon by hand."""

from pathlib import Path

from PIL import Image

from experiments.evaluation.results import Drawn, Evaluation

PROMPTS = ["a red circle", "<script>document.title = 'taken'</script> a cat & \"quotes\"", "ein größerer Hund"]
BASE = [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
DPO = [[1.0, 3.0], [2.0, 2.0], [6.0, 4.0]]  # means of the prompts 2, 2, 5
SPO = [[3.0, 3.0], [4.0, 2.0], [5.0, 5.0]]  # 3, 3, 5


def drawn(label, scores, baseline=False, guidance=5.0, source=None):
    nested = scores if isinstance(scores, dict) else {"shapes": scores}
    source = source or f"runs/{label}"
    return Drawn(label, source, baseline, guidance, f"pictures/{source.replace('/', '-')}-{guidance:g}", nested)


def evaluation(*all_drawn, prompts=PROMPTS, protocol=None):
    return Evaluation(protocol or {"name": "shapes"}, list(prompts), list(all_drawn))


def paint(found: Evaluation, folder: Path, side: int = 16) -> None:
    """The pictures: red by prompt, green by number."""
    for one in found.drawn:
        for p, prompt in enumerate(next(iter(one.scores.values()))):
            for i in range(len(prompt)):
                path = folder / one.picture(p, i)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (side, side), (20 * p, 20 * i, 99)).save(path)
