# DINO (4 scales) on InternImage-H: what the official detectors are, for mmdetection 3.
# Rates, decay, drop path and clipping as in OpenGVLab/InternImage's dino_4scale_internimage_h_objects365_coco_ss.py.
_base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"
custom_imports = {"imports": ["m3i_large.integrations.mmdet"], "allow_failed_imports": False}

model = {
    "backbone": {
        "_delete_": True,
        "type": "M3IInternImage",
        "name": "internimage_h",
        "weights": None,  # --cfg-options model.backbone.weights=FILE
        "out_indices": (1, 2, 3),
        "with_cp": True,
        "drop_path": 0.5,
    },
    "neck": {"in_channels": [640, 1280, 2560]},
}
optim_wrapper = {
    "_delete_": True,
    "type": "AmpOptimWrapper",
    "dtype": "bfloat16",
    "constructor": "M3ILayerDecay",
    "optimizer": {"type": "AdamW", "lr": 1e-4, "weight_decay": 1e-4},
    "paramwise_cfg": {"layer_decay": 0.94, "offset_scale": 1e-3},
    "clip_grad": {"max_norm": 0.1, "norm_type": 2},
}
