"""Write README.md from nbs/index.ipynb, and the picture in it; with --check only say whether the
text is fresh"""

import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

top = Path(__file__).resolve().parent.parent


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
    return (
        "<!-- made from nbs/index.ipynb by `make readme`: edit that page, not this file -->\n"
        + "\n".join(lines)
        + "\n"
    )


def picture(to):
    """For each abnormality whose place has to be seen, the first phantom that is drawn: what its
    own sentence is like, with the weights that ship"""
    import tempfile
    import textwrap

    import matplotlib.pyplot as plt
    import numpy as np

    from asap.core import atomic_write, rng
    from asap.data.volumes import Volume, orthogonal_planes, write
    from asap.inference import scan
    from asap.inference.ground import ground_sentences, overlay_heatmap, plot_contours
    from asap.phantom.abnormalities import synthesize_chest
    from asap.phantom.words import finding_sentence

    model, text = scan.load_model_and_text()
    fig, axes = plt.subplots(1, 4, figsize=(10, 3), layout="constrained")
    with tempfile.TemporaryDirectory() as tmp:
        for ax, label in zip(axes, ("Lung nodule", "Atelectasis", "Consolidation", "Lung opacity")):
            c = synthesize_chest(("readme", label), present=[label])
            lesion, said = c.findings[0].mask, finding_sentence(c.findings[0], rng("readme", label))
            write(c.hu, c.affine, Path(tmp) / "scan.nii.gz")
            seen = scan.load_scan(Path(tmp) / "scan.nii.gz", model.vit)
            g = ground_sentences(model, text, seen, [said])
            heat, region = g.to_scan_space(0, seen.volume)
            at = [
                int(x.argmax())
                for x in (lesion.sum((1, 2)), lesion.sum((0, 2)), lesion.sum((0, 1)))
            ]

            def on(x, c=c, at=at):
                return orthogonal_planes(
                    Volume(x, c.affine).ras().hu, np.sqrt((c.affine[:3, :3] ** 2).sum(0)), at
                )[0]

            (img, aspect), (h, _), (r, _), (m, _) = map(
                on, (c.hu, heat, region, lesion.astype(np.uint8))
            )
            ax.imshow(img, cmap="gray", vmin=-1000, vmax=400, aspect=aspect)
            ax.axis("off")
            overlay_heatmap(
                ax, h, r, np.percentile(g.similarity[0], 5), g.similarity[0].max(), aspect
            )
            plot_contours(ax, np.zeros_like(m), m)
            ax.set_title(textwrap.fill(said, 42), fontsize=7)
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
