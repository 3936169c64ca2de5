# Cascade Mask R-CNN on InternImage-H, 36 epochs, for mmdetection 3. The official code has this detector for L and XL
# only; rates, decay and drop path are those of its H detectors.
_base_ = "mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_ms-3x_coco.py"
custom_imports = {"imports": ["m3i_large.integrations.mmdet"], "allow_failed_imports": False}

model = {
    "backbone": {
        "_delete_": True,
        "type": "M3IInternImage",
        "name": "internimage_h",
        "weights": None,  # --cfg-options model.backbone.weights=FILE
        "with_cp": True,
        "drop_path": 0.5,
    },
    "neck": {"in_channels": [320, 640, 1280, 2560]},
}
optim_wrapper = {
    "_delete_": True,
    "type": "AmpOptimWrapper",
    "dtype": "bfloat16",
    "constructor": "M3ILayerDecay",
    "optimizer": {"type": "AdamW", "lr": 1e-4, "weight_decay": 0.05},
    "paramwise_cfg": {"layer_decay": 0.94, "offset_scale": 0.1},
}
