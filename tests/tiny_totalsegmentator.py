"""A tiny random nnU-Net in the place and the form of TotalSegmentator's weights: it proves the
plumbing, its masks mean nothing"""

import json
import pydoc
from pathlib import Path

STAGES, FEATURES, PATCH = 3, [4, 8, 8], [48, 48, 48]
ARCH = dict(
    n_stages=STAGES,
    features_per_stage=FEATURES,
    conv_op="torch.nn.modules.conv.Conv3d",
    kernel_sizes=[[3, 3, 3]] * STAGES,
    strides=[[1, 1, 1]] + [[2, 2, 2]] * (STAGES - 1),
    n_conv_per_stage=[1] * STAGES,
    n_conv_per_stage_decoder=[1] * (STAGES - 1),
    conv_bias=True,
    norm_op="torch.nn.modules.instancenorm.InstanceNorm3d",
    norm_op_kwargs=dict(eps=1e-5, affine=True),
    dropout_op=None,
    dropout_op_kwargs=None,
    nonlin="torch.nn.LeakyReLU",
    nonlin_kwargs=dict(inplace=True),
)
IMPORTS = ["conv_op", "norm_op", "dropout_op", "nonlin"]  # strings in ARCH that name classes


def plans(name, mm) -> dict:  # plans.json
    "nnU-Net's plan for one CT channel at `mm` isotropic"
    how = "resample_data_or_seg_to_shape"

    def to(is_seg, order):
        return dict(is_seg=is_seg, order=order, order_z=0, force_separate_z=None)

    conf = dict(
        data_identifier="nnUNetPlans_3d_fullres",
        preprocessor_name="DefaultPreprocessor",
        batch_size=2,
        patch_size=PATCH,
        median_image_size_in_voxels=[64] * 3,
        spacing=[mm] * 3,
        normalization_schemes=["CTNormalization"],
        use_mask_for_norm=[False],
        resampling_fn_data=how,
        resampling_fn_data_kwargs=to(False, 3),
        resampling_fn_seg=how,
        resampling_fn_seg_kwargs=to(True, 1),
        resampling_fn_probabilities=how,
        resampling_fn_probabilities_kwargs=to(False, 1),
        batch_dice=True,
        architecture=dict(
            network_class_name="dynamic_network_architectures.architectures.unet.PlainConvUNet",
            arch_kwargs=ARCH,
            _kw_requires_import=IMPORTS,
        ),
    )
    ct = dict(
        max=3000.0,
        mean=0.0,
        median=0.0,
        min=-1024.0,
        percentile_00_5=-1000.0,
        percentile_99_5=1000.0,
        std=400.0,
    )
    return dict(
        dataset_name=name,
        plans_name="nnUNetPlans",
        original_median_spacing_after_transp=[mm] * 3,
        original_median_shape_after_transp=[64] * 3,
        image_reader_writer="SimpleITKIO",
        transpose_forward=[0, 1, 2],
        transpose_backward=[0, 1, 2],
        configurations={"3d_fullres": conf},
        experiment_planner_used="ExperimentPlanner",
        label_manager="LabelManager",
        foreground_intensity_properties_per_channel={"0": ct},
    )


def network(classes, allowed, seed):
    "A random U-Net of which only the `allowed` ids ever win"
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    torch.manual_seed(seed)
    kw = {k: pydoc.locate(v) if k in IMPORTS and v else v for k, v in ARCH.items()}
    net = PlainConvUNet(input_channels=1, num_classes=classes, deep_supervision=False, **kw)
    last = net.decoder.seg_layers[-1]
    with torch.no_grad():
        last.weight *= 4  # far apart, so that rounding does not change which class wins
        last.bias[
            [i for i in range(classes) if i not in allowed]
        ] = -500  # finite in half precision
    return net


def labels_of(task) -> dict:  # name -> number in that model's output
    "The classes of one of the models of `total`"
    from totalsegmentator.map_to_binary import (
        class_map,
        class_map_5_parts,
        map_taskid_to_partname_ct,
    )

    parts = (
        class_map_5_parts[map_taskid_to_partname_ct[task]]
        if task in map_taskid_to_partname_ct
        else class_map["total"]
    )
    return {"background": 0, **{name: number for number, name in parts.items()}}


def write_model(folder, task, mm, trainer, names, seed=0):
    "One model as nnU-Net stores it: plans.json, dataset.json, fold_0/checkpoint_final.pth"
    import torch
    from totalsegmentator.map_tasks_config import TASK_ID_WEIGHTS_CONFIGS

    name, labels = TASK_ID_WEIGHTS_CONFIGS[task]["foldername"], labels_of(task)
    to = Path(folder) / name / f"{trainer}__nnUNetPlans__3d_fullres"
    (to / "fold_0").mkdir(parents=True)
    (to / "plans.json").write_text(json.dumps(plans(name, mm)))
    (to / "dataset.json").write_text(
        json.dumps(
            dict(channel_names={"0": "CT"}, labels=labels, numTraining=1, file_ending=".nii.gz")
        )
    )
    net = network(len(labels), {0, *(labels[n] for n in names if n in labels)}, seed)
    torch.save(
        dict(
            network_weights=net.state_dict(),
            trainer_name=trainer,
            init_args=dict(configuration="3d_fullres"),
            inference_allowed_mirroring_axes=None,
        ),
        to / "fold_0/checkpoint_final.pth",
    )


def write_tiny(folder, mode="fast", names=(), seed=0):
    """Every model of one mode of `total` (fast, fastest, default); besides background only the
    classes `names` come out"""
    from totalsegmentator.map_tasks_config import TASK_CONFIGS

    c = TASK_CONFIGS["total"]["sub_modes"][mode]
    for task in c["task_id"] if isinstance(c["task_id"], list) else [c["task_id"]]:
        write_model(folder, task, c["resample"], c["trainer"], names, seed)
