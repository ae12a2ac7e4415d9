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
