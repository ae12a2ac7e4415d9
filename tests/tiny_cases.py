"""A handful of small phantoms with organ maps and reports on disk, for what needs cases and no
cohort"""

import numpy as np
import pandas as pd

from asap.anatomy.organs import map_to_groups
from asap.data.volumes import write
from asap.phantom.abnormalities import synthesize_chest
from asap.phantom.words import synthesize_report


def cases(
    here, name, n, groups
) -> pd.DataFrame:  # case, patient, image, organ_map, findings, impression
    "Of 48x48x24 voxels; another name makes other phantoms"
    rows = []
    for i in range(n):
        c = synthesize_chest((0, name, i), (48, 48, 24), (7, 7, 14))
        r = synthesize_report(c, i)
        write(np.clip(c.hu, -1000, 1000), c.affine, here / f"{i}.nii")
        write(map_to_groups(c.labels, groups), c.affine, here / f"{i}_organs.nii.gz")
        rows.append(
            dict(
                case=f"c{i}",
                patient=f"p{i}",
                image=str(here / f"{i}.nii"),
                organ_map=str(here / f"{i}_organs.nii.gz"),
                findings=r.findings,
                impression=r.impression,
            )
        )
    return pd.DataFrame(rows)


def toy_table(folder, n, kinds=5) -> pd.DataFrame:  # a cohort table
    "Scans of one phantom, some of which differ"
    k = synthesize_chest(("toy", 0), (48, 48, 24), (7.0, 7.0, 14.0))
    rows = [
        dict(
            case=f"c{i:03d}",
            scan=f"s{i}",
            patient=f"p{i}",
            image=str(folder / f"{i}.nii.gz"),
            organ_map="",
            target_map="",
            findings="",
            impression="",
            split="train",
            time_days=None,
            event=None,
        )
        for i in range(n)
    ]
    for i, r in enumerate(rows):
        write(k.hu + np.int16(i % kinds), k.affine, r["image"])
    return pd.DataFrame(rows)
