"Write README.md from nbs/index.ipynb, and the picture in it; --check: is the text fresh?"

import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

top = Path(__file__).resolve().parent.parent
RECORD = "<!-- results/full -->\n\n"  # where the claims of the full budget stand


def record(root: Path = top) -> str:
    "Claims of the full budget and where they come from; empty where no run of it is kept"
    if not (root / "results/full/record.json").exists():
        return ""
    from asap.study.page import read_record, record_markdown

    return record_markdown(read_record(root)) + "\n\n"


def readme() -> str:
    "The index page as Markdown: prose and shown code, no outputs, no hidden cells"
    nb = nbformat.read(top / "nbs/index.ipynb", as_version=4)
    nb.cells = [
        c for c in nb.cells if not (c.cell_type == "code" and c.source.startswith("#| hide"))
    ]
    for c in nb.cells:
        if c.cell_type == "code":
            c.update(
                outputs=[],
                source="\n".join(x for x in c.source.splitlines() if not x.startswith("#|")),
            )
    nb.metadata.language_info = dict(name="python")
    body, _ = MarkdownExporter().from_notebook_node(nb)
    lines = [line.rstrip() for line in body.strip().splitlines()]
    head = "<!-- made from nbs/index.ipynb by `make readme`: edit that page, not this file -->\n"
    body = "\n".join(lines) + "\n"
    if body.count(RECORD) != 1:
        sys.exit(f"nbs/index.ipynb needs one paragraph {RECORD.strip()}")
    return head + body.replace(RECORD, record())


def picture(to):
    "Heat map of a phantom's own sentence, for each small lesion; shipped weights"
    import tempfile
    import textwrap

    import matplotlib.pyplot as plt
    import numpy as np

    from asap.core import atomic_write, rng
    from asap.data.volumes import Volume, orthogonal_planes, write
    from asap.inference import scan
    from asap.inference.ground import ground_sentences, heat_limits, overlay_heatmap, plot_contours
    from asap.phantom.abnormalities import synthesize_chest
    from asap.phantom.words import finding_sentence

    model, text = scan.load_model_and_text()
    fig, axes = plt.subplots(1, 4, figsize=(10, 3), layout="constrained")
    with tempfile.TemporaryDirectory() as tmp:
        for ax, label in zip(axes, ("Lung nodule", "Atelectasis", "Consolidation", "Lung opacity")):
            c = synthesize_chest(("readme", label), present=[label])
            lesion = c.findings[0].mask
            sentence = finding_sentence(c.findings[0], rng("readme", label))
            write(c.hu, c.affine, Path(tmp) / "scan.nii.gz")
            loaded = scan.load_scan(Path(tmp) / "scan.nii.gz", model.vit)
            g = ground_sentences(model, text, loaded, [sentence])
            heat, region = g.to_scan_space(0, loaded.volume)
            sums = (lesion.sum((1, 2)), lesion.sum((0, 2)), lesion.sum((0, 1)))
            at = [int(x.argmax()) for x in sums]
            arrays = (c.hu, heat, region, lesion.astype(np.uint8))
            volumes = [Volume(x, c.affine).ras() for x in arrays]
            planes = [orthogonal_planes(v.hu, v.spacing, at)[0] for v in volumes]
            (img, aspect), (h, _), (r, _), (m, _) = planes
            ax.imshow(img, cmap="gray", vmin=-1000, vmax=400, aspect=aspect)
            ax.axis("off")
            overlay_heatmap(ax, h, r, *heat_limits(g.similarity[0]), aspect)
            plot_contours(ax, np.zeros_like(m), m)
            ax.set_title(textwrap.fill(sentence, 42), fontsize=7)
    Path(to).parent.mkdir(exist_ok=True)
    with atomic_write(Path(to)) as tmp:
        fig.savefig(tmp, format="png", dpi=90, bbox_inches="tight", metadata=dict(Software=None))


if __name__ == "__main__":
    if "--check" in sys.argv:
        if (top / "README.md").read_text(encoding="utf8") != readme():
            sys.exit("README.md is stale: run `make readme`")
    else:
        (top / "README.md").write_text(readme(), encoding="utf8")
        picture(top / "nbs/images/places.png")
